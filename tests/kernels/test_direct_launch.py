"""A launch that is ready gives the C function what a plain call gives it, with the new tensor."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which exists for Linux"
)

STREAM = 77
BLANKS = (None, None)


def made(boxes: int) -> tuple[Any, list[tuple[Any, ...]]]:
    """A kernel whose C function writes down its arguments, and what it wrote."""
    from fp8dispatch.kernels.direct_launch import Kernel

    told: list[tuple[Any, ...]] = []

    class Written(Kernel):
        encoded = 0

        def take_launcher(self, views: Any, rest: Any) -> None:
            head = ("function", False, "cooperative")
            self._heads = tuple((*head, programmatic) for programmatic in (False, True))
            self._launch = lambda *arguments: told.append(arguments)
            self._ready = True

        def is_direct(self, device: int) -> bool:
            return True

        def _encode(self, place: int, key: Any, view: Any) -> tuple[Any, ...]:
            self.encoded += 1
            self._maps[place][key] = found = (f"map {place} of {key[0]}", *key[1], *key[2])
            return found

    return Written(None, [()] * boxes, {"A": 1, "B": 2}, 4), told


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@given(
    boxes=st.integers(0, 3),
    rest=st.lists(st.sampled_from(["tensor", "none", "number"]), min_size=1, max_size=6),
    programmatic=st.booleans(),
    data=st.data(),
)
def test_a_repeat_is_the_call_with_another_tensor(
    boxes: int, rest: list[str], programmatic: bool, data: st.DataObject
) -> None:
    kernel, told = made(boxes)
    values = [{"tensor": torch.empty(3), "none": None, "number": 5}[kind] for kind in rest]
    values = [torch.empty(3) if isinstance(one, torch.Tensor) else one for one in values]
    views = [(torch.empty(4, 2), (4, 2), (2, 1)) for _ in range(boxes)]
    places = [*range(boxes), *(boxes + i for i, kind in enumerate(rest) if kind == "tensor")]
    if not places:
        return
    changing = data.draw(st.sampled_from(places))

    repeat = kernel.repeat((7, 2), views, values, 0, changing, programmatic=programmatic)
    for other in (torch.empty(4, 2), torch.empty(4, 2)):
        told.clear()
        repeat(other)
        repeat(other)
        if changing < boxes:
            views[changing] = (other, *views[changing][1:])
        else:
            values[changing - boxes] = other
        kernel((7, 2), views, values, 0, programmatic=programmatic)
        assert told[0] == told[1] == told[2]
        assert told[0][:4] == (7, 2, 1, STREAM)
        assert told[0][7] is programmatic
        assert told[0][-2:] == BLANKS
        assert len(told[0]) == 8 + 5 * boxes + len(rest) + 2


def test_a_map_is_encoded_once_for_each_address() -> None:
    kernel, told = made(1)
    first, second = torch.empty(4, 2), torch.empty(4, 2)
    kernel((1, 1), [(first, (4, 2), (2, 1))], [3], 0)
    repeat = kernel.repeat((1, 1), [(first, (4, 2), (2, 1))], [3], 0, 0)
    for tensor in (first, second, first, second, second):
        repeat(tensor)
    assert kernel.encoded == 2
    assert [arguments[8] for arguments in told[1:]] == [
        f"map 0 of {tensor.data_ptr()}" for tensor in (first, second, first, second, second)
    ]


def test_only_a_triton_whose_launcher_was_read_is_launched_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fp8dispatch.kernels import direct_launch

    monkeypatch.setattr(direct_launch, "_direct", {})
    monkeypatch.setattr(direct_launch.triton, "__version__", "3.5.1")
    assert not direct_launch.tried("old", lambda: True)
    monkeypatch.setattr(direct_launch.triton, "__version__", "3.6.0")
    assert direct_launch.tried("right", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert not direct_launch.tried("rocm", lambda: True)


def test_a_probe_that_fails_turns_direct_launches_off_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fp8dispatch.kernels import direct_launch

    asked: list[int] = []

    def broken() -> bool:
        asked.append(1)
        raise TypeError("function takes exactly 30 arguments")

    monkeypatch.setattr(direct_launch, "_direct", {})
    monkeypatch.setattr(direct_launch.triton, "__version__", "3.6.0")
    with caplog.at_level("WARNING", "fp8dispatch"):
        assert not direct_launch.tried("a", broken)
        assert not direct_launch.tried("a", broken)
        assert not direct_launch.tried("b", lambda: False)
    assert len(asked) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "direct launches of kernels are off: TypeError: function takes exactly 30 arguments",
        "direct launches of kernels are off: a probe got wrong arguments",
    ]


def test_what_triton_compiles_anew_for_is_told_apart() -> None:
    from fp8dispatch.kernels.direct_launch import specialised

    class Parameter:
        def __init__(self, exempt: bool) -> None:
            self.do_not_specialize = exempt

    class Function:
        """Two tensor maps, two tensors, a number that is exempt, and one that is not."""

        params = tuple(Parameter(exempt) for exempt in (False, False, False, False, True, False))

    x, odd = torch.empty(64), torch.empty(65)[1:]

    def key(*arguments: Any) -> Any:
        return specialised(Function, arguments, 2)

    assert key(x, x, 5, 64) == key(torch.empty(9), x, 6, 64)
    for changed in ((odd, x, 5, 64), (x.double(), x, 5, 64), (x, None, 5, 64), (x, x, 5, 65)):
        assert key(*changed) != key(x, x, 5, 64)
