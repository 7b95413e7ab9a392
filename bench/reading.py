"""The kernel that only reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

_BLOCK = 16_384


def read(words: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Read the rows `ids` of `words` [E, size] int32; `out` [1] int32 stays as it is."""
    size = words.shape[1]
    _read_kernel[(ids.shape[0], triton.cdiv(size, _BLOCK))](
        words, ids, out, size, BLOCK=_BLOCK, num_warps=8
    )


@triton.jit
def _read_kernel(words_ptr, ids_ptr, out_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64)
    words = tl.load(words_ptr + row * size + place, mask=place < size, other=0)
    total = tl.sum(words, axis=0)
    tl.store(out_ptr, total, mask=total == 1_234_567)  # so that the loads are not left out
