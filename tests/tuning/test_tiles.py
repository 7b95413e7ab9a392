"""Tiles of our own kernel are tuned as backends are, and change the speed of calls alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fp8dispatch
from fp8dispatch import cli, decide, policy, registry
from fp8dispatch.backends.contract import Weight
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.kernels import scaled_gemm
from fp8dispatch.kernels.gemm_tiles import tile_of
from fp8dispatch.kernels.tile import Tile
from fp8dispatch.overrides import use_backend
from fp8dispatch.probes.device import describe
from fp8dispatch.problem import LinearProblem
from fp8dispatch.recipe import BLOCK_128
from fp8dispatch.tuning import orders
from fp8dispatch.tuning import run as running
from fp8dispatch.tuning.measure import Arm, Point
from tests.tuning.conftest import Workbench, start_anew

pytestmark = pytest.mark.skipif(
    not describe(torch.device("cpu")).triton_interpreter, reason="needs TRITON_INTERPRET=1"
)

M, N, K = 3, 24, 160
X = torch.randn(M, K, dtype=torch.bfloat16)
WEIGHT, SCALE = fp8dispatch.quantize(torch.randn(N, K))
OWN = Tile(16, 32, 4, 8)
SWIFT = Tile(16, 64, 4, 6)

Fault = Callable[[torch.Tensor], None]


class Launches:
    """The tiles that the GEMM was launched with, how long each takes, and what is wrong with it.

    What is computed is always the default tile: NumPy, which multiplies in the interpreter, may sum
    in another order for another tile. That no tile changes a bit is tested where sums are exact.
    """

    def __init__(self, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bench = bench
        self.seen: list[Tile] = []
        self.us: dict[Tile, float] = {}
        self.others_us = 50.0
        self.faults: dict[Tile, Fault] = {}
        made: Any = scaled_gemm.gemm_call

        def gemm_call(*arguments: Any) -> Any:
            *others, _ = arguments
            call = made(*arguments)
            tile = tile_of(call.config)
            self.seen.append(tile)
            bench.clock.now += self.us.get(tile, self.others_us)
            return made(*others, None)

        real: Any = scaled_gemm.scaled_gemm

        def launched(*arguments: Any, **named: Any) -> None:
            real(*arguments, **named)
            self.faults.get(self.seen[-1], lambda _: None)(arguments[5])

        monkeypatch.setattr(scaled_gemm, "gemm_call", gemm_call)
        monkeypatch.setattr("fp8dispatch.backends.compute.triton.scaled_gemm", launched)
        monkeypatch.setattr(registry, "NAMES", ("eager", "triton"))

    def of_next_call(self, **options: Any) -> Tile:
        self.seen.clear()
        fp8dispatch.fp8_linear(X, WEIGHT, SCALE, **options)
        (tile,) = self.seen
        return tile


@pytest.fixture
def launches(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(bench, monkeypatch)


def tune(launches: Launches, *shapes: Any, **options: Any) -> fp8dispatch.TuningReport:
    options = {"device": "cpu", "timer": launches.bench.timer, "progress": False, **options}
    return fp8dispatch.tune(shapes or [(M, N, K)], **options)


def arm_of(point: Point, tile: Tile | None, backend: str = "triton") -> Arm:
    (found,) = (arm for arm in point.arms if (arm.backend, arm.tile) == (backend, tile))
    return found


def test_a_faster_tile_is_kept_and_used_from_the_next_call_on(
    launches: Launches, home: Path
) -> None:
    expected = fp8dispatch.fp8_linear(X, WEIGHT, SCALE, backend="triton")
    assert launches.of_next_call(backend="triton") == OWN
    launches.us = {SWIFT: 20.0}

    report = tune(launches)

    (point,) = report.points
    assert point.order == ("triton", "eager")
    assert (point.before, point.us_before) == ("eager", 100.0)
    assert point.us == {"triton": 20.0, "eager": 100.0}
    assert dict(point.tiles) == {"triton": SWIFT}
    assert arm_of(point, None).us == 50.0
    assert len({arm.tile for arm in point.arms if arm.state == "timed"}) >= 5
    assert launches.of_next_call() == SWIFT, "chosen by its speed"
    assert launches.of_next_call(backend="triton") == SWIFT, "the backend stated, its tile tuned"
    assert launches.of_next_call() == SWIFT, "by the warm path"
    assert torch.equal(fp8dispatch.fp8_linear(X, WEIGHT, SCALE), expected)
    decision = fp8dispatch.explain(X, WEIGHT, SCALE)
    assert decision.problem.tile == SWIFT
    assert "  tile: 16x64, 4 warps, 6 stages\n" in f"{decision}\n"
    assert fp8dispatch.explain(X, WEIGHT, SCALE, backend="eager").problem.tile is None
    shown = report.as_dict()["points"][0]
    assert shown["tiles"] == {"triton": "16x64, 4 warps, 6 stages"}
    assert json.loads(json.dumps(shown)) == shown


def test_another_process_reads_the_tile_from_disk(launches: Launches) -> None:
    launches.us = {SWIFT: 20.0}
    report = tune(launches)

    start_anew()

    assert report.file is not None
    assert launches.of_next_call() == SWIFT
    report.file.unlink()
    start_anew()
    assert launches.of_next_call(backend="triton") == OWN


def test_ties_within_the_noise_keep_the_default(launches: Launches) -> None:
    launches.us = {SWIFT: 48.8}  # the default takes 2.5 % longer

    (point,) = tune(launches).points

    assert dict(point.tiles) == {}
    assert point.us["triton"] == 50.0
    assert arm_of(point, SWIFT).us == pytest.approx(48.8)
    assert launches.of_next_call() == OWN


def test_the_time_of_the_best_tile_decides_between_backends(launches: Launches) -> None:
    launches.us, launches.others_us = {SWIFT: 80.0}, 150.0

    (point,) = tune(launches).points

    assert point.order == ("triton", "eager"), "150 us with its own choice, 80 with another"
    assert point.us_before == 100.0


def test_tuning_again_gives_the_default_back(launches: Launches) -> None:
    launches.us = {SWIFT: 20.0}
    tune(launches)
    assert launches.of_next_call() == SWIFT

    launches.us = {SWIFT: 60.0}
    tune(launches)

    assert launches.of_next_call() == OWN


def off(out: torch.Tensor) -> None:
    out[:, -1] += 3 * out.abs().max()


def last_bit(out: torch.Tensor) -> None:
    out.view(torch.int16)[0, 0] ^= 1


@pytest.mark.parametrize(
    ("fault", "state", "reason"),
    [
        (off, "wrong", "from column 0 on, row"),
        (last_bit, "refused", "needs the bits of triton's own choice, found others"),
    ],
)
def test_a_tile_with_other_numbers_is_told_and_not_used(
    launches: Launches, fault: Fault, state: str, reason: str
) -> None:
    launches.us, launches.faults = {SWIFT: 20.0}, {SWIFT: fault}

    report = tune(launches)

    (point,) = report.points
    arm = arm_of(point, SWIFT)
    assert (arm.state, arm.us) == (state, None)
    assert reason in arm.reason
    assert report.wrong == (("triton 16x64, 4 warps, 6 stages",) if state == "wrong" else ())
    assert point.wrong == {}, "the backend itself is right"
    assert point.order == ("triton", "eager")
    assert dict(point.tiles) == {}
    launches.faults = {}
    assert launches.of_next_call() == OWN


def test_a_tile_that_raises_is_told_and_not_used(launches: Launches) -> None:
    def raises(_: torch.Tensor) -> None:
        raise RuntimeError("out of resources: shared memory")

    launches.us, launches.faults = {SWIFT: 20.0}, {SWIFT: raises}

    (point,) = tune(launches).points

    assert arm_of(point, SWIFT).state == "failed"
    assert "shared memory" in arm_of(point, SWIFT).reason
    assert dict(point.tiles) == {}
    assert point.order == ("triton", "eager")
    assert launches.of_next_call() == OWN


def test_a_lost_context_names_the_tile_and_what_to_leave_out(launches: Launches) -> None:
    def loses(_: torch.Tensor) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    launches.faults = {SWIFT: loses}

    with pytest.raises(BackendUnavailableError) as raised:
        tune(launches)

    said = str(raised.value)
    assert said.startswith("triton 16x64, 4 warps, 6 stages lost the CUDA context")
    assert said.endswith("with FP8DISPATCH_BACKEND=-triton")


def test_the_tiles_of_a_backend_that_is_wrong_are_not_timed(launches: Launches) -> None:
    launches.us, launches.faults = {SWIFT: 20.0}, {OWN: off}

    report = tune(launches)

    (point,) = report.points
    assert report.wrong == ("triton",)
    assert [arm.tile for arm in point.arms if arm.backend == "triton"] == [None]
    assert point.order == ("eager",)
    assert dict(point.tiles) == {}


def test_no_tile_is_timed_where_the_backend_is_refused(launches: Launches) -> None:
    (point,) = tune(launches, backends="-triton").points
    assert launches.seen == []
    assert {arm.backend for arm in point.arms} == {"eager"}


def test_a_tile_holds_for_its_bucket_weight_and_recipe(launches: Launches) -> None:
    launches.us = {SWIFT: 20.0}
    tune(launches)

    def used(rows: int, weight: torch.Tensor, scale: torch.Tensor) -> Tile:
        launches.seen.clear()
        x = torch.zeros(rows, weight.shape[1], dtype=torch.bfloat16)
        fp8dispatch.fp8_linear(x, weight, scale, backend="triton")
        (tile,) = launches.seen
        return tile

    assert [used(rows, WEIGHT, SCALE) for rows in (2, 4)] == [SWIFT] * 2
    assert SWIFT not in [used(rows, WEIGHT, SCALE) for rows in (1, 5, 17, 70)]
    assert used(M, *fp8dispatch.quantize(torch.randn(N, K), "row")) == OWN
    assert used(M, *fp8dispatch.quantize(torch.randn(N + 1, K))) == OWN


def test_batch_invariant_calls_and_the_variable_leave_tiles_alone(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    with use_backend("triton", batch_invariant=True):
        pinned = launches.of_next_call()
    launches.us = {SWIFT: 20.0}
    tune(launches)
    assert launches.of_next_call(backend="triton") == SWIFT

    with use_backend("triton", batch_invariant=True):
        assert launches.of_next_call() == pinned != SWIFT
        assert fp8dispatch.explain(X, WEIGHT, SCALE).problem.tile is None
    monkeypatch.setenv(policy.TUNED_VARIABLE, "0")
    policy.reload_environment()
    assert launches.of_next_call(backend="triton") == OWN
    monkeypatch.delenv(policy.TUNED_VARIABLE)
    policy.reload_environment()
    assert launches.of_next_call(backend="triton") == SWIFT


def test_a_stated_tile_never_reaches_a_batch_invariant_call(launches: Launches) -> None:
    """What tuning states for itself would change the order of summation on some GPU."""
    with use_backend("triton", batch_invariant=True):
        pinned = launches.of_next_call()
    token = policy.enter(policy.Statement(batch_invariant=True, tile=replace(pinned, num_stages=2)))
    try:
        assert launches.of_next_call(backend="triton") == pinned
    finally:
        policy.leave(token)


def test_the_warm_path_asks_for_no_tile(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches.us = {SWIFT: 20.0}
    tune(launches)
    assert launches.of_next_call() == SWIFT

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("a repeated call looked for a tile")

    monkeypatch.setattr(decide, "with_tile", asked)
    monkeypatch.setattr(orders, "find", asked)

    assert launches.of_next_call() == SWIFT


def test_what_is_settled_for_repeated_calls_knows_the_tile(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tile | None] = []

    def settled(weight: Any, static: Any, problem: Any, device: Any) -> None:
        asked.append(problem.tile)

    monkeypatch.setattr(registry.load("triton"), "settled", settled, raising=False)
    launches.us = {SWIFT: 20.0}
    tune(launches)
    asked.clear()

    launches.of_next_call()

    assert asked == [SWIFT]


def test_launches_that_are_ready_take_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8dispatch.backends.compute import triton as computed
    from fp8dispatch.kernels import ready_gemm, ready_quantize

    class Asked(Exception):
        pass

    def gemm_call(*arguments: Any) -> None:
        raise Asked(arguments[-1])

    data = torch.empty(M, K, dtype=torch.float8_e4m3fn)
    kept = (data, torch.ones(M, 2))
    monkeypatch.setattr(computed, "quantized_activations", lambda *_: kept)
    monkeypatch.setattr(ready_quantize, "repeat_quantize", lambda *_, **__: None)
    monkeypatch.setattr(ready_gemm, "gemm_call", gemm_call)
    fp8, recipe = "float8_e4m3fn", BLOCK_128
    problem = LinearProblem(M, N, K, recipe, fp8, fp8, "bfloat16", tile=SWIFT)

    with pytest.raises(Asked) as asked:
        computed._make_ready(problem, X, Weight(WEIGHT, SCALE, recipe, SCALE), None, None)

    assert asked.value.args == (SWIFT,)


def test_the_next_backend_gets_no_tile_of_one_that_fails(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches.us = {SWIFT: 20.0}
    tune(launches)
    launches.of_next_call()
    seen: list[Tile | None] = []
    eager = registry.load("eager")
    monkeypatch.setattr(
        eager,
        "fault",
        lambda out, x, weight, problem: (seen.append(problem.tile), out)[1],
        raising=False,
    )

    def raises(_: torch.Tensor) -> None:
        raise RuntimeError("no kernel image")

    launches.faults = {SWIFT: raises}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fp8dispatch.fp8_linear(X, WEIGHT, SCALE)

    assert seen == [None]
    assert ["triton failed on" in str(one.message) for one in said] == [True]


def test_the_command_shows_the_tile(
    launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(running, "default_timer", lambda _: launches.bench.timer)
    launches.us = {SWIFT: 20.0}
    wrong = Tile(16, 32, 4, 4)
    launches.faults = {wrong: off}

    code = cli.main(["tune", "--device", "cpu", "--shapes", f"{M},{N},{K}"])

    out = capsys.readouterr().out
    assert code == 4
    assert "triton 16x64, 4 warps, 6 stages" in out
    assert "triton 16x32, 4 warps, 4 stages, wrong: from column 0 on, row" in out
    row = next(line for line in out.splitlines() if "16x64" in line)
    assert [word for word in row.split() if word[0].isdigit()][-3:] == ["20.0", "100.0", "5.00"]
