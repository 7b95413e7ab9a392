"""Expert matmuls for tests: random operands of one call, and what it should give in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fp8dispatch import fp8_experts_batched, fp8_experts_grouped
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests import oracle

RECIPES: dict[str, Recipe] = {
    "tensor": TENSOR,
    "row": ROW,
    "128x128": BLOCK_128,
    **{
        f"{rows}x{columns}": Recipe(Granularity.BLOCK, (rows, columns))
        for rows, columns in ((16, 32), (1, 32), (64, 16), (7, 20))
    },
}
WAYS = ("batched", "batched-gather", "grouped", "grouped-index")


@dataclass
class Call:
    """One call, and the expert, source and target of each of its sorted or unsorted rows.

    Attributes:
        arguments: keyword arguments of the function of its `way`.
        owners: expert of each row, None where it has none, in the order of `sources`.
        sources, targets: row of x and of the output of each row; None where it goes nowhere.
    """

    way: str
    recipe: Recipe
    arguments: dict[str, Any]
    owners: list[int | None]
    sources: list[int | None]
    targets: list[int | None]
    rows: int
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **more: Any) -> torch.Tensor:
        function = fp8_experts_batched if self.way.startswith("batched") else fp8_experts_grouped
        return function(**{**self.arguments, **self.options, **more})

    def reached(self) -> list[tuple[int, int, int]]:
        """Expert, source and target of the rows that compute something."""
        places = zip(self.owners, self.sources, self.targets, strict=True)
        return [(e, s, t) for e, s, t in places if None not in (e, s, t)]  # type: ignore[misc]

    def dequantized(self) -> torch.Tensor:
        """[E, N, K] float64."""
        data, scale = self.arguments["weight"], self.arguments["weight_scale"]
        pairs = zip(data.detach(), scale.detach(), strict=True)
        return torch.stack([oracle.dequantized_weight(w, s, self.recipe) for w, s in pairs])

    def truth(self) -> oracle.Truth:
        """What the call should give, one row at a time."""
        x, weight = self.arguments["x"].detach(), self.dequantized()
        bias = self.arguments.get("bias")
        static = self.arguments.get("activation_scale")
        value = torch.zeros((self.rows, weight.shape[1]), dtype=torch.float64, device=x.device)
        mass = value.clone()
        for expert, source, target in self.reached():
            of_row = None
            if static is not None:
                of_row = static.reshape(-1)[expert if static.numel() > 1 else 0].reshape(1)
            row = oracle.dequantized_activations(
                x[source : source + 1], self.recipe, self.arguments["weight"].dtype, of_row
            )
            one = None if bias is None else bias[expert].detach()
            expected = oracle.truth(row, weight[expert], one)
            value[target], mass[target] = expected.value[0], expected.mass[0]
        return oracle.Truth(value, mass)


def make_call(
    way: str,
    recipe: Recipe,
    experts: int,
    n: int,
    k: int,
    rows: int,
    *,
    sentinels: float = 0.2,
    concentrated: bool = False,
    bias: torch.dtype | None = None,
    static: str = "none",
    x_dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    device: str = "cpu",
) -> Call:
    """A call with uneven routing; a share of its rows has no expert.

    Args:
        sentinels: the share of such rows.
        concentrated: all other rows go to one expert.
        static: "none", "one" scale for all experts, or one for "each".
    """
    made = [
        oracle.make_weight(n, k, recipe, dtype=weight_dtype, scale_dtype=scale_dtype)
        for _ in range(min(experts, 8))
    ]
    picked = [made[(11 * expert + 3) % len(made)] for expert in range(experts)]
    weight, scale = (torch.stack(parts).to(device) for parts in zip(*picked, strict=True))
    ids = (torch.rand(rows) ** 2 * experts).long()
    if concentrated:
        ids[:] = experts // 2
    dropped = torch.rand(rows) < sentinels
    ids[dropped] = torch.where(torch.rand(rows) < 0.5, -1, experts)[dropped]
    largest = torch.iinfo(index_dtype).max
    ids = ids.clamp(max=largest).to(index_dtype)
    owners = [int(one) if 0 <= one < experts else None for one in ids.tolist()]
    indexed = way not in ("batched", "grouped")
    inputs = max(1, rows // 2) if indexed else rows
    x = torch.randn(inputs, k, device=device).to(x_dtype)
    arguments: dict[str, Any] = {
        "x": x,
        "weight": weight,
        "weight_scale": scale,
        "block_size": recipe.block_size,
        "bias": None if bias is None else torch.randn(experts, n, device=device).to(bias),
    }
    if static != "none":
        amax = x.float().abs().amax() if rows else torch.ones((), device=device)
        count = 1 if static == "one" else experts
        factors = 0.5 + torch.rand(count, device=device)
        arguments["activation_scale"] = amax / 448 * factors + 1e-3
    sources: list[int | None] = list(range(rows))
    targets: list[int | None] = list(range(rows))
    if indexed:
        gather = torch.randint(0, inputs, (rows,))
        gather[torch.rand(rows) < 0.1] = -1
        sources = [one if one >= 0 else None for one in gather.tolist()]
        narrow = torch.int32 if index_dtype in (torch.int8, torch.uint8, torch.int16) else None
        arguments["gather"] = gather.to(device=device, dtype=narrow or index_dtype)
    if way.startswith("batched"):
        # A stride of two: every other element of a longer vector.
        wide = torch.full((2 * rows,), 0, dtype=index_dtype)
        wide[::2] = ids
        arguments["expert_ids"] = wide.to(device)[::2]
        return Call(way, recipe, arguments, owners, sources, targets, rows)
    keys = [experts if owner is None else owner for owner in owners]
    order = sorted(range(rows), key=lambda row: keys[row])
    owners = [owners[row] for row in order]
    counts = torch.bincount(torch.tensor(keys, dtype=torch.int64), minlength=experts + 1)
    arguments["offsets"] = counts[:experts].cumsum(0).to(device=device, dtype=torch.int32)
    if way == "grouped-index":
        scatter = torch.randperm(rows)
        if rows > 3:
            scatter[rows // 2] = rows + 5  # written nowhere
        targets = [one if one < rows else None for one in scatter.tolist()]
        arguments["scatter"] = scatter.to(device)
    return Call(way, recipe, arguments, owners, sources, targets, rows)
