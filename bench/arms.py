"""What is timed: every backend of the registry on one shape, each checked before it is timed.

An arm is a function without arguments. `Checked.arms` holds those whose numbers are right; of the
others it says what they refused or how they are wrong, and they are never timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

import fp8dispatch
from fp8dispatch import registry
from fp8dispatch.backends.contract import Weight
from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.failures import is_sticky_cuda_error
from fp8dispatch.formats import activation_float8
from fp8dispatch.prepare import weight_scale_fp32
from fp8dispatch.problem import Accuracy
from fp8dispatch.quantization.activation import QuantizedActivation, quantize_activation
from fp8dispatch.quantization.weight import block_of
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR, Granularity, Recipe
from tests import oracle

Arm = Callable[[], torch.Tensor]
T = TypeVar("T")
RECIPES: dict[str, Recipe] = {
    "block": BLOCK_128,
    "row": ROW,
    "tensor": TENSOR,
    "group": Recipe(Granularity.BLOCK, (1, 128)),
}
LIBRARIES = ("fbgemm", "mslk", "deepgemm", "torchao", "fbgemm_tile", "mslk_tile")
"""Backends that need more than torch and triton."""
SLOW_TO_TUNE = "torchao"
TUNED = ((16, 4096, 7168), (4096, 4096, 7168))
"""TorchAO times 48 configurations at the first call of each size: these sizes have to do."""
# Its own quantiser lays scales out as its kernel reads them; ours does, for rows padded to 4.
_ROWS_PADDED = {"gluon": 4}
_TILE, _COLUMNS = 128, 384


@dataclass
class Checked:
    """The arms of one point that may be timed, and why the others may not."""

    arms: dict[str, Arm] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def try_arm(self, name: str, arm: Arm, check: Callable[[torch.Tensor], None]) -> bool:
        """Run an arm over poisoned memory and take it in when `check` raises nothing."""
        try:
            with poisoned():
                out = arm()
            check(out)
        except BackendUnavailableError as refusal:
            self.refused[name] = str(refusal)
        except AssertionError as error:
            self.wrong[name] = str(error)
        else:
            self.arms[name] = arm
            return True
        return False

    def captured(self, makers: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """What each maker gives; an arm that cannot be captured in a graph is refused for it.

        Raises:
            RuntimeError: a maker's error that has cost the CUDA context.
        """
        made = {}
        for name, make in makers.items():
            try:
                made[name] = make()
            except RuntimeError as error:
                if is_sticky_cuda_error(error):
                    raise
                self.refused[f"{name}, captured"] = str(error).strip().splitlines()[0]
        return made

    def told(self) -> dict[str, Any]:
        """What a row says of arms that are not timed."""
        said: dict[str, Any] = {"refused": self.refused, "wrong": self.wrong}
        return {key: value for key, value in said.items() if value}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an output that nobody writes cannot pass by luck."""
    mode = torch.get_deterministic_debug_mode()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # Deterministic mode is on for its fill alone.
            warnings.filterwarnings("ignore", message=".*eterministic.*", category=UserWarning)
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.set_deterministic_debug_mode(mode)


class Linear:
    """The operands of one linear layer, normally distributed, and what multiplies them.

    Attributes:
        x: [M, K] bf16.
        dense: [N, K] bf16, the weight before it was quantised.
        weights: copies of the FP8 weight with its scale, for chains that must not find it in L2.
    """

    def __init__(
        self, m: int, n: int, k: int, recipe: Recipe, device: str, *, copies: int = 1
    ) -> None:
        self.m, self.n, self.k, self.recipe = m, n, k, recipe
        self.x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        self.dense = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        data, scale = fp8dispatch.quantize(self.dense, recipe)
        self.weights = [(data, scale)]
        self.weights += [(data.clone(), scale.clone()) for _ in range(copies - 1)]
        self._truths: dict[tuple[int, bool], oracle.Truth] = {}
        self._quantized: dict[tuple[int, int, bool | None], QuantizedActivation] = {}

    def whole(self, name: str | None, copy: int = 0) -> Arm:
        """bf16 in, bf16 out, through `fp8_linear`; None takes the automatic choice."""
        data, scale = self.weights[copy]
        block = self.recipe.block_size
        return lambda: fp8dispatch.fp8_linear(self.x, data, scale, block_size=block, backend=name)

    def alone(self, name: str, copy: int = 0) -> Arm:
        """The multiplication alone, on activations that are quantised and laid out for it.

        Raises:
            BackendUnavailableError: the backend refuses the call.
        """
        problem = self.explain(name).problem
        backend = registry.load(name)
        data, scale = self.weights[copy]
        fp32 = weight_scale_fp32(scale, self.recipe, self.n, self.k)
        weight = Weight(data, fp32, self.recipe, scale)
        quantized = self.quantized(name)
        return lambda: backend.matmul(quantized, weight, None, problem)

    def quantized(self, name: str) -> QuantizedActivation:
        """The activations as a backend has them quantised in its whole linear."""
        backend = registry.load(name)
        pad = _ROWS_PADDED.get(name, backend.row_multiple(self.explain(name).problem))
        key = (pad, backend.rows_per_scale, backend.quantizes_with_kernels)
        if key not in self._quantized:
            self._quantized[key] = quantize_activation(
                self.x,
                self.recipe.group_size(self.k),
                activation_float8(self.weights[0][0].dtype),
                pad_rows_to=pad,
                rows_per_scale=backend.rows_per_scale,
                use_kernels=backend.quantizes_with_kernels,
            )
        return self._quantized[key]

    def bf16(self) -> Arm:
        """The layer as it was."""
        return lambda: torch.nn.functional.linear(self.x, self.dense)

    def explain(self, name: str | None) -> Any:
        """The decision for this call."""
        data, scale = self.weights[0]
        block = self.recipe.block_size
        return fp8dispatch.explain(self.x, data, scale, block_size=block, backend=name)

    def check(self, name: str | None, accuracy: Accuracy = Accuracy.EXACT) -> Callable[..., None]:
        """A check of the output of a backend (None: plain bf16): first and last rows and columns.

        The check raises AssertionError. Its truth is float64 on the same quantised operands.
        """
        rows_per_scale, quantizes = 1, False
        if name is not None:
            backend = registry.load(name)
            rows_per_scale, quantizes = backend.rows_per_scale, backend.quantizes_activations
        truth = self._truth(rows_per_scale, quantizes, dense=name is None)
        exact = accuracy is Accuracy.EXACT and name is not None
        limit = oracle.EXACT_ACCUMULATION if exact else oracle.FAST_ACCUMULATION

        def check(out: torch.Tensor) -> None:
            assert out.shape == (self.m, self.n), f"{name}: shape {tuple(out.shape)}"
            part = out[self._rows()][:, self._columns()]
            oracle.assert_matches(part, truth, accumulation=limit, label=name or "bf16")

        return check

    def _rows(self) -> torch.Tensor:
        """The first, a middle and the last tile of rows, each whole: tiles may share a scale."""
        starts = sorted({0, self.m // 2 // _TILE * _TILE, (self.m - 1) // _TILE * _TILE})
        tiles = [torch.arange(start, min(start + _TILE, self.m)) for start in starts]
        return torch.cat(tiles).to(self.x.device)

    def _columns(self) -> torch.Tensor:
        """About a thousand columns of the output: the first, some in the middle, the last."""
        starts = (0, self.n // 2, max(self.n - _COLUMNS, 0))
        ranges = [torch.arange(start, min(start + _COLUMNS, self.n)) for start in starts]
        return torch.cat(ranges).unique().to(self.x.device)

    def _truth(self, rows_per_scale: int, quantizes: bool, *, dense: bool) -> oracle.Truth:
        key = (rows_per_scale, quantizes) if not dense else (0, False)
        if key not in self._truths:
            x = self.x[self._rows()]
            wide = x.double()
            if quantizes:
                wide = oracle.dequantized_activations(x, self.recipe, rows_per_scale=rows_per_scale)
            columns = self._columns()
            weight = self.dense[columns].double() if dense else self._dequantized(columns)
            self._truths[key] = oracle.truth(wide, weight)
        return self._truths[key]

    def _dequantized(self, columns: torch.Tensor) -> torch.Tensor:
        """Rows of the weight [len(columns), K] in float64, without the others."""
        data, scale = self.weights[0]
        height, width = block_of(self.recipe, self.n, self.k)
        grid = scale.double().reshape(-(-self.n // height), -(-self.k // width))
        of_column = torch.arange(self.k, device=data.device) // width
        return data[columns].float().double() * grid[columns // height][:, of_column]


def backends_for(names: tuple[str, ...] | None, m: int, n: int, k: int) -> tuple[str, ...]:
    """The backends to try on a shape: those asked for, or all but `eager` where tuning is short."""
    if names is not None:
        return names
    slow = () if (m, n, k) in TUNED else (SLOW_TO_TUNE,)
    found = tuple(name for name in registry.NAMES if name not in ("eager", *slow))
    return found if torch.cuda.is_available() else (*found, "eager")


def selectable(names: Mapping[str, Any]) -> list[str]:
    """Those that the automatic choice may take: what must be named computes other numbers."""
    return [name for name in names if name in registry.NAMES and not registry.load(name).opt_in]
