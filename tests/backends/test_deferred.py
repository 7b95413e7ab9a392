"""Backends answer where no torch is, and compute by methods like any other."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
from typing import Any

import pytest

from fp8dispatch import registry
from fp8dispatch.backends.contract import Backend
from fp8dispatch.backends.deferred import computed_in

# Whatever a backend is asked before it computes, in a process where torch cannot be imported.
_ASK = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("torch", "triton"), name

sys.meta_path.insert(0, Blocker())
import fp8dispatch.backends, fp8dispatch.moe.backends
names = []
for room in (fp8dispatch.backends, fp8dispatch.moe.backends):
    for one in pkgutil.iter_modules(room.__path__):
        importlib.import_module(room.__name__ + "." + one.name)
        names.append(room.__name__ + "." + one.name)
from fp8dispatch import registry
from fp8dispatch.probes.gallery import NAMES, simulated
from fp8dispatch.problem import ExpertsProblem, LinearProblem
from fp8dispatch.recipe import BLOCK_128, ROW
for machine in map(simulated, NAMES):
    for recipe in (BLOCK_128, ROW):
        fp8 = "float8_e4m3fn"
        problem = LinearProblem(16, 4096, 7168, recipe, fp8, fp8, "bfloat16")
        for name in registry.NAMES:
            backend = registry.load(name)
            backend.refuse_machine(machine)
            backend.refuse_problem(problem, machine)
            backend.row_multiple(problem)
        problem = ExpertsProblem(16, 4096, 7168, recipe, fp8, fp8, "bfloat16", experts=8)
        for name in registry.NAMES:
            backend = registry.load_experts(name)
            backend.refuse_machine(machine)
            backend.refuse_problem(problem, machine)
print(*names)
"""

ROOMS = ("fp8dispatch.backends", "fp8dispatch.moe.backends")


def test_every_backend_answers_where_no_torch_is() -> None:
    ran = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    named = {*registry._MODULES.values(), *registry._EXPERT_MODULES.values()}
    rooms = {f"{room}.{one}" for room in ROOMS for one in ("contract", "compute")}
    assert named | rooms <= set(ran.stdout.split())


@pytest.mark.parametrize("name", registry.NAMES)
@pytest.mark.parametrize("method", ["linear", "matmul"])
def test_every_computation_is_where_it_is_announced(name: str, method: str) -> None:
    if name == "triton" and method == "matmul":
        pytest.importorskip("triton")
    parameters = {
        "linear": ["x", "weight", "bias", "activation_scale", "problem"],
        "matmul": ["x", "weight", "bias", "problem"],
    }

    found = getattr(registry.load(name), method)

    assert isinstance(found, types.MethodType)
    assert list(inspect.signature(found).parameters) == parameters[method]


@pytest.mark.parametrize("name", registry._EXPERT_MODULES)
def test_every_expert_matmul_is_where_it_is_announced(name: str) -> None:
    if name == "triton":
        pytest.importorskip("triton")

    found = registry.load_experts(name).experts

    assert isinstance(found, types.MethodType)
    assert list(inspect.signature(found).parameters) == [
        "x", "weights", "bias", "activation_scale", "routing", "problem",
    ]  # fmt: skip


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A module with a method `twice`, and who has imported it."""
    log: list[str] = []

    def twice(self: Any, number: int) -> int:
        return 2 * number + int(self.offset)

    def load(name: str) -> types.SimpleNamespace:
        log.append(name)
        return types.SimpleNamespace(twice=twice)

    monkeypatch.setattr("fp8dispatch.backends.deferred.import_module", load)
    return log


def announcing() -> Any:
    return type("Announcing", (), {"twice": computed_in("computing"), "offset": 1})


def test_first_use_imports_and_leaves_a_plain_method(imported: list[str]) -> None:
    cls = announcing()
    first, second = cls(), cls()
    assert imported == []

    assert first.twice(3) == 7

    assert inspect.isfunction(vars(cls)["twice"]), "no detour from now on"
    second.offset = 0
    assert (first.twice(number=3), second.twice(3), cls.twice(second, 4)) == (7, 6, 8)
    assert imported == ["computing"]
    assert vars(first) == {}, "an instance's own entry would hide what a subclass overrides"


def test_a_subclass_overrides_it_and_calls_it(imported: list[str]) -> None:
    cls = announcing()

    class More(cls):  # type: ignore[misc]
        def twice(self, number: int) -> int:
            return 100 + int(super().twice(number))

    for _ in range(2):
        assert (More().twice(1), cls().twice(1)) == (103, 3)
    assert imported == ["computing"]


def test_it_can_be_called_by_way_of_its_class(imported: list[str]) -> None:
    cls = announcing()

    assert cls.twice(cls(), 5) == 11
    assert inspect.isfunction(vars(cls)["twice"])


def test_announcing_imports_nothing_and_is_no_longer_abstract(imported: list[str]) -> None:
    class Announced(Backend):
        name = "announced"
        matmul = computed_in("computing")

    Announced()
    assert imported == []
    with pytest.raises(TypeError, match="abstract"):
        type("Silent", (Backend,), {"name": "silent"})()
