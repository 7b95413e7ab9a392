"""What this GPU reaches at its best: the lines that figures are drawn against.

`read_bytes` is a kernel that only reads, the practical floor of a multiplication that has to read
its weight once.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from bench.session import Row, Session
from bench.timing import alternate, copies_for, table

if TYPE_CHECKING:
    from types import ModuleType

FP8_TFLOPS = {
    "NVIDIA H100 80GB HBM3": 1979.0,
    "NVIDIA H200": 1979.0,
}
"""Dense FP8 peak in TFLOP/s: half of the 3,958 with sparsity of NVIDIA's datasheets (SXM)."""


def measure(session: Session) -> Row:
    """Copy rate (bytes read and written), bf16 matmul, and reading, as one row."""
    tiny = session.rehearsal
    size, side = (1 << 16, 64) if tiny else (2 << 30, 8192)
    weight_bytes = (1 << 14) if tiny else 57344 * 8192
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    one, other = (
        torch.randn(side, side, device=session.device, dtype=torch.bfloat16) for _ in range(2)
    )
    read = source[:weight_bytes]
    timer = session.timer
    figures = alternate(
        {
            "copy": lambda: timer.single(lambda: target.copy_(source)),
            "bf16": lambda: timer.single(lambda: one @ other),
            "read": lambda: timer.single(lambda: read_bytes(read)),
        },
        session.rounds,
    )
    return {
        "part": "ceilings",
        **table(figures),
        "copy_tb_s": round(2 * size / figures["copy"].us / 1e6, 3),
        "bf16_tflops": round(2 * side**3 / figures["bf16"].us / 1e6, 1),
        "read_tb_s": round(weight_bytes / figures["read"].us / 1e6, 3),
    }


def read_bytes(data: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Read `data` once, or of a stack [E, ...] those with these ids, and do next to nothing."""
    bytes_ = data.view(torch.uint8)
    stack = bytes_.reshape(1, -1) if ids is None else bytes_.reshape(data.shape[0], -1)
    if ids is None:
        ids = _first(data.device)
    if not data.is_cuda:
        return stack[ids.long()].sum()
    out = _sink(data.device)
    _kernels().read(stack.view(torch.int32), ids, out)
    return out


@functools.cache
def _first(device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


@functools.cache
def _sink(device: torch.device) -> torch.Tensor:
    """One word that is not written: making it anew would add a launch to what is timed."""
    return torch.zeros(1, dtype=torch.int32, device=device)


@functools.cache
def _kernels() -> ModuleType:
    # Imported late: a rehearsal on a CPU needs no Triton.
    from bench import reading

    return reading


def cold_read(session: Session, n: int, k: int) -> Any:
    """A chain that reads copies of an [N, K] weight of one byte an element, one after another."""
    count = 2 if session.rehearsal else copies_for(n * k)
    copies = [
        torch.randint(0, 255, (n, k), dtype=torch.uint8, device=session.device)
        for _ in range(count)
    ]
    return session.timer.chain([functools.partial(read_bytes, one) for one in copies])
