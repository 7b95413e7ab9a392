"""Operators with the schemas of FBGEMM's and MSLK's, which read memory in the documented layout.

Like the real ones they check little; a call that would lose the CUDA context raises `ContextLost`,
which no test expects.
"""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from fp8dispatch.backends.fbgemm_family import FbgemmFamily

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

ROWWISE = (
    "f8f8bf16_rowwise(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, Tensor? bias=None, "
    "bool use_fast_accum=True) -> Tensor"
)
GROUPWISE = "f8f8bf16_groupwise(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale) -> Tensor"
BLOCKWISE = (
    "f8f8bf16_blockwise(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, int block_m=128, "
    "int block_n=128, int block_k=128) -> Tensor"
)


class ContextLost(BaseException):
    """What the real library does to the process here; not to be caught by anything."""


class Calls:
    """What the operators were called with, and whether on the tensor's device."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fast: list[bool] = []
        self.bias_dtypes: list[torch.dtype | None] = []
        self.guarded = False

    def enter(self, name: str, *tensors: torch.Tensor) -> None:
        """Record a call and what every call needs."""
        self.names.append(name)
        if not self.guarded or any(tensor.data_ptr() % 16 for tensor in tensors):
            raise ContextLost(name)
        if any(t.dim() == 2 and t.stride() != (t.shape[1], 1) for t in tensors[:2]):
            raise RuntimeError("rows must be side by side")
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise RuntimeError("must be contiguous")  # the one thing that they check


CALLS = Calls()


def _rowwise(
    xq: torch.Tensor,
    wq: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    use_fast_accum: bool = True,
) -> torch.Tensor:
    m, n = xq.shape[0], wq.shape[0]
    CALLS.enter("rowwise", xq, wq, x_scale, w_scale, *([] if bias is None else [bias]))
    CALLS.fast.append(use_fast_accum)
    CALLS.bias_dtypes.append(None if bias is None else bias.dtype)
    if x_scale.numel() != m or w_scale.numel() != n or xq.shape[1] % 16 or n % 8:
        raise ContextLost("rowwise")
    out = (xq.float().double() * x_scale.view(m, 1)) @ (
        wq.float().double() * w_scale.view(n, 1)
    ).t()
    if bias is not None:
        assert bias.dtype in (torch.bfloat16, torch.float32)
        out = out.to(bias.dtype).double() + bias.double()  # as the kernel's epilogue does
    return out.to(torch.bfloat16)


def _groupwise(
    xq: torch.Tensor, wq: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor
) -> torch.Tensor:
    (m, k), n = xq.shape, wq.shape[0]
    CALLS.enter("groupwise", xq, wq, x_scale, w_scale)
    groups, blocks = -(-k // 128), -(-n // 128)
    if m % 4 or k % 16 or n % 8 or x_scale.numel() != groups * m:
        raise ContextLost("groupwise")
    # Memory as it is read, whatever the shapes say: M fastest for X, N fastest for W.
    x_memory = x_scale.flatten().as_strided((m, groups), (1, m)).double()
    w_memory = w_scale.flatten().as_strided((blocks, groups), (1, blocks)).double()
    group_of, block_of = torch.arange(k) // 128, torch.arange(n) // 128
    wide_x = xq.float().double() * x_memory[:, group_of]
    wide_w = wq.float().double() * w_memory[block_of][:, group_of]
    return (wide_x @ wide_w.t()).to(torch.bfloat16)


def _blockwise(
    xq: torch.Tensor,
    wq: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    block_m: int = 128,
    block_n: int = 128,
    block_k: int = 128,
) -> torch.Tensor:
    (m, k), n = xq.shape, wq.shape[0]
    CALLS.enter("blockwise", xq, wq, x_scale, w_scale)
    # Unlike the others this one looks at what it is given.
    for data, scale in ((xq, x_scale), (wq, w_scale)):
        if (data.dtype, scale.dtype) != (torch.float8_e4m3fn, torch.float32):
            raise RuntimeError("dtypes")
        if scale.shape != (-(-data.shape[0] // 128), -(-k // 128)):
            raise RuntimeError("scales must be [ceil(rows / 128), ceil(K / 128)]")
    if wq.shape[1] != k or (block_m, block_n, block_k) != (128, 128, 128):
        raise RuntimeError("blocks must be 128x128x128")
    if k % 16 or n % 8:
        raise RuntimeError("cutlass cannot implement")
    row_of, group_of, block_of = (torch.arange(size) // 128 for size in (m, k, n))
    wide_x = xq.float().double() * x_scale.double()[row_of][:, group_of]
    wide_w = wq.float().double() * w_scale.double()[block_of][:, group_of]
    return (wide_x @ wide_w.t()).to(torch.bfloat16)


_libraries: list[torch.library.Library] = []


def define(namespace: str, *, groupwise: bool = True, cuda: bool = True) -> None:
    """Register the operators for CPU tensors, and as CUDA kernels so that they count as real."""
    if torch._C._dispatch_has_kernel(f"{namespace}::f8f8bf16_rowwise"):
        return
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)  # operators live as long as their library
    operators = ((ROWWISE, _rowwise), (GROUPWISE, _groupwise), (BLOCKWISE, _blockwise))
    for schema, function in operators:
        if function is _groupwise and not groupwise:
            continue
        library.define(schema)
        for key in ("CPU", "CUDA") if cuda else ("CPU",):
            library.impl(schema.partition("(")[0], function, key)


def plant(
    base: type[FbgemmFamily], monkeypatch: pytest.MonkeyPatch, **operators: bool
) -> FbgemmFamily:
    """The backend over a fake library of its own, which is importable and registers operators."""
    suffix = "".join(f"_{name}_{value}" for name, value in operators.items()).lower()
    namespace = f"fp8dispatch_fake_{base.name}{suffix}"
    define(namespace, **operators)
    monkeypatch.setitem(sys.modules, namespace, types.ModuleType(namespace))
    monkeypatch.setattr(CALLS, "names", [])
    monkeypatch.setattr(CALLS, "fast", [])
    monkeypatch.setattr(CALLS, "bias_dtypes", [])

    @contextmanager
    def guard(tensor: torch.Tensor) -> Iterator[None]:
        CALLS.guarded = True
        try:
            yield
        finally:
            CALLS.guarded = False

    monkeypatch.setattr("fp8dispatch.backends.compute.fbgemm_family.on_device", guard)
    planted: Any = type(
        "Planted",
        (base,),
        {"namespace": namespace, "module": namespace, "other_namespace": "fp8dispatch_absent"},
    )
    backend: FbgemmFamily = planted()
    return backend
