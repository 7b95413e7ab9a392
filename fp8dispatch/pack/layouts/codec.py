"""fp32 multipliers into a stored scale tensor and back: shapes and dtypes, never the value.

The values were rounded to the scheme's scale dtype before the data was quantised, so storing them
is exact; where it would not be, `encode` raises instead of rounding.
"""

from __future__ import annotations

import torch

from fp8dispatch.errors import CheckpointError, ScaleValueError, ShapeError
from fp8dispatch.formats import decode_scale, dtype_name, round_scale
from fp8dispatch.pack.layouts.contract import DTYPE_NAMES, PackedModule, Role, StoredTensor

TORCH_DTYPES: dict[str, torch.dtype] = {
    stored: getattr(torch, name) for name, stored in DTYPE_NAMES.items()
}
"""safetensors' dtype name -> torch dtype, for the dtypes that packing reads and writes."""


def encode(tensor: StoredTensor, multipliers: torch.Tensor) -> torch.Tensor:
    """A stored scale from fp32 multipliers.

    Args:
        tensor: what is to be stored; any role but the weight.
        multipliers: positive finite fp32 ``value / data``, in any shape with as many elements.

    Returns:
        A contiguous tensor of the stored dtype and shape; the reciprocals for that role.

    Raises:
        ShapeError: another number of elements.
        ScaleValueError: a value that is not positive and finite, or that the dtype cannot hold
            exactly.
    """
    shape = torch.Size(tensor.shape)
    if multipliers.numel() != shape.numel():
        raise ShapeError(
            f"{tensor.name} holds {shape.numel()} scales {list(shape)}, found "
            f"{list(multipliers.shape)}; pass one multiplier for each"
        )
    values = multipliers.detach().to(torch.float32).reshape(shape).contiguous()
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise ScaleValueError(
            f"{tensor.name} needs scales that are positive and finite, found "
            f"{float(values.min())} to {float(values.max())}; repair the source weight"
        )
    if tensor.role is Role.WEIGHT_SCALE_RECIPROCAL:
        return 1.0 / values
    dtype = TORCH_DTYPES[tensor.dtype]
    if dtype == torch.float32:
        return values
    stored = round_scale(values, dtype)
    if not torch.equal(decode_scale(stored), values):
        raise ScaleValueError(
            f"{tensor.name} in {tensor.dtype} would change the scales that the data was divided "
            f"by; quantise again with scales of that dtype"
        )
    return stored


def decode(
    module: PackedModule, role: Role, tensor: torch.Tensor, file: str = "the checkpoint"
) -> torch.Tensor:
    """fp32 multipliers of a stored scale, in the shape that the module's recipe gives.

    Args:
        module: the module that the scale belongs to.
        role: `Role.WEIGHT_SCALE` gives `Recipe.scale_shape`, `Role.ACTIVATION_SCALE` [1].
        tensor: as read: F32, BF16, F16, E8M0 or uint8 exponents.
        file: named in errors.

    Raises:
        CheckpointError: a dtype that no scale has, not as many elements as the recipe needs, or a
            scale that is NaN, infinite or negative. A weight scale may be zero: some packers store
            that for a block of zeros, which it restores.
    """
    stored = module.tensor(role)
    name = f"{module.name} ({role.value})" if stored is None else stored.name
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{name} in {file} must be F32, BF16, F16, F8_E8M0 or U8 to be a scale, found "
            f"{dtype_name(tensor.dtype)}; take the complete checkpoint"
        )
    n, k = module.shape
    shape = module.scheme.recipe.scale_shape(n, k) if role is Role.WEIGHT_SCALE else (1,)
    if tensor.numel() != torch.Size(shape).numel():
        raise CheckpointError(
            f"{name} in {file} must hold {list(shape)} scales for a weight [{n}, {k}] "
            f"({module.scheme.recipe}), found {list(tensor.shape)}; correct the configuration or "
            f"pack the model again"
        )
    multipliers = decode_scale(tensor).reshape(shape)
    good = torch.isfinite(multipliers) & (multipliers > 0)
    if role is Role.WEIGHT_SCALE:
        good |= multipliers == 0
    if not bool(good.all()):
        bad = multipliers[~good]
        raise CheckpointError(
            f"{name} in {file} must hold positive finite scales, found {float(bad[0])} in "
            f"{bad.numel()} of {multipliers.numel()} places; pack the model again from its source"
        )
    return multipliers
