"""Both ways through a layer of experts: ``python -m bench.experts_layer OUT.json [MODEL,...]``.

Times a whole `FP8Experts` forward, batched and grouped, and the same layer in bf16 through torch's
grouped matmul, over numbers of tokens. The crossing of the first two, in rows per expert, is what
`fp8dispatch.moe.forward.GROUPED_FROM` should be. Routing is uneven: expert e is drawn with weight
``1 / sqrt(1 + e)``, k different ones for each token.

On a GPU each arm is captured in a CUDA graph and replayed (the device's time), and called eagerly
(what the caller waits for, launches included); figures are medians over rounds in which the arms
alternate. Without a GPU the model "rehearsal" runs through the same code on the CPU, for no
figures.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from bench import environment
from fp8dispatch import FP8Experts
from fp8dispatch.moe import forward
from fp8dispatch.moe.routing import sort_by_expert

# E, H, I, k
MODELS = {
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "deepseek-v3": (256, 7168, 2048, 8),
    "mixtral-8x7b": (8, 4096, 14336, 2),
    "rehearsal": (8, 256, 128, 2),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ROUNDS, CALLS = 20, 5


def main(path: str, names: tuple[str, ...]) -> None:
    """Time every number of tokens of every model and write the figures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in names:
        rows += _model(name, device)
        if device == "cuda":
            torch.cuda.empty_cache()
    environment.write(path, {"experts_layer": rows, "crossing": _crossings(rows)})


def _model(name: str, device: str) -> list[dict[str, Any]]:
    experts, hidden, inner, top_k = MODELS[name]
    torch.manual_seed(0)
    shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    dense = {
        one: torch.empty(experts, *shape, dtype=torch.bfloat16, device=device)
        for one, shape in shapes.items()
    }
    for weight in dense.values():
        weight.normal_(std=0.02)
    module = FP8Experts.from_weights(dense, top_k=top_k)
    chances = 1 / torch.arange(1, experts + 1, device=device).sqrt()
    rows = []
    for tokens in TOKENS[:4] if name == "rehearsal" else TOKENS:
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=device)
        ids = torch.multinomial(chances.expand(tokens, experts), top_k)
        weights = torch.rand(tokens, top_k, device=device)
        arms: dict[str, Callable[[], torch.Tensor]] = {
            "batched": partial(_forward, module, x, ids, weights, "batched"),
            "grouped": partial(_forward, module, x, ids, weights, "grouped"),
            "bf16": partial(_bf16, dense, x, ids, weights),
        }
        with torch.no_grad():
            row = {
                "model": name,
                "tokens": tokens,
                "rows_per_expert": tokens * top_k / experts,
                "backends": {k: d.backend for k, d in module.explain(x).items()},
                "eager_us": _alternate({arm: _wall(call) for arm, call in arms.items()}),
            }
            if device == "cuda":
                graphs = {arm: _device(_captured(call)) for arm, call in arms.items()}
                row["device_us"] = _alternate(graphs)
        rows.append(row)
        print(row, flush=True)
    return rows


def _forward(
    module: FP8Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, way: str
) -> torch.Tensor:
    """The module's forward by one of the two ways."""
    into, back = module._into(), module._projection("down_proj")
    return forward.experts_forward(x, ids, weights, into, module.activation, back, route=way)


def _bf16(
    dense: dict[str, torch.Tensor], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The layer over unquantised weights: sorted rows through torch's grouped matmul."""
    order = sort_by_expert(ids.reshape(-1), dense["down_proj"].shape[0])
    place = order.scatter
    assert place is not None  # sorting gives one
    gathered = x[place.long() // ids.shape[1]]
    both = F.grouped_mm(gathered, dense["gate_up_proj"].transpose(1, 2), offs=order.ends)
    gate, up = both.chunk(2, -1)
    out = F.grouped_mm(F.silu(gate) * up, dense["down_proj"].transpose(1, 2), offs=order.ends)
    restored = torch.empty_like(out)
    restored[place.long()] = out
    shares = weights.to(out.dtype).unsqueeze(-1)
    return (restored.view(*ids.shape, -1) * shares).sum(1)


def _captured(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _device(call: Callable[[], object]) -> Callable[[], float]:
    """Microseconds of the device for one call, by events around a few."""

    def measure() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / CALLS * 1e3

    return measure


def _wall(call: Callable[[], object]) -> Callable[[], float]:
    """Microseconds until a call's result is there."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)

    def measure() -> float:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        return (time.perf_counter() - start) * 1e6

    return measure


def _alternate(arms: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of each arm over rounds in which they take turns, after two for warmth."""
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(ROUNDS + 2):
        for arm, measure in arms.items():
            times[arm].append(measure())
    return {arm: round(statistics.median(values[2:]), 1) for arm, values in times.items()}


def _crossings(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """For each model the fewest rows per expert from which grouped is never slower again."""
    found: dict[str, float | None] = {}
    slower: set[str] = set()
    for row in reversed(rows):  # from many tokens to few
        times, name = row.get("device_us", row["eager_us"]), row["model"]
        found.setdefault(name, None)
        if times["grouped"] > times["batched"]:
            slower.add(name)
        if name not in slower:
            found[name] = row["rows_per_expert"]
    return found


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m bench.experts_layer OUT.json [MODEL,MODEL...]")
    real = tuple(name for name in MODELS if name != "rehearsal")
    chosen = real if len(sys.argv) == 2 else tuple(sys.argv[2].split(","))
    main(sys.argv[1], chosen if torch.cuda.is_available() else ("rehearsal",))
