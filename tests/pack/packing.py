"""Small packed checkpoints, made from the format's own description; and an oracle for their values.

The scales and codes come from `fp8dispatch.quantize`; the oracle spreads the scales by plain loops
over blocks in float64 and shares nothing with the reader.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import fp8dispatch
from fp8dispatch.formats import decode_scale
from fp8dispatch.pack.layouts import codec
from fp8dispatch.pack.layouts.catalog import get_layout
from fp8dispatch.pack.layouts.contract import Contents, KVScales, PackedModule, Role
from fp8dispatch.pack.scheme import Activations, Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ACTIVATION_SCALE = 0.03125


def quantized(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and fp32 multipliers in the recipe's shape."""
    codes, scale = fp8dispatch.quantize(
        weight,
        scheme.recipe,
        dtype=getattr(torch, scheme.dtype),
        scale_dtype=getattr(torch, scheme.scale_dtype),
    )
    return codes, decode_scale(scale)


def restored(codes: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """``codes * scale`` in float64, block by block."""
    values = codes.to(torch.float64)
    n, k = values.shape
    rows, columns = scheme.recipe.block_size or (1, k)
    if scale.numel() == 1:
        return values * float(scale)
    grid = scale.reshape(-(-n // rows), -(-k // columns))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            values[part] *= float(grid[i, j])
    return values


def pack_tensors(
    weights: Mapping[str, torch.Tensor],
    layout: str,
    schemes: Scheme | Mapping[str, Scheme],
    kv_layers: tuple[str, ...] = (),
) -> tuple[dict[str, torch.Tensor], Contents]:
    """The tensors of a packed model, and its contents. Keys of `weights` are module names."""
    form = get_layout(layout)
    tensors: dict[str, torch.Tensor] = {}
    modules = {}
    for name, weight in weights.items():
        scheme = schemes if isinstance(schemes, Scheme) else schemes[name]
        shape = (weight.shape[0], weight.shape[1])
        assert form.refuse(scheme, shape) == ()
        codes, scale = quantized(weight, scheme)
        for stored in form.tensors(name, scheme, shape):
            if stored.role is Role.WEIGHT:
                tensors[stored.name] = codes
            elif stored.role is Role.ACTIVATION_SCALE:
                tensors[stored.name] = codec.encode(stored, torch.tensor([ACTIVATION_SCALE]))
            else:
                tensors[stored.name] = codec.encode(stored, scale)
        history = (3.5, 2.25) if scheme.activations is Activations.DYNAMIC else ()
        modules[name] = PackedModule(name, shape, scheme, amax_history=history)
    for number, layer in enumerate(kv_layers):
        for stored in form.kv_tensors(layer, None):
            tensors[stored.name] = codec.encode(stored, torch.tensor(0.25 + number))
    kv = KVScales(kv_layers) if kv_layers else None
    contents = Contents(modules, ("lm_head",), kv)
    assert form.refuse_contents(contents) == ()
    return tensors, contents


def write_packed(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    layout: str,
    schemes: Scheme | Mapping[str, Scheme],
    *,
    others: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    kv_layers: tuple[str, ...] = (),
) -> Path:
    """A packed folder with one file; `others` are tensors that are not quantised."""
    folder.mkdir(parents=True, exist_ok=True)
    form = get_layout(layout)
    tensors, contents = pack_tensors(weights, layout, schemes, kv_layers)
    save_file({**tensors, **(others or {})}, folder / "model.safetensors", {"format": "pt"})
    block = form.config(contents)
    whole = {**(config or {"model_type": "llama"}), "quantization_config": block}
    (folder / "config.json").write_text(json.dumps(whole))
    for name, content in form.extra_files(contents).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def random_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """A weight whose rows and columns differ in size, with a block of zeros where it is large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * 0.02
    weight *= torch.logspace(-1, 1, n)[:, None] * torch.logspace(0.5, -0.5, k)
    return weight
