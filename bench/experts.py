"""Times expert matmuls, raw activations in: ``python -m bench.experts OUT.json``.

Prefill is a grouped call with uneven routing; decode a batched one, top-8 of all experts, each
token's experts drawn without repetition. Arms are captured in CUDA graphs and alternate within each
round, timings flush L2 first, and a shape is timed only after every arm computed it right on
rows that are drawn at random. Beside the backends stand what the work cannot be faster than:
"read", a kernel that reads the weights of the experts in use once, and for prefill "bf16", one
dense multiplication of as many rows.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.testing import do_bench

import fp8dispatch
from bench import environment
from bench.gemm import capture
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.recipe import BLOCK_128
from tests import oracle

PREFILL = ((8, 4096, 7168, 8192), (8, 7168, 2048, 8192), (128, 1536, 2048, 8192))
PREFILL_MANY = ((256, 4096, 7168, 2048),)
DECODE = ((128, 1536, 2048), (256, 4096, 7168))
TOKENS = (1, 8, 32, 128)
TOP_K = 8
BACKENDS = ("triton", "deepgemm", "fbgemm", "mslk")  # of the last two the first one is loaded
ROUNDS = 3
CHECKED = 16

_READ_BLOCK = 16_384


def main(path: str) -> None:
    """Time every shape and write the figures."""
    torch.manual_seed(0)
    rows = [time_prefill(*shape) for shape in (*PREFILL, *PREFILL_MANY)]
    rows += [time_decode(*shape, tokens) for shape in DECODE for tokens in TOKENS]
    environment.write(path, {"experts": rows})


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


def time_prefill(experts: int, n: int, k: int, rows: int) -> dict[str, Any]:
    """Rows sorted by expert, in place."""
    weight, scale = make_weights(experts, n, k, "cuda")
    x = torch.randn(rows, k, device="cuda").bfloat16()
    ends = uneven(rows, experts, "cuda").cumsum(0).to(torch.int32)
    owner = torch.searchsorted(ends, torch.arange(rows, device="cuda"), right=True)
    arms = usable(
        lambda backend: fp8dispatch.fp8_experts_grouped(x, weight, scale, ends, backend=backend)
    )
    check(arms, x, owner, weight, scale)
    dense = torch.randn(n, k, device="cuda").bfloat16()
    arms["bf16"] = lambda: x @ dense.t()
    distinct = owner.unique()
    arms["read"] = lambda: read_weights(weight, distinct)
    return timed("grouped", arms, experts, n, k, rows)


def time_decode(experts: int, n: int, k: int, tokens: int) -> dict[str, Any]:
    """Each token's experts in the order of the tokens, its row gathered for each."""
    weight, scale = make_weights(experts, n, k, "cuda")
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    ids = torch.rand(tokens, experts, device="cuda").topk(TOP_K, 1).indices.flatten()
    gather = torch.arange(tokens, device="cuda").repeat_interleave(TOP_K)
    arms = usable(
        lambda backend: fp8dispatch.fp8_experts_batched(
            x, weight, scale, ids, gather=gather, backend=backend
        )
    )
    check(arms, x[gather], ids, weight, scale)
    distinct = ids.unique()
    arms["read"] = lambda: read_weights(weight, distinct)
    row = timed("batched", arms, experts, n, k, tokens * TOP_K)
    return {**row, "tokens": tokens, "distinct_experts": distinct.numel()}


def usable(run: Callable[[str], torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """The backends that take the call here; the others say why they do not."""
    arms: dict[str, Callable[[], torch.Tensor]] = {}
    for backend in BACKENDS:
        try:
            run(backend)
        except BackendUnavailableError as error:
            print(f"without {backend}: {error}", flush=True)
        else:
            arms[backend] = lambda backend=backend: run(backend)  # type: ignore[misc]
    return arms


def check(
    arms: dict[str, Callable[[], torch.Tensor]],
    x: torch.Tensor,
    owner: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """Every arm gives the right numbers in some rows; row r of `x` is that of expert owner[r]."""
    chosen = torch.randperm(x.shape[0])[:CHECKED].tolist()
    for name, arm in arms.items():
        out = arm()
        for row in chosen:
            one = int(owner[row])
            expected = oracle.linear_truth(x[row : row + 1], weight[one], scale[one], BLOCK_128)
            oracle.assert_matches(out[row : row + 1], expected, label=f"{name} row {row}")


def timed(
    way: str, arms: dict[str, Callable[[], torch.Tensor]], experts: int, n: int, k: int, rows: int
) -> dict[str, Any]:
    """Medians over rounds of the medians within a round, in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    graphs = {name: capture(arm) for name, arm in arms.items()}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(
                do_bench(graph.replay, warmup=10, rep=40, return_mode="median") * 1e3
            )
    row: dict[str, Any] = {"way": way, "experts": experts, "n": n, "k": k, "rows": rows}
    for name, values in times.items():
        median = statistics.median(values)
        row[name] = {
            "us": round(median, 1),
            "spread_us": round(max(values) - min(values), 1),
            "tflops": round(2 * rows * n * k / median / 1e6),
        }
    figures = "  ".join(f"{name} {row[name]['us']:8.1f} us" for name in arms)
    print(f"{way} E={experts} N={n} K={k} rows={rows}  {figures}", flush=True)
    return row


def read_weights(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Read the weights of some experts once, and do next to nothing with them."""
    out = torch.zeros(1, dtype=torch.int32, device=weight.device)
    words = weight.view(torch.int32)
    size = words[0].numel()
    _read_kernel[(ids.shape[0], triton.cdiv(size, _READ_BLOCK))](
        words, ids, out, size, BLOCK=_READ_BLOCK, num_warps=8
    )
    return out


@triton.jit
def _read_kernel(words_ptr, ids_ptr, out_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64)
    words = tl.load(words_ptr + expert * size + place, mask=place < size, other=0)
    total = tl.sum(words, axis=0)
    tl.store(out_ptr, total, mask=total == 1_234_567)  # so that the loads are not left out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.experts OUT.json")
    main(sys.argv[1])
