"""Expert matmuls, raw activations in: ``python -m bench experts``.

Prefill is a grouped call with uneven routing; decode a batched one, top-8 of all experts, each
token's experts drawn without repetition. Arms are CUDA graphs replayed behind a flush of L2, and
are timed only after they computed rows right that are drawn at random. Beside the backends stand
what the work cannot be faster than: "read", a kernel that reads the weights of the experts in use
once, and for prefill "bf16", one dense multiplication of as many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import fp8dispatch
from bench.arms import Checked
from bench.ceilings import read_bytes
from bench.session import Point, Row, Session
from bench.timing import alternate, table
from fp8dispatch import registry
from fp8dispatch.recipe import BLOCK_128
from tests import oracle

PREFILL = (
    (8, 4096, 7168, 8192),
    (8, 7168, 2048, 8192),
    (128, 1536, 2048, 8192),
    (256, 4096, 7168, 2048),
)
DECODE = ((128, 1536, 2048), (256, 4096, 7168))
TOKENS = (1, 8, 32, 128)
TOP_K = 8
CHECKED = 16
TINY = (16, 128, 128, 40)
LEFT_OUT = ("eager",)  # it waits for the routing, and cannot be captured


def points(session: Session) -> Iterator[Point]:
    """Prefill and decode of the two models."""
    if session.takes("prefill"):
        for shape in (TINY,) if session.rehearsal else PREFILL:
            yield f"grouped {shape}", partial(prefill, session, *shape)
    if session.takes("decode"):
        for experts, n, k in (TINY[:3],) if session.rehearsal else DECODE:
            for tokens in (1, 5) if session.rehearsal else TOKENS:
                label = f"batched ({experts}, {n}, {k}), {tokens} tokens"
                yield label, partial(decode, session, experts, n, k, tokens)


def make_weights(experts: int, n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and block scales: quantising real weights would take longer than all else."""
    codes = torch.randint(0, 120, (experts, n, k), dtype=torch.uint8, device=device)
    codes |= torch.randint(0, 2, (experts, n, k), dtype=torch.uint8, device=device) << 7
    scale = torch.rand(experts, -(-n // 128), -(-k // 128), device=device) * 1e-3 + 1e-4
    return codes.view(torch.float8_e4m3fn), scale


def uneven(rows: int, experts: int, device: str) -> torch.Tensor:
    """Rows of each expert, some far more than others; they add up to `rows`."""
    share = torch.rand(experts, device=device) ** 2 + 0.02
    drawn = torch.multinomial(share, rows, replacement=True)
    return torch.bincount(drawn, minlength=experts)


def prefill(session: Session, experts: int, n: int, k: int, rows: int) -> Row:
    """Rows sorted by expert, in place."""
    device = session.device
    weight, scale = make_weights(experts, n, k, device)
    x = torch.randn(rows, k, device=device).bfloat16()
    ends = uneven(rows, experts, device).cumsum(0).to(torch.int32)
    owner = torch.searchsorted(ends, torch.arange(rows, device=device), right=True)

    def run(backend: str | None) -> torch.Tensor:
        return fp8dispatch.fp8_experts_grouped(x, weight, scale, ends, backend=backend)

    checked = _admit(session, run, x, owner, weight, scale)
    dense = torch.randn(n, k, device=device).bfloat16()
    distinct = owner.unique()
    floors = {"bf16": lambda: x @ dense.t(), "read": lambda: read_bytes(weight, distinct)}
    shape = {"way": "grouped", "experts": experts, "n": n, "k": k, "rows": rows}
    return shape | _timed(session, checked, floors, 2 * rows * n * k)


def decode(session: Session, experts: int, n: int, k: int, tokens: int) -> Row:
    """Each token's experts in the order of the tokens, its row gathered for each."""
    device = session.device
    weight, scale = make_weights(experts, n, k, device)
    x = torch.randn(tokens, k, device=device).bfloat16()
    ids = torch.rand(tokens, experts, device=device).topk(TOP_K, 1).indices.flatten()
    gather = torch.arange(tokens, device=device).repeat_interleave(TOP_K)

    def run(backend: str | None) -> torch.Tensor:
        return fp8dispatch.fp8_experts_batched(
            x, weight, scale, ids, gather=gather, backend=backend
        )

    checked = _admit(session, run, x[gather], ids, weight, scale)
    distinct = ids.unique()
    rows = tokens * TOP_K
    shape = {"way": "batched", "experts": experts, "n": n, "k": k, "rows": rows}
    shape |= {"tokens": tokens, "distinct_experts": distinct.numel()}
    floors = {"read": lambda: read_bytes(weight, distinct)}
    return shape | _timed(session, checked, floors, 2 * rows * n * k)


def _admit(
    session: Session,
    run: Callable[[str | None], torch.Tensor],
    x: torch.Tensor,
    owner: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
) -> Checked:
    """The backends whose numbers are right in some rows; row r of `x` is of expert owner[r]."""
    chosen = torch.randperm(x.shape[0])[:CHECKED].tolist()

    def check(out: torch.Tensor) -> None:
        for row in chosen:
            one = int(owner[row])
            expected = oracle.linear_truth(x[row : row + 1], weight[one], scale[one], BLOCK_128)
            oracle.assert_matches(out[row : row + 1], expected, label=f"row {row}")

    checked = Checked()
    left_out = () if session.rehearsal else LEFT_OUT
    for name in session.backends or registry.NAMES:
        if name not in left_out:
            checked.try_arm(name, partial(run, name), check)
    checked.try_arm("automatic", partial(run, None), check)
    return checked


def _timed(
    session: Session, checked: Checked, floors: dict[str, Callable[[], Any]], flops: int
) -> Row:
    arms = {**checked.arms, **floors}
    replays = checked.captured(
        {name: partial(session.timer.replay, arm) for name, arm in arms.items()}
    )
    figures = alternate(
        {name: partial(session.timer.single, arm) for name, arm in replays.items()},
        session.rounds,
    )
    tflops = {name: round(flops / figures[name].us / 1e6) for name in figures if name != "read"}
    return {**table(figures), "tflops": tflops, **checked.told()}
