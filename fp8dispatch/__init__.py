"""FP8 linear layers that run on the fastest right backend, and say why.

``fp8_linear(x, weight, weight_scale, bias)`` is a linear layer over an FP8 weight. Importing this
package loads nothing heavy, not even torch; each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fp8dispatch.calibrate.delayed import DelayedScaling
    from fp8dispatch.calibrate.observe import Calibrator
    from fp8dispatch.calibrate.scales import activation_scales, kv_cache_scales
    from fp8dispatch.calibrate.stats import CalibrationStats
    from fp8dispatch.decide import stats
    from fp8dispatch.errors import (
        AmbiguousRecipeError,
        BackendUnavailableError,
        CalibrationError,
        CheckpointError,
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
    from fp8dispatch.integrations.finegrained_fp8 import (
        fp8_act_quant,
        w8a8_block_fp8_matmul,
        w8a8_block_fp8_matmul_batched,
        w8a8_block_fp8_matmul_grouped,
    )
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
    from fp8dispatch.moe.activations import ExpertActivation
    from fp8dispatch.moe.experts import FP8Experts
    from fp8dispatch.moe.matmul import (
        explain_experts,
        fp8_experts_batched,
        fp8_experts_grouped,
    )
    from fp8dispatch.moe.quantize import dequantize_experts, quantize_experts
    from fp8dispatch.offset8 import FP8Format
    from fp8dispatch.overrides import set_backend, use_backend
    from fp8dispatch.pack.convert import convert
    from fp8dispatch.pack.inspection import inspect
    from fp8dispatch.pack.load import load
    from fp8dispatch.pack.options import PackOptions
    from fp8dispatch.pack.packing import pack_checkpoint
    from fp8dispatch.pack.plan import plan_checkpoint
    from fp8dispatch.pack.unpack import unpack
    from fp8dispatch.pack.verification import verify
    from fp8dispatch.policy import reload_environment
    from fp8dispatch.prepare import invalidate
    from fp8dispatch.problem import Accuracy, LinearProblem
    from fp8dispatch.quantization.activation import QuantizedActivation
    from fp8dispatch.quantization.fused_activation import rms_norm_quantize, silu_mul_quantize
    from fp8dispatch.quantization.groups import pack_to_fp8_e4m3
    from fp8dispatch.quantization.kv_cache import KVCacheQuantizer, KVScales
    from fp8dispatch.quantization.weight import dequantize, quantize
    from fp8dispatch.recipe import Granularity, Recipe
    from fp8dispatch.router import Assessment, Decision, Standing
    from fp8dispatch.tuning.run import TuningReport, tune
    from fp8dispatch.warm import WarmedLayer, warmup

# Module -> the public names that live there.
_HOMES: dict[str, tuple[str, ...]] = {
    "calibrate.delayed": ("DelayedScaling",),
    "calibrate.observe": ("Calibrator",),
    "calibrate.scales": ("activation_scales", "kv_cache_scales"),
    "calibrate.stats": ("CalibrationStats",),
    "decide": ("stats",),
    "errors": (
        "AmbiguousRecipeError",
        "BackendUnavailableError",
        "CalibrationError",
        "CheckpointError",
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
    "integrations.finegrained_fp8": (
        "fp8_act_quant",
        "w8a8_block_fp8_matmul",
        "w8a8_block_fp8_matmul_batched",
        "w8a8_block_fp8_matmul_grouped",
    ),
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
    "moe.activations": ("ExpertActivation",),
    "moe.experts": ("FP8Experts",),
    "moe.matmul": ("explain_experts", "fp8_experts_batched", "fp8_experts_grouped"),
    "moe.quantize": ("dequantize_experts", "quantize_experts"),
    "offset8": ("FP8Format",),
    "overrides": ("set_backend", "use_backend"),
    "pack.convert": ("convert",),
    "pack.inspection": ("inspect",),
    "pack.load": ("load",),
    "pack.options": ("PackOptions",),
    "pack.packing": ("pack_checkpoint",),
    "pack.plan": ("plan_checkpoint",),
    "pack.unpack": ("unpack",),
    "pack.verification": ("verify",),
    "policy": ("reload_environment",),
    "prepare": ("invalidate",),
    "problem": ("Accuracy", "LinearProblem"),
    "quantization.activation": ("QuantizedActivation",),
    "quantization.fused_activation": ("rms_norm_quantize", "silu_mul_quantize"),
    "quantization.groups": ("pack_to_fp8_e4m3",),
    "quantization.kv_cache": ("KVCacheQuantizer", "KVScales"),
    "quantization.weight": ("dequantize", "quantize"),
    "recipe": ("Granularity", "Recipe"),
    "router": ("Assessment", "Decision", "Standing"),
    "tuning.run": ("TuningReport", "tune"),
    "warm": ("WarmedLayer", "warmup"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Accuracy",
    "AmbiguousRecipeError",
    "Assessment",
    "BackendUnavailableError",
    "CalibrationError",
    "CalibrationStats",
    "Calibrator",
    "CheckpointError",
    "ConfigurationError",
    "ConversionReport",
    "DTypeError",
    "Decision",
    "DelayedScaling",
    "DeviceError",
    "ExpertActivation",
    "FP8BlockQuantLinear",
    "FP8DispatchError",
    "FP8Experts",
    "FP8Format",
    "FP8Linear",
    "FbgemmFp8Linear_matmul",
    "FrozenWeightError",
    "Granularity",
    "InvalidInputError",
    "KVCacheQuantizer",
    "KVScales",
    "LinearProblem",
    "NumericalOverflowError",
    "PackOptions",
    "QuantizedActivation",
    "Recipe",
    "Refusal",
    "ScaleValueError",
    "ShapeError",
    "Standing",
    "TuningReport",
    "UnknownBackendError",
    "UnsupportedTransformError",
    "WarmedLayer",
    "__version__",
    "act_quant",
    "activation_scales",
    "convert",
    "convert_model",
    "dequantize",
    "dequantize_experts",
    "explain",
    "explain_experts",
    "fbgemm_fp8_linear",
    "fp8_act_quant",
    "fp8_block_quant_linear",
    "fp8_experts_batched",
    "fp8_experts_grouped",
    "fp8_linear",
    "fp8_linear_quantized",
    "inspect",
    "invalidate",
    "kv_cache_scales",
    "load",
    "pack_checkpoint",
    "pack_to_fp8_e4m3",
    "plan_checkpoint",
    "quantize",
    "quantize_experts",
    "reload_environment",
    "rms_norm_linear",
    "rms_norm_quantize",
    "set_backend",
    "silu_mul_linear",
    "silu_mul_quantize",
    "stats",
    "tune",
    "unpack",
    "use_backend",
    "verify",
    "w8a8_block_fp8_matmul",
    "w8a8_block_fp8_matmul_batched",
    "w8a8_block_fp8_matmul_grouped",
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
