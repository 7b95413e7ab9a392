"""`FP8Linear`, the module, and `convert_model`, which puts FP8 layers in place of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fp8dispatch import registry
from fp8dispatch.checks import check_activation_scale, check_bias, check_choice, check_size
from fp8dispatch.errors import DTypeError, InvalidInputError, NumericalOverflowError
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, SCALE_DTYPES
from fp8dispatch.frozen import FrozenTensors
from fp8dispatch.linear import explain, fp8_linear
from fp8dispatch.moe.convert import convert_experts, is_experts, why_left_alone
from fp8dispatch.moe.experts import FP8Experts
from fp8dispatch.names import matches
from fp8dispatch.policy import check_backend
from fp8dispatch.prepare import activation_scale_fp32
from fp8dispatch.quantization.weight import quantize
from fp8dispatch.recipe import BLOCK_128, Recipe
from fp8dispatch.router import Decision
from fp8dispatch.validate import check_operands

T = TypeVar("T")


class FP8Linear(FrozenTensors):
    """A linear layer over a frozen FP8 weight, ``y = x @ (weight * weight_scale).T + bias``.

    ``.to(dtype)``, ``.half()`` and the like move the weight and the scales but never change their
    dtype; only the bias follows the dtype. The state dict holds ``weight``, ``weight_scale`` and,
    where present, ``bias`` and ``activation_scale``.

    Args:
        in_features: K.
        out_features: N.
        bias: whether a bias [N] is added.
        recipe: ``"tensor"``, ``"row"``, ``"block"`` or a `Recipe`.
        block_size: ``(block_n, block_k)`` of the block recipe, default (128, 128).
        dtype: FP8 dtype of the weight.
        scale_dtype: dtype of the weight scale.
        bias_dtype: dtype of the bias, default torch's default dtype.
        static_activations: keep an ``activation_scale`` of one element beside the weight.
        device: where to put the tensors; a new layer holds zeros with scale 1.
        backend: run this backend or raise; None chooses per call.

    Raises:
        InvalidInputError: arguments that do not fit.
    """

    frozen = ("weight", "weight_scale", "activation_scale")
    weight: nn.Parameter
    weight_scale: nn.Parameter
    bias: nn.Parameter | None
    activation_scale: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: str | Recipe = BLOCK_128,
        block_size: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float8_e4m3fn,
        scale_dtype: torch.dtype = torch.float32,
        bias_dtype: torch.dtype | None = None,
        static_activations: bool = False,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        check_choice("dtype", dtype, FLOAT8_DTYPES)
        check_choice("scale_dtype", scale_dtype, SCALE_DTYPES)
        bias_dtype = torch.get_default_dtype() if bias_dtype is None else bias_dtype
        check_choice("bias_dtype", bias_dtype, ACTIVATION_DTYPES)
        chosen = Recipe.parse(recipe, block_size)
        scale_shape = chosen.scale_shape(out_features, in_features)
        one = 127 if scale_dtype == torch.uint8 else 1.0  # 2 ** 0 as an E8M0 exponent
        weight = torch.zeros((out_features, in_features), dtype=torch.uint8, device=device)
        scale = torch.full(scale_shape, one, dtype=torch.float32, device=device).to(scale_dtype)
        self._fill(
            weight.view(dtype),
            scale,
            torch.zeros(out_features, dtype=bias_dtype, device=device) if bias else None,
            torch.ones(1, device=device) if static_activations else None,
            chosen,
            backend,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        recipe: str | Recipe = BLOCK_128,
        *,
        block_size: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float8_e4m3fn,
        scale_dtype: torch.dtype = torch.float32,
        activation_scale: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> FP8Linear:
        """Quantise a linear layer's weight; the bias is shared, not copied.

        Raises:
            InvalidInputError, NumericalOverflowError: as `fp8dispatch.quantize`.
        """
        if not isinstance(linear, nn.Linear):
            raise DTypeError(f"from_linear needs a torch.nn.Linear, found {type(linear).__name__}")
        check_backend(backend, registry.NAMES)
        check_activation_scale(activation_scale, linear.weight)
        chosen = Recipe.parse(recipe, block_size)
        data, scale = quantize(linear.weight.detach(), chosen, dtype=dtype, scale_dtype=scale_dtype)
        return cls._assemble(data, scale, linear.bias, activation_scale, chosen, backend)

    @classmethod
    def from_tensors(
        cls,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        block_size: Sequence[int] | None = None,
        activation_scale: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> FP8Linear:
        """Wrap an FP8 weight [N, K] and its scale as a checkpoint holds them, without copying.

        Raises:
            InvalidInputError: shapes or dtypes that `fp8_linear` would refuse too.
        """
        operands = check_operands(weight, weight_scale, None, block_size)
        check_bias(bias, operands.weight.shape[0], weight)
        return cls._assemble(weight, weight_scale, bias, activation_scale, operands.recipe, backend)

    @classmethod
    def _assemble(
        cls,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        activation_scale: torch.Tensor | None,
        recipe: Recipe,
        backend: str | None,
    ) -> FP8Linear:
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._fill(weight, weight_scale, bias, activation_scale, recipe, backend)
        return module

    def _fill(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        activation_scale: torch.Tensor | None,
        recipe: Recipe,
        backend: str | None,
    ) -> None:
        check_backend(backend, registry.NAMES)
        check_activation_scale(activation_scale, weight)
        if activation_scale is not None and not activation_scale.is_meta:
            activation_scale_fp32(activation_scale)  # raises on a value that is not positive
        self.out_features, self.in_features = weight.shape
        self.recipe = recipe
        self.backend = backend
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale.detach(), requires_grad=False)
        if activation_scale is None:
            self.register_parameter("activation_scale", None)
        else:
            self.activation_scale = nn.Parameter(activation_scale.detach(), requires_grad=False)
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N] in the dtype of `x`, or autocast's; see `fp8_linear`."""
        return fp8_linear(
            x,
            self.weight,
            self.weight_scale,
            self.bias,
            block_size=self.recipe.block_size,
            activation_scale=self.activation_scale,
            backend=self.backend,
        )

    def explain(self, x: torch.Tensor, *, dgrad: bool | None = None) -> Decision:
        """Which backend `forward` would run for `x`, and why not the others; see `explain`."""
        return explain(
            x,
            self.weight,
            self.weight_scale,
            self.bias,
            block_size=self.recipe.block_size,
            activation_scale=self.activation_scale,
            backend=self.backend,
            dgrad=dgrad,
        )

    def extra_repr(self) -> str:
        """Sizes, recipe and dtypes, as ``print(model)`` shows them."""
        static = ", static activations" if self.activation_scale is not None else ""
        forced = f", backend={self.backend!r}" if self.backend is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, recipe={self.recipe}, "
            f"dtype={str(self.weight.dtype).removeprefix('torch.')}{static}{forced}"
        )


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_model` did.

    Attributes:
        converted: names of the layers that are FP8 now.
        skipped: (name, reason) of the linear layers and experts that were left alone.
        unmatched: entries of `skip` that none of these answered to.
        bytes_before, bytes_after: memory of the converted weights, scales included afterwards.
    """

    converted: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    unmatched: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def convert_model(
    model: nn.Module,
    recipe: str | Recipe = BLOCK_128,
    *,
    skip: Iterable[str] = ("lm_head",),
    block_size: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    activation_scales: Mapping[str, float] | None = None,
    backend: str | None = None,
) -> ConversionReport:
    """Replace every ``nn.Linear`` of a model by an `FP8Linear`, in place, and fused experts too.

    Experts as Transformers holds them become `FP8Experts`. They are left alone where that would
    compute something else (a norm behind each expert, a gate that is no `ExpertActivation`); the
    report says why. So are subclasses of ``nn.Linear``: their owners read their weights directly
    (``nn.MultiheadAttention`` does), or they compute something else. So are layers with hooks. A
    weight that two layers share is quantised once and stays shared.

    Args:
        model: any module; a bare ``nn.Linear`` cannot be replaced in place and is refused.
        recipe, block_size, dtype, scale_dtype, backend: as in `FP8Linear.from_linear`.
        skip: what to leave alone: parts of a dotted name (``"lm_head"`` also means
            ``"model.lm_head"``, ``"pooler"`` all that is inside ``"encoder.pooler"``), or a
            pattern for the whole name such as ``"*.layers.[0-3].*"``.
        activation_scales: static scales by the layers' names, as `fp8dispatch.activation_scales`
            gives them; layers without one compute theirs per token.

    Returns:
        What was converted, and what was skipped and why.

    Raises:
        InvalidInputError: the model is an ``nn.Linear`` itself, `skip` is a bare string, an
            activation scale is that of no linear layer, or a weight has a dtype that cannot be
            quantised; the message then names the layer.
        NumericalOverflowError: a weight holds NaN or infinity; the message names the layer.
            Layers are replaced only after all of them could be quantised.
    """
    chosen = Recipe.parse(recipe, block_size)
    if not isinstance(model, nn.Module) or isinstance(model, nn.Linear) or is_experts(model):
        raise InvalidInputError(
            f"convert_model needs a module that holds linear layers, found "
            f"{type(model).__name__}; use FP8Linear.from_linear for a single layer, "
            f"FP8Experts.from_weights for one layer's experts"
        )
    check_choice("dtype", dtype, FLOAT8_DTYPES)
    check_choice("scale_dtype", scale_dtype, SCALE_DTYPES)
    check_backend(backend, registry.NAMES)
    patterns = _names(skip)
    unmatched = set(patterns)
    static = _static_scales(model, activation_scales)
    options = {"dtype": dtype, "scale_dtype": scale_dtype, "backend": backend}
    replacements: dict[str, FP8Linear | FP8Experts] = {}
    skipped: list[tuple[str, str]] = []
    # One layer under two names stays one layer,
    made: dict[nn.Module, FP8Linear | FP8Experts] = {}
    quantized: dict[torch.Tensor, FP8Linear] = {}  # and a weight shared by two layers is shared
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear) and not is_experts(module):
            continue
        matched = [pattern for pattern in patterns if matches(name, pattern)]
        unmatched.difference_update(matched)
        reason = f"skip={matched[0]!r}" if matched else _why_left_alone(module)
        if reason is not None:
            skipped.append((name, reason))
            continue
        if module not in made and isinstance(module, nn.Linear):
            twin = quantized.get(module.weight)
            linear = _named(name, _convert_layer, module, twin, chosen, static.get(name), **options)
            quantized.setdefault(module.weight, linear)
            made[module] = linear
        elif module not in made:
            made[module] = _named(name, convert_experts, module, chosen, **options)
        made[module].train(module.training)
        replacements[name] = made[module]
    experts = [(old, new) for old, new in made.items() if isinstance(new, FP8Experts)]
    before = sum(weight.nbytes for weight in quantized)
    before += sum(old.get_parameter(one).nbytes for old, new in experts for one in new.projections)
    after = sum(new.weight.nbytes + new.weight_scale.nbytes for new in quantized.values())
    after += sum(new.get_parameter(one).nbytes for _, new in experts for one in new.frozen)
    for name, layer in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return ConversionReport(
        tuple(replacements),
        tuple(skipped),
        tuple(pattern for pattern in patterns if pattern in unmatched),
        before,
        after,
    )


def _static_scales(model: nn.Module, scales: Mapping[str, float] | None) -> dict[str, torch.Tensor]:
    """The scales as tensors beside their layers' weights, or the error of a name without layer."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name, scale in (scales or {}).items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise InvalidInputError(
                f"activation_scales must name linear layers of the model, found {name!r}, which is "
                f"none; calibrate this model, with its layers named as they are here"
            )
        found[name] = torch.tensor([scale], dtype=torch.float32, device=layer.weight.device)
    return found


def _why_left_alone(layer: nn.Module) -> str | None:
    if not isinstance(layer, nn.Linear):
        return why_left_alone(layer)
    if type(layer) is not nn.Linear:
        return f"a subclass of nn.Linear ({type(layer).__name__})"
    if layer.weight.numel() == 0:
        return "an empty weight"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "hooks are registered on it, which a replacement would lose"
    return None


def _named(name: str, convert: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """``convert(...)``, whose errors then say which layer they are about."""
    try:
        return convert(*arguments, **options)
    except (InvalidInputError, NumericalOverflowError) as error:
        raise type(error)(f"layer {name!r}: {error}") from error


def _convert_layer(
    layer: nn.Linear,
    twin: FP8Linear | None,
    recipe: Recipe,
    activation_scale: torch.Tensor | None,
    **options: Any,
) -> FP8Linear:
    """The FP8 form of a layer; `twin` is that of a layer over the same weight."""
    if twin is None:
        return FP8Linear.from_linear(layer, recipe, activation_scale=activation_scale, **options)
    return FP8Linear._assemble(
        twin.weight, twin.weight_scale, layer.bias, activation_scale, recipe, twin.backend
    )


def _names(skip: object) -> tuple[str, ...]:
    if isinstance(skip, Iterable) and not isinstance(skip, str):
        patterns = tuple(skip)
        wrong = [pattern for pattern in patterns if not isinstance(pattern, str)]
        if not wrong:
            return patterns
        skip = wrong[0]
    raise DTypeError(f"skip must be a list of names such as ['lm_head'], found {skip!r}")
