"""Transformers' fine-grained FP8 (``quant_method: fp8``), the form of DeepSeek-V3's own files.

``X.weight`` F8_E4M3 [N, K] and ``X.weight_scale_inv`` [ceil(N / bn), ceil(K / bk)]. In spite of its
name the scale is the multiplier: amax / 448. Edge blocks are cropped. Sources: README_WEIGHTS of
deepseek-ai/DeepSeek-V3, Transformers' FineGrainedFP8Config, vLLM's Fp8Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fp8dispatch.errors import CheckpointError, InvalidInputError
from fp8dispatch.pack.layouts.contract import JSON, Contents, Layout, PackedModule, StoredTensor
from fp8dispatch.pack.layouts.shapes import (
    linear_skips,
    read_scheme_as,
    refuse_dtypes,
    simple_tensors,
)
from fp8dispatch.pack.scheme import Activations, Scheme
from fp8dispatch.recipe import BLOCK_128, TENSOR, Granularity, Recipe, parse_block_size


class FineGrained(Layout):
    """Blocks with dynamic activations; per-tensor files of two spellings are read, not written."""

    name: ClassVar[str] = "hf"

    def refuse(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[str, ...]:
        """See `Layout`."""
        found = refuse_dtypes(self.name, scheme, ("float32", "float8_e8m0fnu"))
        if scheme.recipe.block_size is None:
            found.append(
                f"hf holds blocks, as Transformers and vLLM differ in the names of other scales, "
                f"found {scheme}; use compressed-tensors"
            )
        elif scheme.group_size is not None:
            found.append(
                f"hf holds blocks of several rows, found groups of {scheme.group_size} in one row; "
                f"use native"
            )
        if scheme.activations is Activations.NONE:
            found.append("hf always quantises activations, found none; use compressed-tensors")
        return tuple(found)

    def tensors(
        self, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`."""
        grid = scheme.recipe.scale_shape(*shape)
        return simple_tensors(module, scheme, shape, scale="weight_scale_inv", scale_shape=grid)

    def refuse_contents(self, contents: Contents) -> tuple[str, ...]:
        """One ``weight_block_size`` and one ``scale_fmt`` hold for the whole model."""
        kinds = {
            f"{module.scheme.recipe}, {module.scheme.scale_dtype} scales"
            for module in contents.modules.values()
        }
        if len(kinds) <= 1:
            return ()
        return (
            f"hf states one weight_block_size and scale_fmt for the whole model, found "
            f"{'; '.join(sorted(kinds))}; use one recipe, or compressed-tensors",
        )

    def config(self, contents: Contents) -> JSON:
        """See `Layout`. Both keys for skipped modules, since readers differ in the one they use."""
        scheme = next((module.scheme for module in contents.modules.values()), Scheme(BLOCK_128))
        skips = linear_skips(contents)
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0" if scheme.e8m0 else "float",
            "weight_block_size": list(scheme.recipe.block_size or (128, 128)),
            "modules_to_not_convert": skips,
            "ignored_layers": skips,
        }

    def claims(self, block: JSON) -> bool:
        """See `Layout`."""
        return block.get("quant_method") in ("fp8", "mxfp8")

    def read_scheme(self, block: JSON, files: Mapping[str, JSON], module: PackedModule) -> Scheme:
        """See `Layout`. The scale's dtype is the tensor's: DeepSeek-V3.1 says ``ue8m0`` of its
        activations and stores fp32."""
        declared = block.get("weight_block_size", "absent")
        if declared == "absent":
            # Transformers' default is 128x128 and vLLM's per tensor; the shape tells them apart.
            mxfp8 = block["quant_method"] == "mxfp8"
            assumed = Recipe(Granularity.BLOCK, (1, 32)) if mxfp8 else BLOCK_128
            return read_scheme_as(module, (TENSOR, assumed), "no weight_block_size")
        try:
            size = parse_block_size(declared)
        except InvalidInputError as error:
            raise CheckpointError(
                f"weight_block_size is wrong: {error}; correct config.json"
            ) from error
        recipe = TENSOR if size is None else Recipe(Granularity.BLOCK, size)
        return read_scheme_as(module, (recipe,), f"weight_block_size {declared}")
