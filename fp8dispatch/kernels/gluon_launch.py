"""Launches of Gluon kernels that cost a few microseconds of Python instead of thirty.

Triton's own launch binds and specialises every argument anew and encodes every tensor map again
(measured on an H200: 21 us for a kernel with one tensor map, 42 us for a quantiser and a GEMM).
Here a `Kernel` is compiled once for everything that its caller puts into its key, and then
called through the C function that Triton generated for it; tensor maps are kept by what they
describe: address, shape and strides. A map says nothing else, so one that is found again is right
whatever lies at that address now; the weight's is encoded once, the activations' as often as the
allocator hands out new memory.

That C function is not public. It is used with the Triton releases of `DIRECT_TRITON` alone, and
on each device only after it has given a probe kernel its arguments right; everything else takes
Triton's plain launch, which is slower and otherwise the same. Launch hooks of Triton (profilers
that ask for them) are not called by direct launches.

Measured on the prototype: 5.0 us for a direct launch with a kept tensor map, of which the driver
has about 4; 1.0 us to encode one.

A kernel is compiled and loaded at its first call. That is refused while a CUDA graph is captured:
loading code is not allowed then, and would end the capture.
"""

from __future__ import annotations

import functools
import logging
import threading
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton

from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.kernels.gluon_compat import (
    TensorDescriptor,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    thread_barrier,
    tma_load,
)
from fp8dispatch.kernels.launch import FP_FUSION, on_device_of

DIRECT_TRITON = ((3, 6),)
"""Releases whose generated launcher was read: arguments, tensor maps and their order."""

_MOST_MAPS = 1024
_MOST_KERNELS = 4096
_PROBE = 128

_log = logging.getLogger("fp8dispatch")
_lock = threading.RLock()
_direct: dict[int, bool] = {}

# What a private function may raise when it is not what it was.
_UNFIT = (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError, OverflowError)

View = tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]
"""A tensor, and the shape and strides that a tensor map is to give its memory."""

Box = tuple[list[int], Any]
"""The block of one copy and its layout in shared memory."""


class Repeat:
    """A direct launch on one stream, ready but for a few addresses."""

    __slots__ = ("_arguments", "_launch", "_places")

    def __init__(
        self, launch: Callable[..., None], arguments: list[Any], places: tuple[int, ...]
    ) -> None:
        self._launch = launch
        self._arguments = arguments
        self._places = places

    def __call__(self, *addresses: int) -> None:
        """Launch with these addresses at the places that change."""
        arguments = self._arguments.copy()
        for place, address in zip(self._places, addresses, strict=True):
            arguments[place] = address
        self._launch(*arguments)


class Kernel:
    """One kernel, compiled for one device and one set of constants.

    Args:
        function: the kernel; its parameters are tensor maps first, one for each of `boxes`, then
            tensors and integers, then `constants` in their order.
        boxes: what each tensor map copies.
        constants: the constexpr parameters.
        warps: ``num_warps``.
        fusion: multiplications and additions may merge.

    The caller keeps kernels apart (`kernel_for`) by whatever Triton specialises on: dtypes, which
    arguments are None, the alignment of addresses to 16 bytes, and integers that are not exempt.
    """

    def __init__(
        self,
        function: Any,
        boxes: Sequence[Box],
        constants: dict[str, Any],
        warps: int,
        *,
        fusion: bool = True,
    ) -> None:
        self._function = function
        self._boxes = tuple(boxes)
        self._options = {**constants, "num_warps": warps, "enable_fp_fusion": fusion}
        self._blanks = (None,) * len(constants)  # slots of constants in the C function
        self._maps: tuple[dict[Hashable, tuple[Any, ...]], ...] = tuple({} for _ in boxes)
        self._meta: Sequence[Any] = ()
        self._head: tuple[Any, ...] = ()
        self._launch: Callable[..., None] | None = None
        self._ready = False

    def __call__(
        self, grid: tuple[int, int], views: Sequence[View], rest: Sequence[Any], device: int
    ) -> None:
        """Launch on the current stream of `device`, which must be the current device.

        Args:
            grid: programs along two axes.
            views: one for each box.
            rest: tensors, integers and None, in the order of the parameters.
            device: index of the device.

        Raises:
            BackendUnavailableError: the first call, while a CUDA graph is captured.
        """
        if not self._ready:
            self._compile(views, rest, device)
        launch = self._launch
        if launch is None:
            self._function[(*grid, 1)](*self._descriptors(views), *rest, **self._options)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        arguments = self._expanded(views, rest)
        launch(*grid, 1, stream, *self._head, *arguments, *self._blanks)

    def repeat(
        self,
        grid: tuple[int, int],
        views: Sequence[View],
        rest: Sequence[Any],
        device: int,
        changing: Sequence[int],
    ) -> Repeat | None:
        """The same launch again and again on the current stream, with a few new addresses.

        Args:
            grid, views, rest, device: as in a call; a call like it has been made.
            changing: places in `rest` of the tensors whose addresses change.

        Returns:
            None where launches are not direct.
        """
        if self._launch is None:
            return None
        stream = torch._C._cuda_getCurrentRawStream(device)
        before = [*grid, 1, stream, *self._head]
        arguments = [*before, *self._expanded(views, rest), *self._blanks]
        first = len(arguments) - len(self._blanks) - len(rest)
        return Repeat(self._launch, arguments, tuple(first + place for place in changing))

    def _expanded(self, views: Sequence[View], rest: Sequence[Any]) -> list[Any]:
        """Arguments as the C function takes them."""
        arguments: list[Any] = []
        for place, view in enumerate(views):
            tensor, shape, strides = view
            key = (tensor.data_ptr(), shape, strides)
            arguments += self._maps[place].get(key) or self._encode(place, key, view)
        for value in rest:
            arguments.append(value.data_ptr() if isinstance(value, torch.Tensor) else value)
        return arguments

    def _descriptors(self, views: Sequence[View]) -> list[TensorDescriptor]:
        return [
            TensorDescriptor(tensor, list(shape), list(strides), *box)
            for (tensor, shape, strides), box in zip(views, self._boxes, strict=True)
        ]

    def _encode(self, place: int, key: Hashable, view: View) -> tuple[Any, ...]:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        tensor, shape, strides = view
        descriptor = TensorDescriptor(tensor, list(shape), list(strides), *self._boxes[place])
        encoded = tuple(make_tensordesc_arg(descriptor, self._meta[place]))
        maps = self._maps[place]
        if len(maps) >= _MOST_MAPS:
            maps.clear()
        maps[key] = encoded
        return encoded

    def _compile(self, views: Sequence[View], rest: Sequence[Any], device: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise BackendUnavailableError(
                "gluon needs a call of this size before CUDA graph capture, found none: the first "
                "one compiles and loads its kernel; run the call once outside the graph"
            )
        with _lock:
            if self._ready:
                return
            if direct_launch(device):
                self._take_launcher(views, rest)
            self._ready = True

    def _take_launcher(self, views: Sequence[View], rest: Sequence[Any]) -> None:
        compiled = self._function.warmup(
            *self._descriptors(views), *rest, grid=(1,), **self._options
        )
        launcher = compiled.run  # loads the code
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return  # memory for each launch: Triton's own launch provides it
        self._meta = getattr(compiled.metadata, "tensordesc_meta", None) or ()
        cooperative, programmatic = False, False
        self._head = (
            compiled.function,
            cooperative,
            programmatic,
            None,
            None,
            compiled.packed_metadata,
            None,
            None,
            None,
        )
        self._launch = _c_function(launcher.launch)


_kernels: dict[Hashable, Kernel] = {}


def kernel_for(key: Hashable, make: Callable[[], Kernel]) -> Kernel:
    """The kernel kept under `key`, made where there is none."""
    kernel = _kernels.get(key)
    if kernel is None:
        with _lock:
            if len(_kernels) >= _MOST_KERNELS:
                _kernels.clear()
            kernel = _kernels.setdefault(key, make())
    return kernel


def launch(
    function: Any, programs: int, arguments: Sequence[Any], constants: dict[str, Any], warps: int
) -> None:
    """`plain_launch` as cheap as a Gluon kernel's; the first argument is a tensor."""
    kernel = plain_kernel(function, arguments, constants, warps)
    kernel((programs, 1), (), arguments, arguments[0].get_device())


def plain_kernel(
    function: Any, arguments: Sequence[Any], constants: dict[str, Any], warps: int
) -> Kernel:
    """The kernel for any of our Triton functions that takes no tensor maps."""
    exempt = _exempt_of(function)
    key = (
        arguments[0].get_device(),
        id(function),
        warps,
        *constants.values(),
        *[
            (value.dtype, value.data_ptr() % 16) if isinstance(value, torch.Tensor) else value
            for place, value in enumerate(arguments)
            if place not in exempt
        ],
    )
    return kernel_for(key, lambda: Kernel(function, (), constants, warps, fusion=FP_FUSION))


@functools.cache
def _exempt_of(function: Any) -> frozenset[int]:
    """Places of the integers that a kernel is not specialised on."""
    return frozenset(place for place, one in enumerate(function.params) if one.do_not_specialize)


def direct_launch(device: int) -> bool:
    """Whether kernels are launched directly on a device; tried once, with a synchronisation."""
    known = _direct.get(device)
    if known is None:
        with _lock:
            known = _direct.get(device)
            if known is None:
                known = _direct[device] = _try_direct(device)
    return known


def _try_direct(device: int) -> bool:
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    if version not in DIRECT_TRITON:
        return False
    where = torch.device("cuda", device)
    source = torch.arange(2 * _PROBE, dtype=torch.float32, device=where)
    added = torch.full((_PROBE,), 0.5, device=where)
    out = torch.full((_PROBE,), float("nan"), device=where)
    layout = gl.NVMMASharedLayout.get_default_for([1, _PROBE], gl.float32)
    kernel = Kernel(_probe, [([1, _PROBE], layout)], {"SIZE": _PROBE}, 4)
    try:
        with on_device_of(source):
            view = (source, (2, _PROBE), (_PROBE, 1))
            kernel._take_launcher([view], [added, None, out, 7])
            if kernel._launch is None:
                return False
            kernel._ready = True
            kernel((1, 1), [view], [added, None, out, 7], device)
            right = torch.equal(out, source[_PROBE:] + 7.5)
    except _UNFIT as error:
        _log.warning(
            "direct launches of Gluon kernels are off: %s: %s", type(error).__name__, error
        )
        return False
    if not right:
        _log.warning("direct launches of Gluon kernels are off: a probe got wrong arguments")
    return right


def _c_function(launch: Any) -> Callable[..., None]:
    """The C function below the Python closures that encode tensor maps on every call."""
    while not isinstance(launch, types.BuiltinFunctionType):
        cells = [cell.cell_contents for cell in launch.__closure__ or ()]
        launch = next(cell for cell in cells if isinstance(cell, types.BuiltinFunctionType))
    function: Callable[..., None] = launch
    return function


@gluon.jit(do_not_specialize=["number"])
def _probe(source, added, nothing, out, number, SIZE: gl.constexpr):
    """out = second row of source + added + number: every kind of argument that the kernels have."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    box = gl.allocate_shared_memory(gl.float32, [1, 1, SIZE], source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar.index(0), count=1)
    fence_async_shared()
    thread_barrier()
    mbarrier.expect(bar.index(0), SIZE * 4)
    tma_load(source, [1, 0], bar.index(0), box.index(0))
    mbarrier.wait(bar.index(0), 0)
    value = box.index(0).reshape([SIZE]).load(L)
    places = gl.arange(0, SIZE, L)
    if nothing is None:
        value += gl.load(added + places)
    gl.store(out + places, value + number)
