"""The contract of an on-disk format: what it can hold, which tensors it writes, its configuration.

Everything here is plain data about names, dtypes and shapes, so a plan needs tensor headers only.
Tensor dtypes are safetensors' names (``"F8_E4M3"``, ``"F32"``), scheme dtypes are torch's.

Writing, for each module: ``layout.refuse(scheme, shape)`` must be empty; ``layout.tensors(name,
scheme, shape)`` lists what goes into the file; the weight's data is streamed by the caller, each
other tensor is `codec.encode` of the multipliers. At the end ``layout.refuse_contents(contents)``
must be empty, and ``layout.config(contents)`` and ``layout.extra_files(contents)`` are written.

Reading: `reading.read_contents` finds the layout, pairs each FP8 weight with its scales and asks
`layout.read_recipe` what they mean; `codec.decode` gives the fp32 multipliers of a stored scale in
the recipe's shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from fp8dispatch.pack.scheme import Scheme

JSON = dict[str, Any]

DTYPE_NAMES: dict[str, str] = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint8": "U8",
}
"""torch's dtype name -> safetensors' name, for the dtypes that packing writes."""


class Role(str, Enum):
    """What a stored tensor means for its module."""

    WEIGHT = "weight"  # FP8 codes [N, K]
    WEIGHT_SCALE = "weight_scale"  # the multiplier: value = data * scale
    WEIGHT_SCALE_RECIPROCAL = "weight_scale_reciprocal"  # 1 / multiplier, fp32
    ACTIVATION_SCALE = "activation_scale"  # the multiplier of a static activation scale
    K_SCALE = "k_scale"  # multipliers of the KV cache
    V_SCALE = "v_scale"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
        name: its full name.
        role: what it means.
        dtype: safetensors' dtype name.
        shape: its shape on disk, which may differ from the recipe's by dimensions of size 1.
    """

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PackedModule:
    """One quantised linear weight of a model.

    Attributes:
        name: full module name, without ``.weight``.
        shape: (N, K).
        scheme: how it is quantised.
        tensors: what holds it, the weight first. Filled when read; `Layout.tensors` when written.
        amax_history: largest |input| of past batches, newest first: the seed of delayed scaling.
    """

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    tensors: tuple[StoredTensor, ...] = ()
    amax_history: tuple[float, ...] = ()

    def tensor(self, role: Role) -> StoredTensor | None:
        """The stored tensor with this role, if there is one."""
        return next((tensor for tensor in self.tensors if tensor.role is role), None)


@dataclass(frozen=True)
class KVScales:
    """FP8 scales of a key-value cache.

    Attributes:
        layers: names of the attention modules (``"model.layers.0.self_attn"``) that have them.
        heads: KV heads per layer when each head has its own scale; None for one per layer.
        tensors: what holds them. Filled when read; `Layout.kv_tensors` when written.
    """

    layers: tuple[str, ...]
    heads: int | None = None
    tensors: tuple[StoredTensor, ...] = ()


@dataclass(frozen=True)
class Contents:
    """What a packed model holds; the whole of what a configuration is written from.

    Attributes:
        modules: the quantised modules by name.
        skipped: full names of the linear modules that stay in high precision (``"lm_head"``).
        kv: scales of the KV cache, if any.
        layout: name of the format these were read from; empty for a model about to be written.
        notes: what the reader noticed and a user should know, one sentence each.
    """

    modules: Mapping[str, PackedModule]
    skipped: tuple[str, ...] = ()
    kv: KVScales | None = None
    layout: str = ""
    notes: tuple[str, ...] = ()


class Layout(ABC):
    """An on-disk format.

    Class attributes:
        name: the name on the command line.
        warning: a sentence to show before this format is written; empty when none is needed.
    """

    name: ClassVar[str]
    warning: ClassVar[str] = ""

    @abstractmethod
    def refuse(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[str, ...]:
        """Why this format cannot hold a weight (N, K) under a scheme, one sentence each, with the
        remedy; empty when it can."""

    @abstractmethod
    def tensors(
        self, module: str, scheme: Scheme, shape: tuple[int, int]
    ) -> tuple[StoredTensor, ...]:
        """The tensors that hold a module, the weight first. Only what `refuse` lets through."""

    @abstractmethod
    def claims(self, block: JSON) -> bool:
        """Whether a block ``quantization_config`` is this format's."""

    @abstractmethod
    def read_scheme(self, block: JSON, files: Mapping[str, JSON], module: PackedModule) -> Scheme:
        """What a stored module's tensors mean under a configuration that this format claims.

        Args:
            block: the block ``quantization_config``.
            files: further JSON files beside ``config.json`` by name.
            module: name, shape and stored tensors of the module; its scheme is a placeholder.

        Raises:
            CheckpointError: the configuration and the tensors do not fit together.
        """

    def amax_history(self, files: Mapping[str, JSON], module: str) -> tuple[float, ...]:
        """The stored seed of delayed scaling of a module; empty where a format has none."""
        return ()

    @abstractmethod
    def config(self, contents: Contents) -> JSON:
        """The block ``quantization_config`` of ``config.json``."""

    def refuse_contents(self, contents: Contents) -> tuple[str, ...]:
        """Why one configuration cannot describe all these modules together; empty when it can."""
        return ()

    def extra_files(self, contents: Contents) -> dict[str, JSON]:
        """Further JSON files to write: name -> content."""
        return {}

    def kv_tensors(self, layer: str, heads: int | None) -> tuple[StoredTensor, ...]:
        """The KV scales of one attention module; `heads` when each head has its own."""
        shape = () if heads is None else (heads, 1, 1)
        return (
            StoredTensor(f"{layer}.k_scale", Role.K_SCALE, "F32", shape),
            StoredTensor(f"{layer}.v_scale", Role.V_SCALE, "F32", shape),
        )
