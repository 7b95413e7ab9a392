"""Expert matmuls in the report: every backend that has one, what would run, and one call."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from fp8dispatch import cli, registry, trust
from fp8dispatch.doctor.collect import collect
from fp8dispatch.probes.gallery import NAMES
from fp8dispatch.trust import Verdict
from tests.doctor.conftest import H200, told

if TYPE_CHECKING:
    from fp8dispatch.doctor.report import DeviceRecord
    from tests.doctor.conftest import Plant

# What takes which recipe on the machines of the gallery, where DeepGEMM is not installed and fast
# accumulation is not allowed: none of the libraries has kernels for another GPU.
HOPPER = {
    "triton": ("tensor", "row", "block 128x128", "block 1x128", "block 1x32"),
    "deepgemm": (),
    "fbgemm": ("block 128x128",),
    "mslk": ("block 128x128",),
    "cutlass": ("tensor", "row"),
}


def taken(device: DeviceRecord) -> dict[str, tuple[str, ...]]:
    return {
        backend.name: tuple(one.recipe for one in backend.recipes if one.verdict != "refused")
        for backend in device.experts
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_backend_that_has_experts_is_listed_with_all_its_reasons(name: str) -> None:
    (device,) = collect(machine=name).devices

    assert tuple(backend.name for backend in device.experts) == registry.EXPERT_NAMES
    for backend in device.experts:
        refused = [one.refusals for one in backend.recipes if one.verdict == "refused"]
        assert bool(backend.refusals) != bool(backend.recipes)
        assert all(refused)
    found = taken(device)
    for backend_name, recipes in HOPPER.items():
        runs_here = name in ("h100", "h200") or (
            backend_name == "triton" and name not in ("cpu", "mi300x")
        )
        assert found[backend_name] == (recipes if runs_here else ()), backend_name
    assert len(found["eager"]) == 5


@pytest.mark.parametrize("name", NAMES)
def test_our_own_kernels_run_them_where_they_can(name: str) -> None:
    (device,) = collect(machine=name).devices

    for choice in device.expert_routes:
        wanted = "eager" if name in ("cpu", "mi300x") else "triton"
        # On Hopper another of ours where an expert has many rows, here 32, and blocks are large.
        if name in ("h100", "h200") and choice.m == 8192:
            wanted = "triton" if choice.recipe in ("block 1x128", "block 1x32") else "gluon"
        assert choice.backend == wanted, choice
    ways = {(choice.batched, choice.m) for choice in device.expert_routes}
    assert ways == {(True, 8), (True, 256), (False, 1024), (False, 8192)}
    assert {choice.experts for choice in device.expert_routes} == {256}
    assert {choice.experts for choice in device.routes} == {None}


def test_verdicts_of_experts_are_their_own(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(H200)

    def judge(name: str, *_: Any, **__: Any) -> Verdict:
        return Verdict("wrong" if name == "experts.triton" else "right", "as planted", "disk")

    monkeypatch.setattr(trust, "judge", judge)
    report = collect()

    assert report.exit_code == 4
    wrong = told(report, "broken")
    assert "triton (experts) is wrong for row on cuda:0: as planted" in wrong
    assert len(wrong) == 5, "of five recipes, and of no linear layer"
    chosen = {choice.recipe: choice.backend for choice in report.devices[0].expert_routes}
    assert chosen["row"] == "gluon"
    assert chosen["block 128x128"] == "gluon"
    assert chosen["block 1x32"] == "eager"
    slow = "only plain torch, which is slow, takes experts in block 1x128, block 1x32"
    assert any(slow in sentence for sentence in told(report, "degraded"))


def test_a_statement_that_no_expert_survives_is_degraded(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200)
    monkeypatch.setenv("FP8DISPATCH_BACKEND", "cutlass")

    report = collect()

    sentences = told(report, "degraded")
    assert "40 of the 40 calls in the route table raise" in sentences[0]
    assert "needs an expert matmul, found a linear layer" in sentences[0]
    assert "12 of the 20 calls in the table of experts raise" in sentences[1]


@pytest.mark.parametrize(("more", "way"), [([], "grouped"), (["--batched"], "batched")])
def test_one_call_by_its_shape(
    more: list[str], way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--shape", "64,1536,2048", "--recipe", "row", "--experts", "128", *more]

    code = cli.main(["doctor", "--machine", "h200", *shape])

    out = " ".join(capsys.readouterr().out.split())
    assert code == 0
    assert f"triton runs {way} experts E=128 M=64 N=1536 K=2048, row, float8_e4m3fn" in out
    assert "fbgemm needs a policy that allows fast accumulation" in out
    assert "cublaslt needs an expert matmul, found linear layers only" in out
    assert "would run it too: gluon, cutlass, eager" in out


def test_one_call_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shape", "64,1536,2048", "--recipe", "block", "--experts", "2000", "--batched"]

    cli.main(["doctor", "--json", "--machine", "h200", *shape])

    report = json.loads(capsys.readouterr().out)
    call = report["devices"][0]["call"]
    assert report["schema_version"] == 3
    assert (call["choice"]["experts"], call["choice"]["batched"]) == (2000, True)
    told_by = {one["backend"]: one["refusals"] for one in call["assessments"]}
    assert [one["code"] for one in told_by["fbgemm"]] == ["experts"]
