"""`direct_launch` for Gluon's kernels, whose tensor maps carry a layout of shared memory.

They are launched directly only where a probe of their own came out right.
"""

from __future__ import annotations

from fp8dispatch.kernels.direct_launch import (
    DIRECT_TRITON,
    Box,
    kernel_for,
    launch,
    passes_probe,
    plain_kernel,
    tried,
)
from fp8dispatch.kernels.direct_launch import Kernel as TritonKernel
from fp8dispatch.kernels.gluon_compat import (
    TensorDescriptor,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    thread_barrier,
    tma_load,
)
from fp8dispatch.kernels.repeat_launch import Repeat, View

__all__ = [
    "DIRECT_TRITON",
    "Box",
    "Kernel",
    "Repeat",
    "View",
    "direct_launch",
    "kernel_for",
    "launch",
    "plain_kernel",
]

_PROBE = 128


class Kernel(TritonKernel):
    """One Gluon kernel, compiled for one device and one set of constants; see `direct_launch`."""

    descriptor = TensorDescriptor

    def is_direct(self, device: int) -> bool:
        return direct_launch(device)


def direct_launch(device: int) -> bool:
    """Whether Gluon kernels are launched directly on a device; tried once, with a wait."""
    return tried((device, "gluon"), lambda: _try(device))


def _try(device: int) -> bool:
    layout = gl.NVMMASharedLayout.get_default_for([1, _PROBE], gl.float32)
    return passes_probe(Kernel(_probe, [([1, _PROBE], layout)], {"SIZE": _PROBE}, 4), device)


@gluon.jit(do_not_specialize=["number"])
def _probe(source, added, nothing, out, number, step, SIZE: gl.constexpr):
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
    places = gl.arange(0, SIZE, L) * step
    if nothing is None:
        value += gl.load(added + places)
    gl.store(out + places, value + number)
