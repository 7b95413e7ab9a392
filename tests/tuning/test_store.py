"""Tuned orders on disk: for exactly this machine, whole or not at all, and never in the way."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8dispatch import __version__
from fp8dispatch.kernels.tile import Tile
from fp8dispatch.machine import Machine
from fp8dispatch.problem import Accuracy, ExpertsProblem
from fp8dispatch.recipe import ROW
from fp8dispatch.tuning import orders
from fp8dispatch.tuning import store as store_module
from fp8dispatch.tuning.store import DeviceFingerprint, TunedFile, TunedStore, merged
from tests.tuning.conftest import start_anew
from tests.tuning.stored import DAY, H200, PROBLEM, order, point, put


def test_an_order_is_found_for_its_machine_and_says_where_it_comes_from(store: TunedStore) -> None:
    assert order() is None
    path = put(store, point())

    found = orders.find(PROBLEM, H200)

    assert found is not None
    assert found.order == ("gluon", "cublaslt")
    assert found.source == f"tuned, {path}, 2026-09-21"
    content = json.loads(path.read_text("utf-8"))
    assert content["schema_version"] == 2
    assert content["fingerprint"] == {
        "device": "cuda NVIDIA H200",
        "capability": [9, 0],
        "memory_bytes": 150_111_977_472,
        "driver": "580.159.04",
        "versions": {
            "torch": "2.11.0+cu130",
            "cuda": "13.0",
            "triton": "3.6.0",
            "torchao": "0.17.0",
        },
        "fp8dispatch": __version__,
    }


def test_a_tile_comes_with_its_order_and_no_other(store: TunedStore) -> None:
    tile = Tile(64, 128, 4, 3, 2, 8)
    put(
        store,
        point(tiles={"triton": tile}),
        point(m=256),
        point(m=1024, order=(), wrong={"x": "y"}),
    )

    def tiles(**changes: Any) -> Any:
        found = orders.find(replace(PROBLEM, **changes), H200)
        return None if found is None else dict(found.tiles)

    assert tiles() == {"triton": tile}
    assert tiles(m=7) == {"triton": tile}
    assert tiles(m=256) == tiles(m=1000) == {}
    assert tiles(batch_invariant=True) is None


VERSIONS = dict(H200.versions)
OTHERS = [
    replace(H200, device_name="NVIDIA H100"),
    replace(H200, capability=(9, 1)),
    replace(H200, driver="590.1"),
    replace(H200, memory_bytes=80 << 30),
    replace(H200, versions={**VERSIONS, "torch": "2.12.0+cu130"}),
    replace(H200, versions={**VERSIONS, "triton": "3.7.0"}),
    replace(H200, versions={**VERSIONS, "torchao": "0.18.0"}),
    replace(H200, versions={**VERSIONS, "fbgemm-gpu-genai": "1.6.0"}),
    replace(H200, versions={name: text for name, text in VERSIONS.items() if name != "torchao"}),
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_a_file_for_anything_else_is_ignored(
    store: TunedStore, other: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, point())

    with caplog.at_level(logging.WARNING, logger="fp8dispatch"):
        assert [order(machine=other) for _ in range(3)] == [None] * 3
        assert order(replace(PROBLEM, m=1), other) is None

    if other.device_name == H200.device_name:
        (said,) = caplog.messages  # once, and what to do
        assert "are ignored, they are for" in said
        assert said.endswith("run fp8dispatch tune again")
    else:
        assert caplog.messages == [], "another device's file is nobody's concern"


def test_the_difference_is_named(store: TunedStore) -> None:
    put(store, point())
    newer = replace(H200, versions={**VERSIONS, "torch": "2.12.0", "deep-gemm": "1.0"})

    said = orders.in_force(newer).ignored

    assert "for torch 2.11.0+cu130 instead of 2.12.0: run" in said, "deep-gemm is no backend's"


def test_what_compiles_a_backend_here_counts_where_it_runs(
    store: TunedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp8dispatch import registry

    deepgemm = registry.load("deepgemm")
    monkeypatch.setattr(deepgemm, "toolchain", lambda: {"nvcc": "of 2025"}, raising=False)
    refused = orders.fingerprint_of(H200)
    monkeypatch.setattr(deepgemm, "refuse_machine", lambda _: ())
    assert "deepgemm nvcc" not in refused.versions
    assert orders.fingerprint_of(H200).versions["deepgemm nvcc"] == "of 2025"
    put(store, point())
    assert order() is not None

    monkeypatch.setattr(deepgemm, "toolchain", lambda: {"nvcc": "of 2026"}, raising=False)
    start_anew()

    assert order() is None


def test_memory_may_be_counted_in_two_ways(store: TunedStore) -> None:
    """NVML, which the doctor asks, counts what the driver keeps for itself; torch does not."""
    put(store, point())

    assert order(machine=replace(H200, memory_bytes=143_771 << 20)) is not None
    assert order(machine=replace(H200, memory_bytes=0)) is not None, "nobody could say"
    assert order(machine=replace(H200, memory_bytes=75 << 30)) is None


def test_another_release_of_ours_measures_anew(
    store: TunedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, point())
    monkeypatch.setattr(orders, "__version__", "99.0")

    assert order() is None


def test_environments_that_share_a_cache_do_not_disturb_each_other(store: TunedStore) -> None:
    newer = replace(H200, versions={**VERSIONS, "torch": "2.12.0"})
    put(store, point())
    put(store, point(order=("cublaslt",)), machine=newer)

    assert (order(), order(machine=newer)) == (("gluon", "cublaslt"), ("cublaslt",))
    assert orders.in_force(H200).ignored == ""


def damaged_files() -> dict[str, bytes]:
    right = TunedFile(fingerprint=orders.fingerprint_of(H200), points=(point(),))
    plain = right.model_dump(mode="json")

    def text(**changes: Any) -> bytes:
        return json.dumps({**plain, **changes}).encode()

    def changed(**fields: Any) -> bytes:
        return text(points=[{**plain["points"][0], **fields}])

    tile = {"block_m": 64, "block_n": 128, "num_warps": 4, "num_stages": 3}
    TunedFile.model_validate_json(changed(tiles={"triton": tile}))

    def tiled(**fields: Any) -> bytes:
        return changed(tiles={"triton": {**tile, **fields}})

    whole = json.dumps(plain).encode()
    return {
        "empty": b"",
        "cut": whole[:-20],
        "no JSON": b"\x00\xff" * 100,
        "a list": b"[]",
        "another schema": text(schema_version=1),
        "no schema": json.dumps({k: v for k, v in plain.items() if k != "points"}).encode(),
        "more than it should have": text(extra=1),
        "no size": changed(m="many"),
        "a size of nothing": changed(n=0),
        "an order of numbers": changed(order=[1, 2]),
        "not a number": changed(us={"gluon": "NaN"}),
        "an infinite time": changed(us={"gluon": 1e999}),
        "in the year of nobody": changed(tuned_at=1e300),
        "another class": changed(accuracy="exacter"),
        "a tile that no kernel has": tiled(block_m=48),
        "a tile of no rows": tiled(block_m=0),
        "a tile of text": tiled(block_n="wide"),
        "a tile of nothing": tiled(num_warps=None),
        "a tile with half a stage": tiled(num_stages=2.5),
        "a tile with too many stages": tiled(num_stages=99),
        "a tile with too many programs": tiled(programs_per_sm=64),
        "a tile that walks backwards": tiled(group_m=-8),
        "a tile that sums in another order": tiled(block_k=64),
        "a tile cut short": changed(tiles={"triton": {"block_m": 64}}),
        "a tile in words": changed(tiles={"triton": "64x128"}),
        "tiles of nobody": changed(tiles=[tile]),
        "too deep": b'{"a":' * 50_000,
    }


@pytest.mark.parametrize("name", damaged_files())
def test_a_damaged_file_is_ignored_and_written_anew(
    store: TunedStore, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = put(store, point())
    path.write_bytes(damaged_files()[name])

    with caplog.at_level(logging.WARNING, logger="fp8dispatch"):
        assert [order() for _ in range(3)] == [None] * 3

    (said,) = caplog.messages
    assert "are ignored, they cannot be read" in said
    assert "\n" not in said
    put(store, point())
    assert order() == ("gluon", "cublaslt")


def test_a_foreign_file_under_the_right_name_is_ignored(
    store: TunedStore, caplog: pytest.LogCaptureFixture
) -> None:
    path = put(store, point())
    other = orders.fingerprint_of(replace(H200, driver="1.0"))
    path.write_text(TunedFile(fingerprint=other, points=(point(),)).model_dump_json(), "utf-8")

    with caplog.at_level(logging.WARNING, logger="fp8dispatch"):
        assert order() is None

    assert "driver 1.0 instead of 580.159.04" in caplog.text


def test_a_file_that_is_too_large_or_no_file_is_ignored(
    store: TunedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(store, point())
    monkeypatch.setattr(store_module, "_LARGEST_FILE", 100)
    assert "larger than 100 bytes" in orders.in_force(H200).ignored
    monkeypatch.undo()
    monkeypatch.setenv("FP8DISPATCH_CACHE_DIR", str(store.directory.parent))
    path.unlink()
    path.mkdir()
    start_anew()
    assert order() is None


def test_a_name_that_no_backend_has_is_harmless(store: TunedStore) -> None:
    from fp8dispatch import registry, routes

    put(store, point(order=("gone", "cublaslt")))

    names, _ = routes.order_for(PROBLEM, H200, registry.NAMES, orders.find(PROBLEM, H200))

    assert names[0] == "cublaslt"
    assert sorted(names) == sorted(registry.NAMES)


def test_a_measurement_holds_for_its_recipe_class_and_weight_alone(store: TunedStore) -> None:
    put(store, point())

    assert order(replace(PROBLEM, out_dtype="float16", has_bias=True)) is not None
    for other in (
        replace(PROBLEM, recipe=ROW),
        replace(PROBLEM, accuracy=Accuracy.FAST),
        replace(PROBLEM, n=4097),
        replace(PROBLEM, k=7169),
        replace(PROBLEM, m=17),
        replace(PROBLEM, batch_invariant=True),
        ExpertsProblem(**{**vars(PROBLEM), "experts": 8}),
    ):
        assert order(other) is None, other


@given(st.integers(0, 1 << 40))
def test_buckets_end_at_powers_of_four(m: int) -> None:
    top = orders.bucket(m)

    assert (top.bit_length() - 1) % 2 == 0
    assert top == 1 << (top.bit_length() - 1)
    assert top // 4 < m <= top or (m == 0 and top == 1)


@given(st.sets(st.integers(1, 300), min_size=1, max_size=6), st.integers(1, 300))
def test_the_nearest_measurement_in_the_bucket_speaks(measured: set[int], m: int) -> None:
    points = [point(m=one, order=(f"at{one}",)) for one in measured]
    table = orders.InForce({("block 128x128", "exact", 4096, 7168): points})
    orders._tables[H200] = table
    try:
        found = order(replace(PROBLEM, m=m))
    finally:
        orders._tables.clear()

    near = [one for one in measured if orders.bucket(one) == orders.bucket(m)]
    if not near:
        assert found is None
        return
    assert found is not None
    chosen = int(found[0][2:])
    assert chosen in near

    def apart(one: int) -> float:
        return max(one, m) / min(one, m)

    assert all(apart(chosen) <= apart(one) * (1 + 1e-12) for one in near)


def test_wrong_numbers_hold_for_every_number_of_rows(store: TunedStore) -> None:
    put(
        store, point(wrong={"deepgemm": "it was off"}), point(m=4096, wrong={"fbgemm": "so was it"})
    )

    for m in (16, 200, 4096):
        found = orders.find(replace(PROBLEM, m=m), H200)
        assert found is not None
        assert found.wrong == {"deepgemm": "it was off", "fbgemm": "so was it"}
    between = orders.find(replace(PROBLEM, m=200), H200)
    assert between is not None
    assert between.order == (), "an order holds for its bucket alone"
    assert orders.find(replace(PROBLEM, n=8), H200) is None


def test_new_points_replace_old_ones_of_their_size_and_the_newest_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = point(tuned_at=DAY), point(order=("cublaslt",), tuned_at=DAY + 1)
    other = point(m=1, tuned_at=DAY + 2)

    assert merged((first, other), (second,)) == (second, other)
    monkeypatch.setattr(store_module, "_MAX_POINTS", 1)
    assert merged((first, other), (second,)) == (other,)


def test_clearing_deletes_what_is_stored_and_what_is_remembered(store: TunedStore) -> None:
    put(store, point())
    orders.keep(replace(H200, uuid="GPU-2"), point(), None, "there is no home")

    assert orders.clear() == 1

    assert order() is None
    assert order(machine=replace(H200, uuid="GPU-2")) is None
    assert not list(store.directory.glob("*.json"))


def test_a_user_without_a_home_gets_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("fp8dispatch.policy.cache_directory", homeless)

    assert orders.open_store() == (None, "Could not determine home directory.")
    assert order() is None
    assert orders.clear() == 0


def test_differences_are_symmetric_in_what_they_see() -> None:
    mine = orders.fingerprint_of(H200)
    for other in OTHERS:
        theirs: DeviceFingerprint = orders.fingerprint_of(other)
        assert len(mine.differences(theirs)) == len(theirs.differences(mine)) == 1
    assert mine.differences(mine) == ()
