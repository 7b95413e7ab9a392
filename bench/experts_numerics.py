"""How right expert matmuls are: ``python -m bench experts_numerics``.

For each backend and way: the lowest signal-to-noise ratio of an output row in bf16, over numbers of
experts from 1 to 256, uneven routing, rows of no expert up to 90 %, and ragged shapes, against
float64 on the same quantised operands; rows of no expert must be zeros over poisoned memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import fp8dispatch
from bench.arms import RECIPES, poisoned
from bench.experts import uneven
from bench.session import Point, Row, Session
from fp8dispatch import registry
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.recipe import Recipe
from tests import oracle

EXPERTS = (1, 3, 8, 60, 128, 256)
SENTINELS = (0.0, 0.5, 0.9)
SHAPES = ((512, 1024, 300), (264, 1040, 130))  # N, K, rows
TINY_SHAPES = ((64, 128, 20), (72, 144, 11))
WAYS = ("grouped", "batched")


def points(session: Session) -> Iterator[Point]:
    """Every recipe and number of experts, by all backends on the same operands."""
    for recipe in session.recipes:
        for experts in (1, 3) if session.rehearsal else EXPERTS:
            yield f"{recipe} E={experts}", partial(measure, session, RECIPES[recipe], experts)


def measure(session: Session, recipe: Recipe, experts: int) -> Row:
    """One number of experts: over sentinels and shapes, every backend both ways."""
    found: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for sentinels in SENTINELS:
        for n, k, rows in TINY_SHAPES if session.rehearsal else SHAPES:
            call = Call(session.device, recipe, experts, n, k, rows, sentinels)
            for backend in session.backends or registry.NAMES:
                for way in WAYS:
                    name = f"{backend}, {way}"
                    try:
                        ratio = call.judge(way, backend)
                    except BackendUnavailableError as refusal:
                        refused[name] = str(refusal)
                        continue
                    except AssertionError as error:
                        wrong[name] = f"{sentinels:.0%} of no expert, N={n} K={k}: {error}"
                        continue
                    one = found.setdefault(name, {"calls": 0, "sqnr_db": 999.0})
                    one["calls"] += 1
                    one["sqnr_db"] = round(min(one["sqnr_db"], ratio), 1)
    row: Row = {"recipe": str(recipe), "experts": experts, "found": found, "refused": refused}
    return row | ({"wrong": wrong} if wrong else {})


class Call:
    """One routing with its operands and its truth; `owner` is the expert of each sorted row."""

    def __init__(
        self, device: str, recipe: Recipe, experts: int, n: int, k: int, rows: int, sentinels: float
    ) -> None:
        made = [oracle.make_weight(n, k, recipe, device=device) for _ in range(experts)]
        self.recipe = recipe
        codes = torch.stack([data.view(torch.uint8) for data, _ in made])
        self.weight = codes.view(torch.float8_e4m3fn)
        self.scale = torch.stack([scale for _, scale in made])
        self.x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
        used = max(1, round(rows * (1 - sentinels)))
        counts = uneven(used, experts, device)
        self.ends = counts.cumsum(0).to(torch.int32)
        nobody = torch.full((rows - used,), experts, device=device)
        nobody[::2] = -1
        owner = torch.arange(experts, device=device).repeat_interleave(counts)
        self.owner = torch.cat([owner, nobody])
        self.order = torch.randperm(rows, device=device)
        self.used = used
        self.truth = self._truth(n)

    def _truth(self, n: int) -> oracle.Truth:
        """Of the sorted rows [rows, N]; zeros where no expert owns them."""
        value, mass = (
            torch.zeros(len(self.owner), n, dtype=torch.float64, device=self.x.device)
            for _ in range(2)
        )
        wide = oracle.dequantized_activations(self.x, self.recipe)
        for expert in self.owner[: self.used].unique().tolist():
            rows = self.owner == expert
            weight = oracle.dequantized_weight(self.weight[expert], self.scale[expert], self.recipe)
            one = oracle.truth(wide[rows], weight)
            value[rows], mass[rows] = one.value, one.mass
        return oracle.Truth(value, mass)

    def judge(self, way: str, backend: str) -> float:
        """The lowest ratio of a row in dB; raises AssertionError for numbers that are wrong."""
        block = self.recipe.block_size
        with poisoned():
            if way == "grouped":
                out = fp8dispatch.fp8_experts_grouped(
                    self.x, self.weight, self.scale, self.ends, block_size=block, backend=backend
                )
            else:  # in another order, and put back into that of the truth
                mixed = fp8dispatch.fp8_experts_batched(
                    self.x[self.order], self.weight, self.scale, self.owner[self.order],
                    block_size=block, backend=backend,
                )  # fmt: skip
                out = torch.empty_like(mixed)
                out[self.order] = mixed
        assert not bool(out[self.used :].any()), "a row of no expert is not zero"
        covered = oracle.Truth(self.truth.value[: self.used], self.truth.mass[: self.used])
        oracle.assert_matches(out[: self.used], covered)
        return oracle.sqnr(out[: self.used], covered.value).min().item()
