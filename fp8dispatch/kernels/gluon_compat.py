"""The names of Gluon that our kernels use, under one spelling for every Triton that has them.

Gluon is Triton's lower level, ``triton.experimental.gluon``: layouts, shared memory, barriers and
warp partitions are written out. Its names change from release to release; they change here alone.

| Triton | what is known |
|---|---|
| 3.6 | developed for it, and run on an H200 |
| 3.7, 3.8, 3.9 | compiled for sm_90 |
| before 3.6 | ``warp_specialize`` takes other arguments: refused |
| after 3.9 | unknown: refused |

`fp8dispatch.kernels.requirements.refuse_gluon` says so as plain data, without importing Triton; it
also refuses every GPU but capability 9.0 (the kernels multiply with Hopper's warp-group
instructions, which no other GPU has, Blackwell included) and Triton's interpreter, which knows no
Gluon. The portable kernels of `scaled_gemm` serve all of those.

What changed: the barrier of a partition is ``thread_barrier`` up to 3.6 and ``barrier`` later, TMA
copies are called loads and stores later, and ``reinterpret`` had an underscore up to 3.8.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin, shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""Synchronise the threads of the partition that calls it."""

if hasattr(tma, "async_load"):
    tma_load, tma_store = tma.async_load, tma.async_store
else:
    tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

tma_store_wait = tma.store_wait

if hasattr(shared_memory_descriptor, "reinterpret"):
    _REINTERPRET = shared_memory_descriptor.reinterpret
else:
    _REINTERPRET = shared_memory_descriptor._reinterpret


@builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):
    """The same shared memory seen with another dtype, shape and layout."""
    return _REINTERPRET(memory, dtype, shape, layout, _semantic=_semantic)


__all__ = [
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "reinterpret",
    "thread_barrier",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
