"""Both ways through a layer of experts: ``python -m bench experts_layer --parts MODEL ...``.

Times a whole `FP8Experts` forward, batched and grouped, and the same layer in bf16 through torch's
grouped matmul, over numbers of tokens. The crossing of the first two, in rows per expert, is what
`fp8dispatch.moe.forward.GROUPED_FROM` should be. Routing is uneven: expert e is drawn with weight
``1 / sqrt(1 + e)``, k different ones for each token.

Each arm is captured in a CUDA graph and replayed (the device's time), and called eagerly (what the
caller waits for, launches included).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from bench.session import Point, Row, Session
from bench.timing import alternate, table
from fp8dispatch import FP8Experts
from fp8dispatch.moe import forward
from fp8dispatch.moe.routing import sort_by_expert

# E, H, I, k
MODELS = {
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "deepseek-v3": (256, 7168, 2048, 8),
    "mixtral-8x7b": (8, 4096, 14336, 2),
    "rehearsal": (4, 128, 64, 2),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
REHEARSAL = "rehearsal"
CALLS = 5


def points(session: Session) -> Iterator[Point]:
    """Every number of tokens of every model; the weights of a model are made once."""
    chosen = session.parts or tuple(name for name in MODELS if name != REHEARSAL)
    for name in (REHEARSAL,) if session.rehearsal else chosen:
        layer: list[_Layer] = []  # made by the first point, and freed with the last
        for tokens in TOKENS[:4] if session.rehearsal else TOKENS:
            yield f"{name}, {tokens} tokens", partial(measure, session, name, layer, tokens)


class _Layer:
    """A model's experts in bf16 and in FP8."""

    def __init__(self, name: str, device: str) -> None:
        self.experts, hidden, inner, self.top_k = MODELS[name]
        shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
        self.hidden = hidden
        self.dense = {
            one: torch.empty(self.experts, *shape, dtype=torch.bfloat16, device=device)
            for one, shape in shapes.items()
        }
        for weight in self.dense.values():
            weight.normal_(std=0.02)
        self.module = FP8Experts.from_weights(self.dense, top_k=self.top_k)


def measure(session: Session, name: str, kept: list[_Layer], tokens: int) -> Row:
    """One number of tokens."""
    device, timer = session.device, session.timer
    if not kept:
        kept.append(_Layer(name, device))
    layer = kept[0]
    x = torch.randn(tokens, layer.hidden, dtype=torch.bfloat16, device=device)
    chances = 1 / torch.arange(1, layer.experts + 1, device=device).sqrt()
    ids = torch.multinomial(chances.expand(tokens, layer.experts), layer.top_k)
    weights = torch.rand(tokens, layer.top_k, device=device)
    arms: dict[str, Callable[[], torch.Tensor]] = {
        "batched": partial(_forward, layer.module, x, ids, weights, "batched"),
        "grouped": partial(_forward, layer.module, x, ids, weights, "grouped"),
        "bf16": partial(_bf16, layer.dense, x, ids, weights),
    }
    with torch.no_grad():
        wrong = _wrong({way: arm() for way, arm in arms.items()})
        arms = {way: arm for way, arm in arms.items() if way not in wrong}
        row: Row = {
            "model": name,
            "tokens": tokens,
            "rows_per_expert": tokens * layer.top_k / layer.experts,
            "backends": {k: d.backend for k, d in layer.module.explain(x).items()},
        }
        wall = {way: partial(timer.wall, arm, CALLS) for way, arm in arms.items()}
        row["eager"] = table(alternate(wall, session.rounds))
        replays = {way: timer.chain([arm] * CALLS, replays=3) for way, arm in arms.items()}
        row["device"] = table(alternate(replays, session.rounds))
    return row | ({"wrong": wrong} if wrong else {})


def _wrong(outputs: dict[str, torch.Tensor]) -> dict[str, str]:
    """Ways that are far from the layer in bf16: FP8 costs some percent, a mistake costs all."""
    truth = outputs["bf16"].float()
    found = {}
    for way in ("batched", "grouped"):
        error = float((outputs[way].float() - truth).norm() / truth.norm())
        if not error < 0.15:  # NaN is wrong as well
            found[way] = f"{error:.0%} from the layer in bf16"
    return found


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


def summary(rows: list[Row]) -> dict[str, Any]:
    """The crossing of each model, which `fp8dispatch.moe.forward.GROUPED_FROM` should be."""
    return {"crossing": crossings([row for row in rows if "device" in row])}


def crossings(rows: list[Row]) -> dict[str, float | None]:
    """For each model the fewest rows per expert from which grouped is never slower again."""
    found: dict[str, float | None] = {}
    slower: set[str] = set()
    for row in reversed(rows):  # from many tokens to few
        us, name = row["device"]["us"], row["model"]
        found.setdefault(name, None)
        if us.get("grouped", float("inf")) > us.get("batched", float("inf")):
            slower.add(name)
        if name not in slower:
            found[name] = row["rows_per_expert"]
    return found
