"""Which tensors are quantised: the built-in table, then what the user skips or limits it to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8dispatch.names import matches
from fp8dispatch.pack.architectures import (
    SMALLEST_SIDE,
    model_types,
    rules_for,
    vocabulary_size,
)
from fp8dispatch.pack.ends import EndLayers
from fp8dispatch.pack.header import TensorSpec

QUANTIZABLE = ("BF16", "F16", "F32")
SUFFIX = ".weight"


@dataclass(frozen=True)
class Verdict:
    """Why a tensor stays as it is, or None where it is quantised.

    Attributes:
        reason: in words.
        linear: whether it may be the weight of a linear layer, which a format's configuration
            must then name among those that are left alone.
    """

    reason: str | None
    linear: bool


class LayerPolicy:
    """Decides for each tensor by its name, shape and dtype.

    Args:
        config: the model's configuration.
        skip: names or wildcards of modules that stay as they are.
        only: names or wildcards; where any are given, other modules stay as they are.
        keep_ends: how many layers at each end of the model stay as they are.
        names: of all tensors, to count the layers.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None,
        skip: Sequence[str] = (),
        only: Sequence[str] = (),
        keep_ends: int = 0,
        names: Iterable[str] = (),
    ) -> None:
        self.types = model_types(config)
        self._rules = list(rules_for(self.types))
        self._vocabulary = vocabulary_size(config)
        self._skip, self._only = tuple(skip), tuple(only)
        self._unused = {*self._skip, *self._only}
        self._keep_ends = keep_ends
        self.ends = EndLayers(names, config, keep_ends)

    @property
    def unused_patterns(self) -> list[str]:
        """Patterns that no linear layer has matched yet: a typing mistake, most likely."""
        return sorted(self._unused)

    def judge(self, name: str, dtype: str, shape: Sequence[int]) -> Verdict:
        """Decide for one tensor, or for one matrix cut out of a fused tensor.

        Args:
            name: full tensor name.
            dtype: safetensors' name of its dtype.
            shape: its shape.
        """
        module = name.removesuffix(SUFFIX)
        # Patterns are tried first: one that names a tensor which stays anyway is no mistake.
        wanted = self._user(module)
        if module == name:
            return Verdict("no weight of a layer", linear=False)
        if len(shape) != 2:
            return Verdict("a vector" if len(shape) < 2 else "no matrix", linear=False)
        if dtype not in QUANTIZABLE:
            return Verdict(f"stored as {dtype}", linear=False)
        for pattern, reason in self._rules:
            if pattern.search(module):
                return Verdict(reason, linear=reason != "embedding")
        if shape[0] == self._vocabulary:
            return Verdict("as many rows as the vocabulary", linear=True)
        if min(shape) < SMALLEST_SIDE:
            return Verdict(f"a side shorter than {SMALLEST_SIDE}", linear=True)
        return Verdict(wanted, linear=True)

    def _user(self, module: str) -> str | None:
        """Why the user's patterns leave a module as it is, or None."""
        skipped = [pattern for pattern in self._skip if matches(module, pattern)]
        limited = [pattern for pattern in self._only if matches(module, pattern)]
        self._unused.difference_update(skipped, limited)
        if skipped:
            return f"--skip {skipped[0]}"
        if self._only and not limited:
            return "not among --only"
        if self.ends.holds(module):
            return f"--keep-ends {self._keep_ends}"
        return None

    def skips(self, module: str) -> str | None:
        """Why the user's patterns leave a fused tensor as it is, by its own name, or None."""
        return self._user(module)


def looks_quantized(spec: TensorSpec) -> bool:
    """Whether a tensor is an FP8 weight already."""
    return spec.dtype.startswith("F8_E") and spec.dtype != "F8_E8M0" and len(spec.shape) >= 2
