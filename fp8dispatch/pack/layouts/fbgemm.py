"""fbgemm_fp8: per-row weights with per-token activations, under its own configuration.

``X.weight`` F8_E4M3 [N, K] and ``X.weight_scale`` F32 [N, 1], the multiplier; the same tensors as
compressed-tensors with channel scales. vLLM has deprecated it, so it is written on demand only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fp8dispatch.pack.layouts.contract import JSON, Contents, Layout, PackedModule, StoredTensor
from fp8dispatch.pack.layouts.shapes import (
    linear_skips,
    read_scheme_as,
    refuse_dtypes,
    simple_tensors,
)
from fp8dispatch.pack.scheme import Activations, Scheme
from fp8dispatch.recipe import ROW

ACTIVATION_SCALE_UB = 1200.0
"""Upper bound of a token's amax that Transformers and vLLM take by default."""


class Fbgemm(Layout):
    """Channel scales for FBGEMM's kernels."""

    name: ClassVar[str] = "fbgemm"
    warning: ClassVar[str] = (
        "fbgemm_fp8 is deprecated in vLLM (it needs --allow-deprecated-quantization) and needs "
        "compute capability 9.0 in Transformers; compressed-tensors holds the same tensors"
    )

    def refuse(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[str, ...]:
        """See `Layout`."""
        found = refuse_dtypes(self.name, scheme)
        if scheme.recipe != ROW or scheme.activations is not Activations.DYNAMIC:
            found.append(
                f"fbgemm holds row scales with dynamic activations, found {scheme}; use the "
                f"recipe channel, or compressed-tensors"
            )
        return tuple(found)

    def tensors(
        self, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[StoredTensor, ...]:
        """See `Layout`."""
        return simple_tensors(
            module, scheme, shape, scale="weight_scale", scale_shape=(shape[0], 1)
        )

    def config(self, contents: Contents) -> JSON:
        """See `Layout`."""
        return {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": ACTIVATION_SCALE_UB,
            "modules_to_not_convert": linear_skips(contents),
        }

    def claims(self, block: JSON) -> bool:
        """See `Layout`."""
        return block.get("quant_method") == "fbgemm_fp8"

    def read_scheme(self, block: JSON, files: Mapping[str, JSON], module: PackedModule) -> Scheme:
        """See `Layout`."""
        return read_scheme_as(module, (ROW,), "fbgemm_fp8")
