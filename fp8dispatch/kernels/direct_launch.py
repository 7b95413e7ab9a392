"""Launches of compiled kernels that cost a few microseconds of Python instead of thirty.

Triton's own launch binds and specialises every argument anew and encodes every tensor map again
(measured on an H200: 17 us for a kernel of twelve arguments, 21 us with one tensor map). Here a
`Kernel` is compiled once for everything that its caller puts into its key, and then called through
the C function that Triton generated for it; tensor maps are kept by what they describe: address,
shape and strides. A map says nothing else, so one that is found again is right whatever lies at
that address now; the weight's is encoded once, the activations' as often as the allocator hands out
new memory.

That C function is not public. It is used with the Triton releases of `DIRECT_TRITON` alone, and
on each device only after it has given a probe kernel its arguments right; everything else takes
Triton's plain launch, which is slower and otherwise the same. Launch hooks of Triton (profilers
that ask for them) are not called by direct launches.

A call that is made again and again is a `Repeat`: everything but one address is ready.

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
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.kernels.launch import FP_FUSION, on_device_of
from fp8dispatch.kernels.repeat_launch import MappedRepeat, Repeat, View

DIRECT_TRITON = ((3, 6),)
"""Releases whose generated launcher was read: arguments, tensor maps and their order."""

_MOST_MAPS = 1024
_MOST_KERNELS = 4096
_PROBE = 128

_log = logging.getLogger("fp8dispatch")
_lock = threading.RLock()
_direct: dict[Hashable, bool] = {}

# What a private function may raise when it is not what it was.
_UNFIT = (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError, OverflowError)

Box = tuple[Any, ...]
"""The block of one copy and, for Gluon, its layout in shared memory."""


class Kernel:
    """One kernel, compiled for one device and one set of constants.

    Args:
        function: the kernel; its parameters are tensor maps first, one for each of `boxes`, then
            tensors and integers, then `constants` in their order.
        boxes: what each tensor map copies.
        constants: the constexpr parameters.
        warps: ``num_warps``.
        fusion: multiplications and additions may merge.
        stages: ``num_stages``, where the kernel has a loop that Triton pipelines.

    The caller keeps kernels apart (`kernel_for`) by whatever Triton specialises on: dtypes, which
    arguments are None, the alignment of addresses to 16 bytes, and integers that are not exempt.
    """

    descriptor: Callable[..., Any] = TensorDescriptor
    """Makes what Triton's own launch takes for a tensor map."""

    def __init__(
        self,
        function: Any,
        boxes: Sequence[Box],
        constants: dict[str, Any],
        warps: int,
        *,
        fusion: bool = True,
        stages: int | None = None,
    ) -> None:
        self._function = function
        self._boxes = tuple(boxes)
        self._options = {**constants, "num_warps": warps, "enable_fp_fusion": fusion}
        if stages is not None:
            self._options["num_stages"] = stages
        self._blanks = (None,) * len(constants)  # slots of constants in the C function
        self._maps: tuple[dict[Hashable, tuple[Any, ...]], ...] = tuple({} for _ in boxes)
        self._meta: Sequence[Any] = ()
        self._heads: tuple[tuple[Any, ...], ...] = ()
        self._launch: Callable[..., None] | None = None
        self._ready = False

    def __call__(
        self,
        grid: tuple[int, int],
        views: Sequence[View],
        rest: Sequence[Any],
        device: int,
        *,
        programmatic: bool = False,
    ) -> None:
        """Launch on the current stream of `device`, which must be the current device.

        Args:
            grid: programs along two axes.
            views: one for each box.
            rest: tensors, integers and None, in the order of the parameters.
            device: index of the device.
            programmatic: the kernel may start before the one in front of it has ended, and waits
                for that end itself. Launches that are not direct are ordinary all the same.

        Raises:
            BackendUnavailableError: the first call, while a CUDA graph is captured.
        """
        if not self._ready:
            self.compile(views, rest, device)
        launch = self._launch
        if launch is None:
            self._function[(*grid, 1)](*self._descriptors(views), *rest, **self._options)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        arguments = self._expanded(views, rest)
        launch(*grid, 1, stream, *self._heads[programmatic], *arguments, *self._blanks)

    def repeat(
        self,
        grid: tuple[int, int],
        views: Sequence[View],
        rest: Sequence[Any],
        device: int,
        changing: int,
        *,
        programmatic: bool = False,
    ) -> Repeat | None:
        """The same launch again and again on the current stream, with one tensor in its place.

        Args:
            grid, views, rest, device, programmatic: as in a call.
            changing: place of the changing tensor, counted through `views` and `rest`.

        Returns:
            None where launches are not direct.

        Raises:
            BackendUnavailableError: it was never called, and a CUDA graph is captured.
        """
        if not self._ready:
            self.compile(views, rest, device)
        if self._launch is None:
            return None
        stream = torch._C._cuda_getCurrentRawStream(device)
        mapped = changing < len(views)
        cut = changing if mapped else changing - len(views)
        before = [*grid, 1, stream, *self._heads[programmatic]]
        if not mapped:
            before += self._expanded(views, rest[:cut])
            after = self._expanded((), rest[cut + 1 :])
            return Repeat(self._launch, before, [*after, *self._blanks])
        before += self._expanded(views[:cut], ())
        after = self._expanded(views[cut + 1 :], rest, cut + 1)
        return MappedRepeat(
            self._launch,
            before,
            [*after, *self._blanks],
            views[cut],
            self._maps[cut],
            functools.partial(self._encode, cut),
        )

    def is_direct(self, device: int) -> bool:
        """Whether this kind of kernel is launched directly on a device."""
        return direct_launch(device, tensor_maps=bool(self._boxes))

    def compile(self, views: Sequence[View], rest: Sequence[Any], device: int) -> None:
        """Load the kernel for calls like this one, or leave it to Triton's own launch."""
        if torch.cuda.is_current_stream_capturing():
            raise BackendUnavailableError(
                f"{self._function.__name__} needs a call of this size before CUDA graph capture, "
                f"found none: the first one compiles and loads it; run the call once outside the "
                f"graph"
            )
        with _lock:
            if self._ready:
                return
            if self.is_direct(device):
                self.take_launcher(views, rest)
            self._ready = True

    def take_launcher(self, views: Sequence[View], rest: Sequence[Any]) -> None:
        """Compile, load, and find the C function; leaves it out where a launch needs memory."""
        compiled = self._function.warmup(
            *self._descriptors(views), *rest, grid=(1,), **self._options
        )
        launcher = compiled.run  # loads the code
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return  # memory for each launch: Triton's own launch provides it
        self._meta = getattr(compiled.metadata, "tensordesc_meta", None) or ()
        cooperative, hooks = False, (None, None, None)
        self._heads = tuple(
            (
                compiled.function,
                cooperative,
                programmatic,
                None,
                None,
                compiled.packed_metadata,
                *hooks,
            )
            for programmatic in (False, True)
        )
        self._launch = _c_function(launcher.launch)
        self._ready = True

    @property
    def taken(self) -> bool:
        """The C function was found."""
        return self._launch is not None

    def _expanded(self, views: Sequence[View], rest: Sequence[Any], first: int = 0) -> list[Any]:
        """Arguments as the C function takes them; the views from the one at place `first` on."""
        arguments: list[Any] = []
        for place, view in enumerate(views, first):
            tensor, shape, strides = view
            key = (tensor.data_ptr(), shape, strides)
            arguments += self._maps[place].get(key) or self._encode(place, key, view)
        for value in rest:
            arguments.append(value.data_ptr() if isinstance(value, torch.Tensor) else value)
        return arguments

    def _descriptors(self, views: Sequence[View]) -> list[Any]:
        make = type(self).descriptor
        return [
            make(tensor, list(shape), list(strides), *box)
            for (tensor, shape, strides), box in zip(views, self._boxes, strict=True)
        ]

    def _encode(self, place: int, key: Hashable, view: View) -> tuple[Any, ...]:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        tensor, shape, strides = view
        box = self._boxes[place]
        descriptor = type(self).descriptor(tensor, list(shape), list(strides), *box)
        encoded = tuple(make_tensordesc_arg(descriptor, self._meta[place]))
        maps = self._maps[place]
        if len(maps) >= _MOST_MAPS:
            maps.clear()
        maps[key] = encoded
        return encoded


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
    """`plain_launch` as cheap as it gets; the first argument is a tensor."""
    kernel = plain_kernel(function, arguments, constants, warps)
    kernel((programs, 1), (), arguments, arguments[0].get_device())


def plain_kernel(
    function: Any, arguments: Sequence[Any], constants: dict[str, Any], warps: int
) -> Kernel:
    """The kernel for any of our Triton functions that takes no tensor maps."""
    key = (arguments[0].get_device(), id(function), warps, *constants.values())
    key += specialised(function, arguments, 0)
    return kernel_for(key, lambda: Kernel(function, (), constants, warps, fusion=FP_FUSION))


def specialised(function: Any, arguments: Sequence[Any], first: int) -> tuple[Hashable, ...]:
    """What Triton compiles a kernel anew for among its arguments from parameter `first` on."""
    exempt = _exempt_of(function)
    return tuple(
        (value.dtype, value.data_ptr() % 16) if isinstance(value, torch.Tensor) else value
        for place, value in enumerate(arguments, first)
        if place not in exempt
    )


@functools.cache
def _exempt_of(function: Any) -> frozenset[int]:
    """Places of the integers that a kernel is not specialised on."""
    return frozenset(place for place, one in enumerate(function.params) if one.do_not_specialize)


def direct_launch(device: int, *, tensor_maps: bool) -> bool:
    """Whether Triton's kernels are launched directly on a device; a synchronising test, once."""
    return tried((device, tensor_maps), lambda: _try_portable(device, tensor_maps))


def tried(key: Hashable, test: Callable[[], bool]) -> bool:
    """What a test of direct launches found, once for each key; said in the log where it fails."""
    known = _direct.get(key)
    if known is None:
        with _lock:
            known = _direct.get(key)
            if known is None:
                known = _direct[key] = is_read() and _passes(test)
    return known


def is_read() -> bool:
    """Whether the installed Triton is one whose launcher is known."""
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return version in DIRECT_TRITON and torch.version.hip is None


def _passes(test: Callable[[], bool]) -> bool:
    try:
        right = test()
    except _UNFIT as error:
        _log.warning("direct launches of kernels are off: %s: %s", type(error).__name__, error)
        return False
    if not right:
        _log.warning("direct launches of kernels are off: a probe got wrong arguments")
    return right


def _try_portable(device: int, tensor_maps: bool) -> bool:
    boxes: tuple[Box, ...] = (([1, _PROBE],),) if tensor_maps else ()
    constants = {"SIZE": _PROBE}
    kernel = Kernel(_probe_mapped if tensor_maps else _probe, boxes, constants, 4)
    return passes_probe(kernel, device)


def passes_probe(kernel: Kernel, device: int) -> bool:
    """Whether a kernel computes out = row of `source` + `added` + `number`, launched directly.

    Its arguments are of every kind that our kernels have: ``(source,) added, None, out, number, 1``
    of which the last is specialised; a tensor map shows two rows of `source`, and the kernel takes
    the second.
    """
    where = torch.device("cuda", device)
    source = torch.arange(2 * _PROBE, dtype=torch.float32, device=where)
    added = torch.full((_PROBE,), 0.5, device=where)
    views = [(source, (2, _PROBE), (_PROBE, 1))] if kernel._boxes else []
    expected = (source[_PROBE:] if views else 0) + added + 7
    with on_device_of(source):
        out = torch.full((_PROBE,), float("nan"), device=where)
        rest = [added, None, out, 7, 1]
        kernel.take_launcher(views, rest)
        if not kernel.taken:
            return False
        kernel((1, 1), views, rest, device)
        again = torch.full_like(out, float("nan"))
        repeat = kernel.repeat((1, 1), views, rest, device, len(views) + 2)
        if repeat is None:
            return False
        repeat(again)
        return torch.equal(out, expected) and torch.equal(again, expected)


@triton.jit(do_not_specialize=["number"])
def _probe(added, nothing, out, number, step, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE) * step
    if nothing is None:
        tl.store(out + places, tl.load(added + places) + number)


@triton.jit(do_not_specialize=["number"])
def _probe_mapped(source, added, nothing, out, number, step, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE) * step
    if nothing is None:
        row = tl.reshape(source.load([1, 0]), (SIZE,))
        tl.store(out + places, row + tl.load(added + places) + number)


def _c_function(launch: Any) -> Callable[..., None]:
    """The C function below the Python closures that encode tensor maps on every call."""
    while not isinstance(launch, types.BuiltinFunctionType):
        cells = [cell.cell_contents for cell in launch.__closure__ or ()]
        launch = next(cell for cell in cells if isinstance(cell, types.BuiltinFunctionType))
    function: Callable[..., None] = launch
    return function
