"""What a static scale costs in a layer's output, measured on real inputs.

Statistics of the inputs cannot say whether clipping an outlier is worth it: massive activations
carry much of the output. So the ways are compared where the question arises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fp8dispatch.calibrate.methods import Method, amax_by
from fp8dispatch.calibrate.saturation import saturation
from fp8dispatch.calibrate.stats import CalibrationStats
from fp8dispatch.checks import check_activations
from fp8dispatch.errors import DTypeError
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.quantization.eager import scale_of

DYNAMIC = "dynamic"
"""The name of one scale per token among the ways that are compared."""


@dataclass(frozen=True)
class OutputError:
    """How far a layer's output is off with its inputs in E4M3 and its weight as it is.

    Attributes:
        total: ``|y - y_exact| / |y_exact|`` over all tokens (Frobenius). A massive activation
            carries most of it.
        median_token: the same for each token, and of those the median: what happens to the others.
    """

    total: float
    median_token: float


def compare_output_error(
    layer: nn.Linear, x: torch.Tensor, scales: Mapping[str, float]
) -> dict[str, OutputError]:
    """Run a layer with its inputs quantised in several ways.

    Args:
        layer: a linear layer.
        x: its inputs [..., K], real ones.
        scales: static scales to compare, ``value = data * scale``, by names of one's choice.

    Returns:
        The errors by those names, and under ``"dynamic"`` that of one scale per token.

    Raises:
        DTypeError, ShapeError: arguments that do not fit.
        ScaleValueError: a scale that is not finite and positive.
    """
    if not isinstance(layer, nn.Linear):
        raise DTypeError(f"layer must be a torch.nn.Linear, found {type(layer).__name__}")
    check_activations("x", x)
    ways: dict[str, float | None] = {**scales, DYNAMIC: None}
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])
        weight = layer.weight.float()
        exact = F.linear(rows.float(), weight)
        smallest = torch.finfo(torch.float32).tiny
        found = {}
        for name, scale in ways.items():
            static = None if scale is None else torch.tensor([scale], device=x.device)
            quantized = QuantizedActivation.from_tensor(rows, scale=static)
            error = F.linear(quantized.data.float() * quantized.scale, weight) - exact
            tokens = error.norm(dim=1) / exact.norm(dim=1).clamp(min=smallest)
            total = error.norm() / exact.norm().clamp(min=smallest)
            found[name] = OutputError(float(total), float(tokens.median()))
    return found


def output_errors(
    model: nn.Module, stats: CalibrationStats, forward: Callable[[], object], most: int = 16
) -> dict[str, dict[str, OutputError]]:
    """`compare_output_error` for the layers with outliers: methods max and percentile.

    Args:
        model: the model of the statistics.
        stats: what was found on it.
        forward: runs it once on real inputs; the first sample of the batch is used.
        most: how many layers, those with the largest outliers first.

    Returns:
        By the layers' names; empty where no ``nn.Linear`` has outliers.
    """
    flagged = [row.name for row in saturation(stats) if row.level != "fine"]
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if name in flagged[:most] and isinstance(layer, nn.Linear)
    }
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs.setdefault(name, arguments[0][:1].detach().clone())

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        if layers:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: compare_output_error(layer, inputs[name], _scales(stats, name))
        for name, layer in layers.items()
        if name in inputs
    }


def _scales(stats: CalibrationStats, name: str) -> dict[str, float]:
    """The scales that one layer would get from the methods that differ on outliers."""
    magnitudes = stats.modules[name].magnitudes()
    methods: tuple[Method, ...] = ("max", "percentile")
    limits = [amax_by(method, magnitudes, percentile=stats.percentile) for method in methods]
    scales = scale_of(torch.tensor(limits), torch.float8_e4m3fn).tolist()
    return dict(zip(methods, scales, strict=True))
