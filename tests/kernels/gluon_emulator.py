"""Runs the Hopper kernels on the CPU: what Gluon's names mean, in torch, one block at a time.

Triton's interpreter knows no Gluon. Here the Python functions of the kernels run as they stand,
with Gluon's names replaced: a tile is a tensor, a layout is nothing, a tensor map copies a box with
zeros beyond its edges, a pointer is a storage and offsets that are checked. The partitions of a
warp-specialised kernel are threads, and mbarriers block as the hardware's do, by arrivals, bytes
and the parity of their phase; a kernel that would hang raises. A product is computed when it is
waited for, so a buffer that is released too early gives wrong numbers. Memory starts as NaN.

What this does not show: layouts, registers, the memory model, and whatever the compiler does.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

HANGS_AFTER_S = 30.0


class Dtype:
    """One of Gluon's element types."""

    def __init__(self, of_torch: torch.dtype) -> None:
        self.torch = of_torch
        self.primitive_bitwidth = of_torch.itemsize * 8


_NAMES = {
    "float8e4nv": torch.float8_e4m3fn,
    "float8e5": torch.float8_e5m2,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
}
DTYPES = {of_torch: Dtype(of_torch) for of_torch in _NAMES.values()}


class Tile(torch.Tensor):
    """A value in registers: assignments such as ``+=`` make a new one."""

    def to(self, dtype: Dtype) -> Tile:  # type: ignore[override]
        return tile(torch.Tensor.to(self, dtype.torch))

    def __iadd__(self, other: Any) -> Tile:  # type: ignore[override, misc]
        return self + other  # type: ignore[return-value]

    def __imul__(self, other: Any) -> Tile:  # type: ignore[override, misc]
        return self * other  # type: ignore[return-value]


def tile(value: Any) -> Tile:
    return torch.as_tensor(value).as_subclass(Tile)


class Pointer:
    """Addresses in one tensor's memory."""

    def __init__(self, memory: torch.Tensor, offsets: Any = 0) -> None:
        self.memory, self.offsets = memory, torch.as_tensor(offsets)
        self.dtype = SimpleNamespace(element_ty=DTYPES[memory.dtype])

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + torch.as_tensor(offsets))

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets, and which of them are used, all of those inside of the memory."""
        used = torch.ones_like(self.offsets, dtype=torch.bool)
        used = used if mask is None else used & torch.as_tensor(mask)
        offsets = self.offsets.expand(used.shape)
        inside = (offsets >= 0) & (offsets < self.memory.numel())
        assert bool((inside | ~used).all()), "an access outside of the tensor"
        return offsets.long(), used


class Descriptor:
    """A tensor map: a box of a tensor's memory at a time."""

    def __init__(self, view: Any, block: list[int], layout: object) -> None:
        tensor, shape, strides = view
        assert tensor.data_ptr() % 16 == 0
        assert all(stride * tensor.itemsize % 16 == 0 for stride in strides[:-1])
        assert strides[-1] == 1 and max(block) <= 256
        self.whole = tensor.as_strided(shape, strides)  # raises beyond the storage
        self.block, self.layout, self.dtype = tuple(block), layout, DTYPES[tensor.dtype]

    def overlap(self, place: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the tensor under a box, and of the box over the tensor."""
        outer, inner = [], []
        # An H200 stops with an illegal instruction (2026-11, fp32 boxes at columns 3 and 101).
        step = self.whole.itemsize
        assert int(place[-1]) * step % 16 == 0, f"TMA at {int(place[-1]) * step} bytes of a row"
        for start, size, whole in zip(map(int, place), self.block, self.whole.shape, strict=True):
            first, last = max(start, 0), max(min(start + size, whole), max(start, 0))
            outer.append(slice(first, last))
            inner.append(slice(first - start, last - start))
        return tuple(outer), tuple(inner)


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.arrived = self.missing = self.phase = 0
        self.changed = threading.Condition()

    def update(self, arrivals: int, missing: int) -> None:
        with self.changed:
            self.arrived += arrivals
            self.missing += missing
            if self.arrived == self.count and self.missing == 0:
                self.arrived, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase % 2 != parity, HANGS_AFTER_S)
        assert done, "the kernel hangs"


class Barriers:
    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, place: Any) -> Barrier:
        return self.all[int(place)]


class Shared:
    """A buffer in shared memory, or a part of one."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory

    @property
    def shape(self) -> torch.Size:
        return self.memory.shape

    def index(self, place: Any) -> Shared:
        assert 0 <= int(place) < self.memory.shape[0]
        return Shared(self.memory[int(place)])

    def slice(self, start: int, length: int, dim: int) -> Shared:
        assert start + length <= self.memory.shape[dim]
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.memory.permute(order))

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.memory.view(shape))

    def load(self, layout: object) -> Tile:
        return tile(self.memory.clone())

    def store(self, value: torch.Tensor) -> None:
        assert value.shape == self.memory.shape and value.dtype == self.memory.dtype
        self.memory.copy_(value)


class Product:
    """A multiplication under way: its operands in shared memory are read when it ends."""

    def __init__(self, a: Shared | Tile, b: Shared, acc: torch.Tensor | None) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.value: Tile | None = None

    def finish(self) -> None:
        a = self.a.memory if isinstance(self.a, Shared) else self.a
        product = torch.Tensor.double(a) @ self.b.memory.double()
        self.value = tile((product if self.acc is None else product + self.acc).float())


class Program(threading.local):
    """Where a thread is: the program's place in the grid, and its products under way."""

    place: tuple[int, int] = (0, 0)
    grid: tuple[int, int] = (1, 1)
    warps = 4

    def __init__(self) -> None:
        self.products: list[Product] = []


_program = Program()
_atomics = threading.Lock()


def _poisoned(dtype: Dtype, shape: list[int]) -> Shared:
    if dtype.primitive_bitwidth == 8:
        return Shared(torch.full(shape, 0x7F, dtype=torch.uint8).view(dtype.torch))
    return Shared(torch.full(shape, math.nan, dtype=dtype.torch))


def _allocate(dtype: Dtype, shape: list[int], layout: object) -> Shared | Barriers:
    return Barriers(shape[0]) if layout == "mbarriers" else _poisoned(dtype, shape)


def _load(place: Pointer, mask: Any = None, other: float = 0.0, cache_modifier: str = "") -> Tile:
    offsets, used = place.places(mask)
    found = place.memory[offsets.clamp(0, place.memory.numel() - 1)]
    return tile(torch.where(used, found, torch.tensor(other, dtype=found.dtype)))


def _store(place: Pointer, value: Any, mask: Any = None) -> None:
    offsets, used = place.places(mask)
    whole = torch.Tensor.to(torch.as_tensor(value), place.memory.dtype).expand(offsets.shape)
    place.memory[offsets[used]] = whole[used]


def _atomic_add(place: Pointer, value: int, sem: str, scope: str) -> Tile:
    with _atomics:
        before = place.memory[place.offsets].clone()
        place.memory[place.offsets] += value
    return tile(before)


def _asm(code: Any, constraints: str, arguments: list[Any], dtype: Any, *_: Any) -> Any:
    code = getattr(code, "value", code)  # of a constexpr
    if "e4m3x2" in code:  # two codes in 16 bits, each times the same scale
        codes, scale = arguments
        halves = codes.contiguous().unsqueeze(-1).view(torch.float8_e4m3fn).unbind(-1)
        return tuple(
            tile(torch.Tensor.to(half.float() * scale, kind.torch))
            for half, kind in zip(halves, dtype, strict=True)
        )
    return tile(random.randrange(32)) if "%laneid" in code else arguments[0]


def _tma_load(source: Descriptor, place: Any, bar: Barrier, to: Shared, pred: Any = True) -> None:
    if not pred:
        return
    assert tuple(to.memory.shape) == source.block
    outer, inner = source.overlap(place)
    to.memory.zero_()
    to.memory[inner] = source.whole[outer]
    bar.update(0, -to.memory.numel() * to.memory.itemsize)


def _tma_store(target: Descriptor, place: Any, source: Shared) -> None:
    assert tuple(source.memory.shape) == target.block
    outer, inner = target.overlap(place)
    target.whole[outer] = source.memory[inner]


def _mma(a: Shared | Tile, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool) -> Product:
    assert is_async
    made = Product(a, b, acc if use_acc else None)
    _program.products.append(made)
    return made


def _mma_wait(outstanding: int, deps: list[Any]) -> Any:
    while len(_program.products) > outstanding:
        _program.products.pop(0).finish()
    waited = tuple(dep.value if isinstance(dep, Product) else dep for dep in deps)
    assert all(one is not None for one in waited), "a product is used before it is waited for"
    return waited if len(waited) > 1 else waited[0]


def _specialize(parts: list[Any], warps: list[int], registers: list[int]) -> None:
    place, grid = _program.place, _program.grid
    raised: list[BaseException] = []

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _program.place, _program.grid = place, grid
        try:
            function(*arguments)
        except BaseException as error:  # noqa: BLE001  # raised again by the kernel's own thread
            raised.append(error)

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def _where(condition: Any, one: Any, other: Any) -> Any:
    if isinstance(one, Pointer):
        return Pointer(one.memory, _where(condition, one.offsets, other.offsets))
    return tile(torch.where(*map(torch.as_tensor, (condition, one, other))))


def _range(*bounds: Any) -> Iterator[Tile]:
    return map(tile, range(*map(int, bounds)))


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _gluon() -> SimpleNamespace:
    layouts = (
        "NVMMADistributedLayout", "SliceLayout", "BlockedLayout", "NVMMASharedLayout",
        "SwizzledSharedLayout", "DotOperandLayout",
    )  # fmt: skip

    def both(function: Callable[..., torch.Tensor]) -> Callable[..., Tile]:
        return lambda *values: tile(function(*map(torch.as_tensor, values)))

    return SimpleNamespace(
        **{name: DTYPES[of_torch] for name, of_torch in _NAMES.items()},
        **dict.fromkeys(layouts, _nothing),
        program_id=lambda axis: tile(_program.place[axis]),
        num_programs=lambda axis: tile(_program.grid[axis]),
        num_warps=lambda: _program.warps,
        static_range=range,
        cdiv=lambda a, b: tile(-(-a // b)),
        minimum=both(torch.minimum),
        maximum=both(torch.maximum),
        where=_where,
        zeros=lambda shape, dtype, layout: tile(torch.zeros(shape, dtype=dtype.torch)),
        full=lambda shape, value, dtype, layout: tile(
            torch.as_tensor(value, dtype=dtype.torch).expand(shape)
        ),
        broadcast=lambda one, other: tuple(map(tile, torch.broadcast_tensors(one, other))),
        join=lambda one, other: tile(torch.stack((one, other), -1)),
        arange=lambda first, end, layout: tile(torch.arange(first, end, dtype=torch.int32)),
        expand_dims=lambda value, dim: tile(value.unsqueeze(dim)),
        reshape=lambda value, shape: tile(value.reshape(shape)),
        permute=lambda value, order: tile(value.permute(order)),
        split=lambda value: tuple(map(tile, value.unbind(-1))),
        to_tensor=tile,
        load=_load,
        store=_store,
        atomic_add=_atomic_add,
        inline_asm_elementwise=_asm,
        allocate_shared_memory=_allocate,
        warp_specialize=_specialize,
    )


def names() -> dict[str, Any]:
    """What stands for Gluon's names in the kernels' modules."""

    def init(bar: Barrier, count: int) -> None:
        bar.count = count

    def expect(bar: Barrier, size: int, pred: Any = True) -> None:
        if pred:
            bar.update(1, size)

    def arrive(bar: Barrier, pred: Any = True) -> None:
        if pred:
            bar.update(1, 0)

    def wait(bar: Barrier, phase: Any, pred: Any = True) -> None:
        if pred:
            bar.wait(int(phase))

    return {
        "gl": _gluon(),
        "range": _range,
        "mbarrier": SimpleNamespace(
            init=init, expect=expect, arrive=arrive, wait=wait, MBarrierLayout=lambda: "mbarriers"
        ),
        "tma_load": _tma_load,
        "tma_store": _tma_store,
        "tma_store_wait": _nothing,
        "fence_async_shared": _nothing,
        "thread_barrier": _nothing,
        "wait_for_prerequisites": _nothing,
        "warpgroup_mma": _mma,
        "warpgroup_mma_wait": _mma_wait,
        "reinterpret": lambda memory, dtype, shape, layout: Shared(
            memory.memory.view(dtype.torch).view(shape)
        ),
    }


def replacements(modules: list[ModuleType]) -> Iterator[tuple[ModuleType, str, Any]]:
    """What to put where, so that the functions of these modules are plain Python over `names`."""
    from triton.runtime.jit import JITFunction

    for module in modules:
        for name, stand_in in names().items():
            if name == "range" or hasattr(module, name):
                yield module, name, stand_in
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                yield module, name, value.fn


def run(kernel: Any, grid: tuple[int, int], views: Any, rest: Any, device: int, **_: Any) -> None:
    """`Kernel.__call__`: every program of the grid, in any order."""
    constants = dict(kernel._options)
    constants.pop("enable_fp_fusion")
    _program.warps, _program.grid = constants.pop("num_warps"), grid
    programs = list(itertools.product(*map(range, grid)))
    random.shuffle(programs)
    for place in programs:
        _program.place = place
        descriptors = [
            Descriptor(view, *box) for view, box in zip(views, kernel._boxes, strict=True)
        ]
        arguments = [
            Pointer(one.as_strided((_reach(one),), (1,))) if isinstance(one, torch.Tensor)
            else one if one is None else tile(one)
            for one in rest
        ]  # fmt: skip
        kernel._function.fn(*descriptors, *arguments, **constants)


def _reach(tensor: torch.Tensor) -> int:
    """Elements from the first of a tensor to its last in memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)
