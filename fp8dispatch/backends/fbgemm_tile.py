"""FBGEMM's block GEMM whose activations have one scale for each 128x128 tile; see `fbgemm_family`.

``f8f8bf16_blockwise(xq, wq, x_scale, w_scale, block_m, block_n, block_k)`` wants scales
[ceil(M / 128), ceil(K / 128)] and [ceil(N / 128), ceil(K / 128)], both row-major, which it checks;
K a multiple of 16, N of 8, blocks of 128 alone; no bias. Capability 9.0 only, which it does not
check: elsewhere the kernel returns without computing. Before FBGEMM 1.4.0 its numbers were wrong
(pytorch/FBGEMM#5002).

Tokens of a tile share its scale, so a token's numbers depend on its neighbours, and differ from
those of 1x128 groups. Whoever wants that names the backend; no other call gets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.backends.fbgemm import Fbgemm
from fp8dispatch.backends.fbgemm_family import FbgemmFamily
from fp8dispatch.backends.library import GROUP, refuse_block, refuse_operands
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.recipe import Granularity

BLOCKWISE = "f8f8bf16_blockwise"


class TileScales(FbgemmFamily):
    """The tile-wise GEMM of either library, over the backend of that library."""

    opt_in = (
        "it scales activations in 128x128 tiles, which gives other numbers than one scale per "
        "token and 128 columns"
    )
    rows_per_scale = GROUP
    block_operator = BLOCKWISE
    recipes = frozenset({Granularity.BLOCK})
    accuracies = frozenset({Accuracy.EXACT})
    capabilities = ((9, 0),)
    # Each library's own to say, whatever is known of its other operators.
    verified_capabilities: ClassVar[tuple[tuple[int, int], ...]] = ()
    verified_versions: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    _blocks = computed_in("fp8dispatch.backends.compute.fbgemm_tile")

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        refusals = [*refuse_operands(problem, contiguous=True), *refuse_block(problem)]
        if problem.static_activation:
            need = "dynamic activations, which it scales in 128x128 tiles"
            refusals.append(Refusal("static", need, "one static activation scale"))
        return [*refusals, *self.refuse_older(machine, self.block_since, "for right block scales")]

    def row_multiple(self, problem: LinearProblem) -> int:
        return 1


class FbgemmTile(TileScales, Fbgemm):
    """Tile-wise CUTLASS kernel of FBGEMM GenAI."""

    name = "fbgemm_tile"
    verified_capabilities = Fbgemm.verified_capabilities  # run with the same release
    verified_versions = Fbgemm.verified_versions


BACKEND = FbgemmTile()
