"""Grouped GEMMs with the contracts of the real ones, which read and write memory as those do.

They check what the real ones check. What the real ones would answer by losing the CUDA context or
by numbers from elsewhere raises `ContextLost`, which no test expects. Rows that they do not write
hold NaN.
"""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from fp8dispatch.backends.deepgemm import BACKEND as DEEPGEMM_LINEAR
from tests.backends.fake_cutlass import ContextLost

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

    from fp8dispatch.moe.backends.fbgemm_family import FbgemmFamilyExperts

_BLOCKS = (
    "f8f8bf16_groupwise_grouped(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, "
    "Tensor M_sizes) -> Tensor"
)
_ROWS = _BLOCKS.replace("groupwise_grouped", "rowwise_grouped_stacked")
_GROUP = 128


class Guard:
    """Whether the tensors' device is the current one, as the libraries need it."""

    held = False


@contextmanager
def guard(tensor: torch.Tensor) -> Iterator[None]:
    Guard.held = True
    try:
        yield
    finally:
        Guard.held = False


def _enter(*tensors: torch.Tensor) -> None:
    if not Guard.held:
        raise ContextLost("launched on another device")
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        raise ContextLost("a pointer that bulk copies do not take")


def _wide(data: torch.Tensor) -> torch.Tensor:
    return data.float().double()


def _poisoned(rows: int, n: int) -> torch.Tensor:
    return torch.full((rows, n), torch.nan, dtype=torch.bfloat16)


# FBGEMM and MSLK.


def _stacked(xq: torch.Tensor, wq: torch.Tensor, sizes: torch.Tensor) -> list[tuple[int, int, int]]:
    """Expert, first row and number of rows, for those that have any; what both operators check."""
    experts, n, k = wq.shape
    if sizes.dtype != torch.int64 or sizes.shape != (experts,):
        raise RuntimeError("M_sizes must be int64.")
    if experts > 1024 or int(sizes.sum()) > xq.shape[0] or bool((sizes < 0).any()):
        raise ContextLost("sizes")
    if xq.dtype != torch.float8_e4m3fn or wq.dtype != torch.float8_e4m3fn or xq.shape[1] != k:
        raise ContextLost("read as e4m3fn [E, N, K], whatever it is")
    if not xq.is_contiguous() or not wq.is_contiguous() or k % 16 or n % 8:
        raise ContextLost("rows that bulk copies do not take")
    starts = (sizes.cumsum(0) - sizes).tolist()
    return [(e, s, m) for e, (s, m) in enumerate(zip(starts, sizes.tolist(), strict=True)) if m]


def _groupwise(
    xq: torch.Tensor, wq: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor,
    sizes: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    _enter(xq, wq, x_scale, w_scale)
    _, n, k = wq.shape
    groups, blocks = k // _GROUP, -(-n // _GROUP)
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32 or k % _GROUP:
        raise ContextLost("scales")
    out = _poisoned(xq.shape[0], n)
    group_of, block_of = torch.arange(k) // _GROUP, torch.arange(n) // _GROUP
    for expert, start, rows in _stacked(xq, wq, sizes):
        if rows % 4 or start % 4:
            raise ContextLost("scales of a group that begin at an odd address")
        # Pointers as the library makes them: with N / 128 rounded down, whatever the layout is.
        x_memory = x_scale.flatten()[start * groups :].as_strided((groups, rows), (rows, 1))
        at = expert * (n // _GROUP) * groups
        w_memory = w_scale.flatten()[at:].as_strided((groups, blocks), (blocks, 1))
        wide_x = _wide(xq[start : start + rows]) * x_memory.t().double()[:, group_of]
        wide_w = _wide(wq[expert]) * w_memory.t().double()[block_of][:, group_of]
        out[start : start + rows] = (wide_x @ wide_w.t()).to(torch.bfloat16)
    return out


def _rowwise(
    xq: torch.Tensor, wq: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor,
    sizes: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    _enter(xq, wq, x_scale, w_scale)
    _, n, _ = wq.shape
    if x_scale.numel() != xq.shape[0] or w_scale.numel() != wq.shape[0] * n:
        raise ContextLost("scales")
    out = _poisoned(xq.shape[0], n)
    for expert, start, rows in _stacked(xq, wq, sizes):
        here = slice(start, start + rows)
        wide_w = _wide(wq[expert]) * w_scale.flatten()[expert * n :][:n].double().unsqueeze(1)
        wide_x = _wide(xq[here]) * x_scale.flatten()[here].double().unsqueeze(1)
        out[here] = (wide_x @ wide_w.t()).to(torch.bfloat16)
    return out


_libraries: dict[str, torch.library.Library] = {}


def plant_family(
    base: type[FbgemmFamilyExperts], monkeypatch: pytest.MonkeyPatch, *, blocks: bool = True
) -> FbgemmFamilyExperts:
    """The backend over a library that registers the grouped operators when it is imported."""
    namespace = f"fp8dispatch_grouped_{base.name}{'' if blocks else '_old'}"
    if namespace not in _libraries:
        library = _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
        for schema, function in ((_BLOCKS, _groupwise), (_ROWS, _rowwise))[not blocks :]:
            library.define(schema)
            for key in ("CPU", "CUDA"):
                library.impl(schema.partition("(")[0], function, key)
    monkeypatch.setitem(sys.modules, namespace, types.ModuleType(namespace))
    monkeypatch.setattr("fp8dispatch.moe.backends.compute.fbgemm_family.on_device", guard)
    changed = {"namespace": namespace, "module": namespace, "other_namespace": "fp8dispatch_absent"}
    linear = type("PlantedLinear", (type(base.linear),), changed)()
    planted: FbgemmFamilyExperts = type("Planted", (base,), {"linear": linear})()
    return planted


# Torch.


def scaled_grouped_mm(
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_recipe_a: torch.nn.functional.ScalingType,
    scale_b: torch.Tensor,
    scale_recipe_b: torch.nn.functional.ScalingType,
    *,
    offs: torch.Tensor,
    output_dtype: torch.dtype,
    use_fast_accum: bool,
) -> torch.Tensor:
    """``torch.nn.functional.scaled_grouped_mm`` of rows by a matrix for each expert."""
    _enter(mat_a, mat_b)
    (rows, k), (experts, k_of_b, n) = mat_a.shape, mat_b.shape
    rowwise = torch.nn.functional.ScalingType.RowWise
    for holds, told in (
        (scale_recipe_a is rowwise and scale_recipe_b is rowwise, "No gemm implementation"),
        (mat_a.dtype == mat_b.dtype == torch.float8_e4m3fn, "Expected Float8_e4m3"),
        (mat_a.stride() == (k, 1), "Expected mat1 to not be transposed"),
        (mat_b.stride()[1] == 1 and mat_b.stride()[2] >= k, "Expected mat2 to be transposed"),
        (k == k_of_b and k % 16 == 0 and n % 16 == 0, "divisible by 16"),
        (offs.dtype == torch.int32 and offs.shape == (experts,), "Offsets have to be int32"),
        (scale_a.shape == (rows,) and scale_a.is_contiguous(), "scale must be contiguous"),
        (scale_b.shape == (experts, n) and scale_b.stride(1) == 1, "scale must be contiguous"),
        (output_dtype == torch.bfloat16, "Only bf16"),
        (experts < 1024, "Can't process more than 1024 groups"),
    ):
        if not holds:
            raise ValueError(told)
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    if any(end < start for start, end in zip(starts, ends, strict=True)) or ends[-1] > rows:
        raise ContextLost("offsets")
    SEEN_FAST.append(use_fast_accum)
    out = _poisoned(rows, n)
    for expert, (start, end) in enumerate(zip(starts, ends, strict=True)):
        wide_x = _wide(mat_a[start:end]) * scale_a[start:end].double().unsqueeze(1)
        wide_w = _wide(mat_b[expert]) * scale_b[expert].double()
        out[start:end] = (wide_x @ wide_w).to(torch.bfloat16)
    return out


SEEN_FAST: list[bool] = []


# DeepGEMM.


def _deep_operands(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], cast: bool
) -> None:
    (data, scale), (weight, weight_scale) = a, b
    _enter(data, scale, weight)
    experts, n, k = weight.shape
    groups = -(-k // _GROUP)
    assert cast, "scales would become powers of two"
    assert data.dtype == weight.dtype == torch.float8_e4m3fn
    assert data.shape[-1] == k
    assert scale.shape == (*data.shape[:-1], groups)
    assert weight_scale.shape == (experts, -(-n // _GROUP), groups)
    for tensor in (data, weight, weight_scale):
        assert tensor.is_contiguous()


def _deep_product(
    data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    n, k = weight.shape
    group_of, block_of = torch.arange(k) // _GROUP, torch.arange(n) // _GROUP
    wide_x = _wide(data) * scale.double()[:, group_of]
    wide_w = _wide(weight) * weight_scale.double()[block_of][:, group_of]
    return (wide_x @ wide_w.t()).to(torch.bfloat16)


def deep_contiguous(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    d: torch.Tensor,
    m_indices: torch.Tensor,
    *,
    disable_ue8m0_cast: bool,
) -> None:
    """``m_grouped_fp8_gemm_nt_contiguous``: a tile is of the expert that its first row names."""
    _deep_operands(a, b, disable_ue8m0_cast)
    (data, scale), (weight, weight_scale) = a, b
    rows = data.shape[0]
    assert rows % 128 == 0
    assert scale.stride() == (1, rows)
    assert m_indices.dtype == torch.int32
    assert d.shape == (rows, weight.shape[1])
    d.fill_(torch.nan)
    for tile, experts in enumerate(m_indices.reshape(-1, 128)):
        first = int(experts[0])
        assert set(experts.tolist()) <= {first, -1}, "a tile of two experts"
        for expert in [first] if first >= 0 else []:
            here = slice(128 * tile, 128 * tile + 128)
            part = _deep_product(data[here], scale[here], weight[expert], weight_scale[expert])
            d[here] = torch.where((experts >= 0).unsqueeze(1), part, torch.nan)


def deep_masked(
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    disable_ue8m0_cast: bool,
) -> None:
    """``fp8_m_grouped_gemm_nt_masked``: whole tiles of 128 are written, also beyond a block."""
    _deep_operands(a, b, disable_ue8m0_cast)
    (data, scale), (weight, weight_scale) = a, b
    experts, room, _ = data.shape
    assert scale.stride() == (room * scale.shape[2], 1, room), "transposed by another kernel"
    assert room % 4 == 0, "scales that bulk copies do not take"
    assert masked_m.dtype == torch.int32
    assert masked_m.shape == (experts,)
    assert 0 < expected_m <= room
    assert d.shape == (experts, room, weight.shape[1])
    d.fill_(torch.nan)
    flat = d.view(experts * room, -1)
    for expert, rows in enumerate(masked_m.tolist()):
        assert 0 <= rows <= room
        for first in range(0, rows, 128):
            begin = expert * room + first
            tile = _poisoned(min(128, flat.shape[0] - begin), flat.shape[1])
            counted = min(128, rows - first)
            here = slice(first, first + counted)
            tile[:counted] = _deep_product(
                data[expert, here], scale[expert, here], weight[expert], weight_scale[expert]
            )
            flat[begin : begin + tile.shape[0]] = tile


def plant_deepgemm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module ``deep_gemm`` with both entries, which counts as imported."""
    module = types.ModuleType("deep_gemm")
    module.m_grouped_fp8_gemm_nt_contiguous = deep_contiguous  # type: ignore[attr-defined]
    module.fp8_m_grouped_gemm_nt_masked = deep_masked  # type: ignore[attr-defined]
    module.get_mk_alignment_for_contiguous_layout = lambda: 128  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    monkeypatch.setattr(DEEPGEMM_LINEAR, "_load_refusals", ())
    for layout in ("contiguous", "masked"):
        place = f"fp8dispatch.moe.backends.compute.deepgemm_{layout}.on_device"
        monkeypatch.setattr(place, guard)
    return module
