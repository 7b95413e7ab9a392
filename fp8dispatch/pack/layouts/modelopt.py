"""NVIDIA ModelOpt: ``hf_quant_config.json``, and the same in ``config.json``.

| quant_algo                | weight_scale             | activations                 |
|---------------------------|--------------------------|-----------------------------|
| FP8                       | [] F32                   | static, ``input_scale`` []  |
| FP8_PER_CHANNEL_PER_TOKEN | [N] F32                  | dynamic per token           |
| FP8_PB_WO                 | [N/128, 1, K/128, 1] F32 | none: weight only           |
| MXFP8                     | [N, K/32] U8, E8M0       | dynamic in groups of 32     |

All scales are multipliers. Newer FP8_PB_WO exports call the scale ``weight_scale_inv`` and give it
two dimensions; both are read. Sources: ModelOpt's export code, vLLM's modelopt.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.layouts.contract import (
    JSON,
    Contents,
    Layout,
    PackedModule,
    Role,
    StoredTensor,
)
from fp8dispatch.pack.layouts.shapes import (
    linear_skips,
    read_scheme_as,
    refuse_dtypes,
    same_schemes,
    simple_tensors,
)
from fp8dispatch.pack.scheme import SCHEMES, Activations, Scheme
from fp8dispatch.recipe import BLOCK_128, ROW, TENSOR

ALGORITHMS: dict[str, Scheme] = {
    "FP8": Scheme(TENSOR, activations=Activations.STATIC),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(ROW),
    "FP8_PB_WO": Scheme(BLOCK_128, activations=Activations.NONE),
    "MXFP8": SCHEMES["mxfp8"],
}
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""What readers look for; the version is that of the form which this follows."""


class ModelOpt(Layout):
    """For vLLM and TensorRT-LLM; Transformers loads the codes as if they were the values."""

    name: ClassVar[str] = "modelopt"
    warning: ClassVar[str] = (
        "Transformers does not know modelopt and loads such a checkpoint as garbage without an "
        "error; load it with vLLM, TensorRT-LLM or fp8dispatch only"
    )

    def refuse(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[str, ...]:
        """See `Layout`."""
        if algorithm(scheme) is None:
            return (
                f"modelopt holds {'; '.join(map(str, ALGORITHMS.values()))}; found {scheme} in "
                f"{scheme.dtype} with {scheme.scale_dtype} scales; use one of these, or native",
            )
        found = refuse_dtypes(self.name, scheme, (scheme.scale_dtype,))
        rows, columns = scheme.recipe.block_size or (1, 1)
        if shape[0] % rows or shape[1] % columns:
            found.append(
                f"modelopt needs whole blocks of {rows}x{columns}, found a weight "
                f"[{shape[0]}, {shape[1]}]; use channel scales, or native"
            )
        return tuple(found)

    def tensors(
        self, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`."""
        scale_shape: tuple[int, ...] = scheme.recipe.scale_shape(*shape)
        if scheme.recipe == TENSOR:
            scale_shape = ()
        elif scheme.recipe == ROW:
            scale_shape = (shape[0],)
        elif scheme.recipe == BLOCK_128:
            scale_shape = (scale_shape[0], 1, scale_shape[1], 1)
        return simple_tensors(
            module,
            scheme,
            shape,
            scale="weight_scale",
            scale_shape=scale_shape,
            activation_shape=(),
        )

    def kv_tensors(self, layer: str, heads: int | None) -> tuple[StoredTensor, ...]:
        """See `Layout`; ModelOpt names them after the projections."""
        return (
            StoredTensor(f"{layer}.k_proj.k_scale", Role.K_SCALE, "F32", ()),
            StoredTensor(f"{layer}.v_proj.v_scale", Role.V_SCALE, "F32", ()),
        )

    def refuse_contents(self, contents: Contents) -> tuple[str, ...]:
        """One ``quant_algo`` holds for the whole model."""
        schemes = {module.scheme for module in contents.modules.values()}
        found = same_schemes(schemes, self.name)
        if contents.kv is not None and contents.kv.heads is not None:
            found += ("modelopt holds one KV scale per layer, found one per head; use native",)
        return found

    def config(self, contents: Contents) -> JSON:
        """See `Layout`."""
        scheme = _scheme_of(contents)
        eight = {"num_bits": 8, "type": "float"}
        static = scheme.activations is Activations.STATIC
        group: JSON = {"weights": {"dynamic": False, **eight}, "targets": ["Linear"]}
        if scheme.activations is not Activations.NONE:
            group["input_activations"] = {"dynamic": not static, **eight}
        block: JSON = {
            "quant_method": "modelopt",
            "quant_algo": algorithm(scheme),
            "ignore": linear_skips(contents),
            "config_groups": {"group_0": group},
            "producer": _PRODUCER,
        }
        if contents.kv is not None:
            block["kv_cache_scheme"] = {"dynamic": False, **eight}
        return block

    def extra_files(self, contents: Contents) -> dict[str, JSON]:
        """The file that ModelOpt itself writes."""
        quantization: JSON = {
            "quant_algo": algorithm(_scheme_of(contents)),
            "kv_cache_quant_algo": None if contents.kv is None else "FP8",
            "exclude_modules": linear_skips(contents),
        }
        return {"hf_quant_config.json": {"producer": _PRODUCER, "quantization": quantization}}

    def claims(self, block: JSON) -> bool:
        """See `Layout`; `reading` gives ``hf_quant_config.json`` the same shape."""
        return str(block.get("quant_method", "")).startswith("modelopt")

    def read_scheme(self, block: JSON, files: Mapping[str, JSON], module: PackedModule) -> Scheme:
        """See `Layout`."""
        algo = block.get("quant_algo")
        if not isinstance(algo, str) or algo.upper() not in ALGORITHMS:
            raise CheckpointError(
                f"quant_algo of modelopt must be one of {', '.join(ALGORITHMS)} to be read here, "
                f"found {algo!r:.80}; export the model again with one of these"
            )
        declared = ALGORITHMS[algo.upper()]
        scheme = read_scheme_as(module, (declared.recipe,), f"quant_algo {algo}")
        if declared.activations is Activations.NONE:
            return Scheme(scheme.recipe, scheme.dtype, scheme.scale_dtype, Activations.NONE)
        return scheme


def algorithm(scheme: Scheme) -> str | None:
    """The ``quant_algo`` that means this scheme, or None."""
    return next((name for name, known in ALGORITHMS.items() if known == scheme), None)


def _scheme_of(contents: Contents) -> Scheme:
    return next((module.scheme for module in contents.modules.values()), ALGORITHMS["FP8"])
