"""What a plan says: which weights are quantised from where, what stays, and what stands against.

Plain data over headers; `plan` makes it, `packing` carries it out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.architectures import model_types
from fp8dispatch.pack.calibration import Calibration
from fp8dispatch.pack.checkpoint import Checkpoint, FileTensor
from fp8dispatch.pack.experts import WeightSource
from fp8dispatch.pack.header import TensorSpec
from fp8dispatch.pack.kvcache import KVPlan
from fp8dispatch.pack.layouts.contract import Contents, PackedModule
from fp8dispatch.pack.layouts.loadability import Verdict
from fp8dispatch.pack.options import Resolved
from fp8dispatch.pack.output import OutputShard
from fp8dispatch.pack.policy import SUFFIX

MASTER = "master"
"""Subfolder of the weights that `keep_master` keeps."""


@dataclass(frozen=True)
class Weight:
    """A weight that is quantised.

    Attributes:
        module: its name, shape, scheme and the tensors that will hold it.
        source: where its values lie.
        origin: the tensor of the source that it is, or is part of.
        activation_scale: of its input, where activations are static.
    """

    module: PackedModule
    source: WeightSource
    origin: FileTensor
    activation_scale: float | None = None


@dataclass(frozen=True)
class Kept:
    """A tensor that stays as it is.

    Attributes:
        tensor: in the source.
        reason: why.
        linear: whether a format's configuration must name it among those left alone.
    """

    tensor: FileTensor
    reason: str
    linear: bool

    @property
    def module(self) -> str:
        """The module it belongs to, as a configuration names it; fused experts as one."""
        name = self.tensor.name.removesuffix(SUFFIX)
        return name.rpartition(".")[0] if len(self.tensor.shape) == 3 else name


@dataclass(frozen=True)
class Plan:
    """What packing would do.

    Attributes:
        checkpoint: the source.
        resolved: the options, with every choice made.
        weights: what is quantised, by module name, in the order of the files.
        kept: what is not.
        problems: why packing would fail, one sentence each; empty when it can go ahead.
        warnings: what a user should know before.
        verdicts: where each quantised module loads.
        calibration: the scales that were read, if any.
        kv: scales of the KV cache, where they are written.
    """

    checkpoint: Checkpoint
    resolved: Resolved
    weights: Mapping[str, Weight]
    kept: tuple[Kept, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    calibration: Calibration | None
    kv: KVPlan | None = None

    @property
    def model_types(self) -> tuple[str, ...]:
        """The model's type and those of its parts, by the configuration."""
        return model_types(self.checkpoint.config)

    @cached_property
    def contents(self) -> Contents:
        """What the result holds, for its configuration."""
        return contents_of(self.weights, self.kept, self.kv)

    @cached_property
    def shards(self) -> tuple[OutputShard, ...]:
        """The weight files of the result: those of the source, and masters where asked for."""
        specs: dict[str, list[TensorSpec]] = {file: [] for file in self.checkpoint.headers}
        masters: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
        for kept in self.kept:
            tensor = kept.tensor
            specs[tensor.file].append(TensorSpec(tensor.name, tensor.dtype, tensor.shape))
        for weight in self.weights.values():
            origin = weight.origin
            specs[origin.file] += [
                TensorSpec(tensor.name, tensor.dtype, tensor.shape)
                for tensor in weight.module.tensors
            ]
            masters[f"{MASTER}/{origin.file}"][origin.name] = TensorSpec(
                origin.name, origin.dtype, origin.shape
            )
        for scale in () if self.kv is None else self.kv.tensors:
            stored = scale.stored
            specs[scale.file].append(TensorSpec(stored.name, stored.dtype, stored.shape))
        shards = [
            OutputShard(file, tuple(found), self.checkpoint.headers[file].metadata)
            for file, found in specs.items()
        ]
        if self.resolved.asked.keep_master:
            shards += [OutputShard(file, tuple(found.values())) for file, found in masters.items()]
        return tuple(shards)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors of the result, masters apart."""
        return sum(
            spec.nbytes
            for shard in self.shards
            if not shard.file.startswith(f"{MASTER}/")
            for spec in shard.specs
        )

    def loads(self, target: str) -> bool:
        """Whether every quantised module loads there."""
        return all(verdict.loads for verdict in self.verdicts if verdict.target == target)

    def refuse_problems(self) -> None:
        """Raise where packing would fail.

        Raises:
            CheckpointError: with the first problem and the number of the others.
        """
        if self.problems:
            more = len(self.problems) - 1
            others = f" (and {more} more: see fp8dispatch plan)" if more else ""
            raise CheckpointError(f"{self.problems[0]}{others}")


def contents_of(
    weights: Mapping[str, Weight], kept: Sequence[Kept], kv: KVPlan | None = None
) -> Contents:
    """What the result holds."""
    skipped = dict.fromkeys(one.module for one in kept if one.linear)
    modules = {name: weight.module for name, weight in weights.items()}
    return Contents(modules, tuple(skipped), None if kv is None else kv.scales)
