"""`FP8Experts`: the routed experts of a mixture-of-experts layer over frozen FP8 weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fp8dispatch import registry
from fp8dispatch.checks import check_choice, check_dense, check_size
from fp8dispatch.errors import InvalidInputError, ShapeError
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, SCALE_DTYPES
from fp8dispatch.frozen import FrozenTensors
from fp8dispatch.moe.activations import ExpertActivation, parse_activation
from fp8dispatch.moe.forward import Projection, experts_forward, explain_forward, has_halves
from fp8dispatch.moe.quantize import quantize_experts
from fp8dispatch.moe.validate import (
    check_expert_activation_scale,
    check_expert_bias,
    check_expert_operands,
)
from fp8dispatch.policy import check_backend
from fp8dispatch.prepare import expert_activation_scale_fp32
from fp8dispatch.recipe import BLOCK_128, Recipe, parse_block_size
from fp8dispatch.router import Decision

SCALE, BIAS, STATIC = "_scale_inv", "_bias", "_activation_scale"
DOWN = "down_proj"
LAYOUTS: dict[tuple[str, ...], bool] = {
    ("gate_up_proj",): True,
    ("gate_proj", "up_proj"): True,
    ("up_proj",): False,
}
"""The projections into the experts, and whether their experts are gated."""


class FP8Experts(FrozenTensors):
    """Routed experts, ``Y[t] = sum of w[t, j] * down(act(up(X[t])))`` over each token's experts.

    Parameters have the names and shapes that Transformers gives them, E experts from H to I
    columns and back:

    * ``gate_up_proj`` [E, 2 I, H] with the gate's rows first, or ``gate_proj`` and ``up_proj``
      [E, I, H] apart, or ``up_proj`` [E, I, H] alone where the experts are not gated;
    * ``down_proj`` [E, H, I];
    * of each ``*_scale_inv``: multipliers, ``value = data * scale``, in the shapes that
      `fp8_experts_grouped` takes; and where present ``*_bias`` [E, N] and
      ``*_activation_scale`` [E].

    ``.to(dtype)`` and the like move the weights and scales but never change their dtype; only
    biases follow the dtype. Gradients reach the tokens, the routing weights and the biases.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        gated: two projections in, the gate and up.
        fused: of gated experts: both in one ``gate_up_proj``.
        activation: a name such as ``"silu"``, or an `ExpertActivation`.
        bias: whether every projection adds a bias.
        recipe, block_size, dtype, scale_dtype, bias_dtype, static_activations, device, backend:
            as in `FP8Linear`; static activations have one scale for each expert.
        top_k: experts of each token, where `explain` and `warmup` have to assume it; calls take
            it from the ids.

    Raises:
        InvalidInputError: arguments that do not fit.
    """

    down_proj: nn.Parameter
    down_proj_scale_inv: nn.Parameter

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        gated: bool = True,
        fused: bool = True,
        activation: str | ExpertActivation = "silu",
        bias: bool = False,
        recipe: str | Recipe = BLOCK_128,
        block_size: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float8_e4m3fn,
        scale_dtype: torch.dtype = torch.float32,
        bias_dtype: torch.dtype | None = None,
        static_activations: bool = False,
        top_k: int = 1,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_size("num_experts", num_experts)
        check_size("hidden_size", hidden_size)
        check_size("intermediate_size", intermediate_size)
        check_choice("dtype", dtype, FLOAT8_DTYPES)
        check_choice("scale_dtype", scale_dtype, SCALE_DTYPES)
        bias_dtype = torch.get_default_dtype() if bias_dtype is None else bias_dtype
        check_choice("bias_dtype", bias_dtype, ACTIVATION_DTYPES)
        chosen = Recipe.parse(recipe, block_size)
        one = 127 if scale_dtype == torch.uint8 else 1.0  # 2 ** 0 as an E8M0 exponent
        names = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
        rows = 2 * intermediate_size if gated and fused else intermediate_size
        shapes = dict.fromkeys(names if gated else ("up_proj",), (rows, hidden_size))
        shapes[DOWN] = (hidden_size, intermediate_size)
        tensors = {}
        for name, (n, k) in shapes.items():
            codes = torch.zeros((num_experts, n, k), dtype=torch.uint8, device=device)
            tensors[name] = codes.view(dtype)
            scale_shape = (num_experts, *chosen.scale_shape(n, k))
            scale = torch.full(scale_shape, one, dtype=torch.float32, device=device)
            tensors[name + SCALE] = scale.to(scale_dtype)
            if bias:
                tensors[name + BIAS] = torch.zeros(num_experts, n, dtype=bias_dtype, device=device)
            if static_activations:
                tensors[name + STATIC] = torch.ones(num_experts, device=device)
        self._fill(tensors, chosen.block_size, activation, False, top_k, backend)

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, torch.Tensor],
        recipe: str | Recipe = BLOCK_128,
        *,
        block_size: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float8_e4m3fn,
        scale_dtype: torch.dtype = torch.float32,
        activation: str | ExpertActivation = "silu",
        top_k: int = 1,
        backend: str | None = None,
    ) -> FP8Experts:
        """Quantise the weights of experts; biases are shared, not copied.

        Args:
            weights: the tensors under the names of the class, in bf16, fp16 or fp32, without
                ``*_scale_inv``; biases and activation scales where wanted.
            recipe, block_size, dtype, scale_dtype: as in `quantize_experts`.
            activation, top_k, backend: as in the class.

        Raises:
            InvalidInputError, NumericalOverflowError: as `quantize_experts`.
        """
        chosen = Recipe.parse(recipe, block_size)
        tensors = dict(weights)
        for name in _projections(tensors):
            if name + SCALE in tensors:
                raise InvalidInputError(
                    f"from_weights quantises {name} itself, found {name + SCALE} as well; wrap "
                    f"quantised tensors with FP8Experts.from_tensors"
                )
            tensors[name], tensors[name + SCALE] = quantize_experts(
                tensors[name], chosen, dtype=dtype, scale_dtype=scale_dtype
            )
        return cls.from_tensors(
            tensors,
            block_size=chosen.block_size,
            activation=activation,
            split_scales=False,
            top_k=top_k,
            backend=backend,
        )

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        *,
        block_size: Sequence[int] | None = None,
        activation: str | ExpertActivation = "silu",
        split_scales: bool | None = None,
        top_k: int = 1,
        backend: str | None = None,
    ) -> FP8Experts:
        """Wrap FP8 experts as a checkpoint holds them, without copying.

        Args:
            tensors: the tensors under the names of the class.
            block_size: ``(block_n, block_k)`` of block scales; None infers the recipe.
            split_scales: of a fused ``gate_up_proj``: its scale is that of the gate followed by
                that of up, each quantised by itself. None infers it from the shape.
            activation, top_k, backend: as in the class.

        Raises:
            InvalidInputError: names, shapes or dtypes that do not fit together.
            AmbiguousRecipeError: a scale that can be read as split or not, with other numbers.
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._fill(tensors, block_size, activation, split_scales, top_k, backend)
        return module

    def _fill(
        self,
        tensors: Mapping[str, torch.Tensor],
        block_size: Sequence[int] | None,
        activation: str | ExpertActivation,
        split_scales: bool | None,
        top_k: int,
        backend: str | None,
    ) -> None:
        check_backend(backend, registry.NAMES)
        check_size("top_k", top_k)
        names = _projections(tensors)
        missing = [name + SCALE for name in names if name + SCALE not in tensors]
        if missing:
            raise InvalidInputError(
                f"FP8 experts need a scale for each projection, found none named "
                f"{', '.join(missing)}; quantise weights with FP8Experts.from_weights"
            )
        self.projections = names
        self.block_size = parse_block_size(block_size)
        self.top_k = top_k
        self.backend = backend
        self.activation = parse_activation(activation, LAYOUTS[names[:-1]])
        for name, tensor in tensors.items():
            if name.endswith(BIAS) and isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                grad = name.endswith(BIAS) and tensor.requires_grad
                self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=grad))
        self.frozen = tuple(name for name in tensors if not name.endswith(BIAS))
        self._check_shapes(names)
        first = self._projection(names[0])
        self.split_scales = names[0] == "gate_up_proj" and has_halves(
            first.weight, first.scale, self.block_size, split_scales
        )
        for name in names:
            whole = self._projection(name)
            parts = whole.halves() if name == names[0] and self.split_scales else (whole,)
            for part in parts:
                k = part.weight.shape[-1]
                check_expert_operands(part.weight, part.scale, k, self.block_size)
            check_expert_bias(whole.bias, whole.weight)
            static = whole.activation_scale
            check_expert_activation_scale(static, whole.weight)
            if static is not None and not static.is_meta:
                expert_activation_scale_fp32(static, self.num_experts)  # values that are positive

    def _check_shapes(self, names: tuple[str, ...]) -> None:
        down = getattr(self, DOWN)
        if down.dim() != 3:
            raise ShapeError(f"{DOWN} must be [E, H, I], found {list(down.shape)}")
        self.num_experts, self.hidden_size, self.intermediate_size = down.shape
        rows = self.intermediate_size * (2 if names[0] == "gate_up_proj" else 1)
        expected = [self.num_experts, rows, self.hidden_size]
        for name in names[:-1]:
            found = list(getattr(self, name).shape)
            if found != expected:
                raise ShapeError(
                    f"{name} must be {expected} beside a {DOWN} {list(down.shape)}, found {found}"
                )

    def _projection(self, name: str) -> Projection:
        return Projection(
            getattr(self, name),
            getattr(self, name + SCALE),
            getattr(self, name + BIAS, None),
            getattr(self, name + STATIC, None),
            self.block_size,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """[..., H] to [..., H]: the weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: [..., H] bfloat16, float16 or float32.
            top_k_index: [..., k] or [T, k] of any integer dtype; ids below 0 or from E on, as
                expert parallelism has them, add nothing.
            top_k_weights: as `top_k_index`, in a float dtype.

        Raises:
            InvalidInputError: arguments that do not fit.
        """
        return experts_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            self._into(),
            self.activation,
            self._projection(DOWN),
            backend=self.backend,
        )

    def explain(
        self, hidden_states: torch.Tensor, top_k: int | None = None, *, dgrad: bool | None = None
    ) -> dict[str, Decision]:
        """Which backend `forward` would run for each projection, and why not the others.

        Args:
            hidden_states: [..., H], whose values are not read.
            top_k: experts of each token, default that of the module.
            dgrad: also say how gradients reach the projections' inputs, as in `explain`.
        """
        top_k = self.top_k if top_k is None else top_k
        decisions = explain_forward(
            hidden_states,
            top_k,
            self._into(),
            self._projection(DOWN),
            backend=self.backend,
            dgrad=dgrad,
        )
        if self.split_scales:  # both halves of the first projection are the same problem
            decisions = decisions[1:]
        return dict(zip(self.projections, decisions, strict=True))

    def _into(self) -> Sequence[Projection]:
        up = [self._projection(name) for name in self.projections[:-1]]
        return up[0].halves() if self.split_scales else up

    def extra_repr(self) -> str:
        """Sizes, layout and dtypes, as ``print(model)`` shows them."""
        down = getattr(self, DOWN)
        recipe = check_expert_operands(
            down, getattr(self, DOWN + SCALE), self.intermediate_size, self.block_size
        ).recipe
        forced = f", backend={self.backend!r}" if self.backend is not None else ""
        return (
            f"experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, {'+'.join(self.projections[:-1])}, "
            f"bias={hasattr(self, DOWN + BIAS)}, recipe={recipe}, "
            f"dtype={str(down.dtype).removeprefix('torch.')}, {self.activation}{forced}"
        )


def _projections(tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The projections that these tensors hold, in order, the one back last.

    Raises:
        InvalidInputError: a projection or scale is missing, or a name belongs to none.
    """
    bare = {name for name in tensors if not name.endswith((SCALE, BIAS, STATIC))}
    for into in LAYOUTS:
        names = (*into, DOWN)
        if bare == set(names):
            break
    else:
        layouts = "; ".join(", ".join([*into, DOWN]) for into in LAYOUTS)
        raise InvalidInputError(f"experts need the tensors {layouts}; found {sorted(bare)}")
    allowed = {name + suffix for name in names for suffix in ("", SCALE, BIAS, STATIC)}
    for name, tensor in tensors.items():
        check_dense(name, tensor)
        if name not in allowed:
            raise InvalidInputError(
                f"{name} belongs to none of the projections {', '.join(names)}; leave it out"
            )
    return names
