"""FP8 linear layers that run on the fastest right backend, and say why.

``fp8_linear(x, weight, weight_scale, bias)`` is a linear layer over an FP8 weight. Importing this
package loads nothing heavy, not even torch; each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fp8dispatch.decide import stats
    from fp8dispatch.errors import (
        AmbiguousRecipeError,
        BackendUnavailableError,
        ConfigurationError,
        DeviceError,
        DTypeError,
        FP8DispatchError,
        FrozenWeightError,
        InvalidInputError,
        NumericalOverflowError,
        Refusal,
        ScaleValueError,
        ShapeError,
        UnknownBackendError,
        UnsupportedTransformError,
    )
    from fp8dispatch.explanation import explain
    from fp8dispatch.fused_linear import rms_norm_linear, silu_mul_linear
    from fp8dispatch.integrations.finegrained_fp8 import fp8_act_quant, w8a8_block_fp8_matmul
    from fp8dispatch.integrations.unsloth import (
        FbgemmFp8Linear_matmul,
        FP8BlockQuantLinear,
        act_quant,
        fbgemm_fp8_linear,
        fp8_block_quant_linear,
        w8a8_block_fp8_matmul_triton,
        weight_dequant,
    )
    from fp8dispatch.linear import fp8_linear, fp8_linear_quantized
    from fp8dispatch.modules import ConversionReport, FP8Linear, convert_model
    from fp8dispatch.offset8 import FP8Format
    from fp8dispatch.overrides import set_backend, use_backend
    from fp8dispatch.policy import reload_environment
    from fp8dispatch.prepare import invalidate
    from fp8dispatch.problem import Accuracy, LinearProblem
    from fp8dispatch.quantization.activation import QuantizedActivation
    from fp8dispatch.quantization.fused_activation import rms_norm_quantize, silu_mul_quantize
    from fp8dispatch.quantization.weight import dequantize, quantize
    from fp8dispatch.recipe import Granularity, Recipe
    from fp8dispatch.router import Assessment, Decision, Standing
    from fp8dispatch.warm import WarmedLayer, warmup

# Module -> the public names that live there.
_HOMES: dict[str, tuple[str, ...]] = {
    "decide": ("stats",),
    "errors": (
        "AmbiguousRecipeError",
        "BackendUnavailableError",
        "ConfigurationError",
        "DTypeError",
        "DeviceError",
        "FP8DispatchError",
        "FrozenWeightError",
        "InvalidInputError",
        "NumericalOverflowError",
        "Refusal",
        "ScaleValueError",
        "ShapeError",
        "UnknownBackendError",
        "UnsupportedTransformError",
    ),
    "explanation": ("explain",),
    "fused_linear": ("rms_norm_linear", "silu_mul_linear"),
    "integrations.finegrained_fp8": ("fp8_act_quant", "w8a8_block_fp8_matmul"),
    "integrations.unsloth": (
        "FP8BlockQuantLinear",
        "FbgemmFp8Linear_matmul",
        "act_quant",
        "fbgemm_fp8_linear",
        "fp8_block_quant_linear",
        "w8a8_block_fp8_matmul_triton",
        "weight_dequant",
    ),
    "linear": ("fp8_linear", "fp8_linear_quantized"),
    "modules": ("ConversionReport", "FP8Linear", "convert_model"),
    "offset8": ("FP8Format",),
    "overrides": ("set_backend", "use_backend"),
    "policy": ("reload_environment",),
    "prepare": ("invalidate",),
    "problem": ("Accuracy", "LinearProblem"),
    "quantization.activation": ("QuantizedActivation",),
    "quantization.fused_activation": ("rms_norm_quantize", "silu_mul_quantize"),
    "quantization.weight": ("dequantize", "quantize"),
    "recipe": ("Granularity", "Recipe"),
    "router": ("Assessment", "Decision", "Standing"),
    "warm": ("WarmedLayer", "warmup"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Accuracy",
    "AmbiguousRecipeError",
    "Assessment",
    "BackendUnavailableError",
    "ConfigurationError",
    "ConversionReport",
    "DTypeError",
    "Decision",
    "DeviceError",
    "FP8BlockQuantLinear",
    "FP8DispatchError",
    "FP8Format",
    "FP8Linear",
    "FbgemmFp8Linear_matmul",
    "FrozenWeightError",
    "Granularity",
    "InvalidInputError",
    "LinearProblem",
    "NumericalOverflowError",
    "QuantizedActivation",
    "Recipe",
    "Refusal",
    "ScaleValueError",
    "ShapeError",
    "Standing",
    "UnknownBackendError",
    "UnsupportedTransformError",
    "WarmedLayer",
    "__version__",
    "act_quant",
    "convert_model",
    "dequantize",
    "explain",
    "fbgemm_fp8_linear",
    "fp8_act_quant",
    "fp8_block_quant_linear",
    "fp8_linear",
    "fp8_linear_quantized",
    "invalidate",
    "quantize",
    "reload_environment",
    "rms_norm_linear",
    "rms_norm_quantize",
    "set_backend",
    "silu_mul_linear",
    "silu_mul_quantize",
    "stats",
    "use_backend",
    "w8a8_block_fp8_matmul",
    "w8a8_block_fp8_matmul_triton",
    "warmup",
    "weight_dequant",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'fp8dispatch' has no attribute {name!r}")
    value = getattr(import_module(f"fp8dispatch.{home}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
