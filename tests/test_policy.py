"""Who may say which backend runs, and who is heard first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fp8dispatch
from fp8dispatch import policy, registry
from fp8dispatch.errors import ConfigurationError, UnknownBackendError
from fp8dispatch.overrides import set_backend, use_backend
from fp8dispatch.policy import resolve
from fp8dispatch.problem import Accuracy

KNOWN = registry.NAMES


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    set_backend()
    policy.reload_environment()
    yield
    set_backend()
    policy.reload_environment()


def source(backend: str | None = None) -> tuple[tuple[str, ...], str]:
    said = resolve(backend, KNOWN)
    return said.only, said.source


def test_the_nearest_statement_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert source() == ((), "default")
    monkeypatch.setenv(policy.BACKEND_VARIABLE, "eager")
    policy.reload_environment()
    assert source() == (("eager",), policy.BACKEND_VARIABLE)
    set_backend("triton")
    assert source() == (("triton",), "set_backend")
    with use_backend("cublaslt,eager"):
        assert source() == (("cublaslt", "eager"), "use_backend")
        with use_backend("triton"):
            assert source() == (("triton",), "use_backend")
        assert source("eager") == (("eager",), "argument backend=")
        assert source() == (("cublaslt", "eager"), "use_backend")
    assert source() == (("triton",), "set_backend")
    set_backend()
    assert source() == (("eager",), policy.BACKEND_VARIABLE)


def test_accuracy_and_backends_are_stated_apart() -> None:
    set_backend(accuracy="fast")
    with use_backend("triton"):
        said = resolve(None, KNOWN)
        assert (said.only, said.accuracy) == (("triton",), Accuracy.FAST)
        with use_backend(accuracy="exact"):
            said = resolve(None, KNOWN)
            assert (said.only, said.accuracy) == (("triton",), Accuracy.EXACT)
    assert resolve("eager", KNOWN).accuracy is Accuracy.FAST


def test_an_error_in_the_block_ends_the_statement() -> None:
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert source() == ((), "default")


def test_as_a_decorator_it_holds_inside_only_and_nests() -> None:
    @use_backend("eager")
    def seen(depth: int) -> list[tuple[str, ...]]:
        here = [source()[0]]
        return here + seen(depth - 1) if depth else here

    assert seen(2) == [("eager",)] * 3
    assert source() == ((), "default")


def test_asynchronous_tasks_do_not_disturb_each_other() -> None:
    @use_backend("eager")
    async def decorated() -> tuple[str, ...]:
        await asyncio.sleep(0)
        return source()[0]

    async def stated(name: str) -> tuple[str, ...]:
        with use_backend(name):
            await asyncio.sleep(0)
            return source()[0]

    async def both() -> list[tuple[str, ...]]:
        return await asyncio.gather(stated("triton"), stated("eager"), decorated())

    assert asyncio.run(both()) == [("triton",), ("eager",), ("eager",)]


def test_threads_hear_the_process_but_not_each_others_blocks() -> None:
    heard: list[str] = []
    set_backend("eager")
    with use_backend("triton"):
        thread = threading.Thread(target=lambda: heard.append(source()[1]))
        thread.start()
        thread.join()
    assert heard == ["set_backend"]


def test_backward_keeps_the_policy_of_its_forward_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputation under checkpointing runs in backward, outside the block and on its thread."""
    ran: list[str] = []
    eager = registry.load("eager")
    monkeypatch.setattr(
        type(eager),
        "matmul",
        lambda self, x, weight, bias, problem: (
            ran.append(threading.current_thread().name),
            torch.zeros(problem.m, problem.n, dtype=torch.bfloat16),
        )[1],
    )
    weight, scale = fp8dispatch.quantize(torch.randn(32, 64))
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    with use_backend("eager"):
        out = fp8dispatch.fp8_linear(x, weight, scale)
    set_backend("-eager")
    out.sum().backward()
    assert ran, "the forward call ran eager"
    assert x.grad is not None


@pytest.mark.parametrize("text", ["nope", "eager,nope", "-nope", "", "  "])
def test_unknown_names_are_refused_where_they_are_stated(text: str) -> None:
    for state in (use_backend, set_backend):
        with pytest.raises(UnknownBackendError):
            state(text)


def test_an_unknown_accuracy_is_refused_where_it_is_stated() -> None:
    for state in (use_backend, set_backend):
        with pytest.raises(ConfigurationError, match="exact, fast, found 'sloppy'"):
            state(accuracy="sloppy")


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(policy.CACHE_VARIABLE, str(tmp_path / "here"))
    assert policy.cache_directory() == tmp_path / "here"
    monkeypatch.delenv(policy.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert policy.cache_directory() == tmp_path / "fp8dispatch"
