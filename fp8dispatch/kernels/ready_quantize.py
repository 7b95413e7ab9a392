"""The quantiser of activations with launches as cheap as they get (`direct_launch`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fp8dispatch.kernels.direct_launch import launch, plain_kernel
from fp8dispatch.kernels.launch import Launch
from fp8dispatch.kernels.quantize_activation import (
    quantize_groups,
    quantize_rows,
    quantize_static,
)
from fp8dispatch.kernels.repeat_launch import Repeat

if TYPE_CHECKING:
    import torch


def quantize(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    group: int,
    *,
    dependents: bool = False,
) -> None:
    """Quantise activations; see `quantize_activation` for the arguments.

    One scale for each row where `scale` has one column, else for each row and `group` columns.

    Args:
        dependents: let a kernel behind this one start early (`grid_dependency`).
    """
    _quantize(x, data, scale, group, launch, dependents)


def repeat_quantize(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    group: int,
    *,
    static: bool = False,
    dependents: bool = False,
) -> Repeat | None:
    """A call of `quantize` that takes another `x` of the same form; None where it cannot be.

    Args:
        static: `scale` is one element, and given.
    """
    found: list[Repeat | None] = []

    def keep(
        function: Any,
        programs: int,
        arguments: Sequence[Any],
        constants: dict[str, Any],
        warps: int,
    ) -> None:
        kernel = plain_kernel(function, arguments, constants, warps)
        found.append(kernel.repeat((programs, 1), (), arguments, x.get_device(), 0))

    if static:
        quantize_static(x, data, scale, keep)
    else:
        _quantize(x, data, scale, group, keep, dependents)
    return found[0]


def _quantize(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    group: int,
    how: Launch,
    dependents: bool,
) -> None:
    if scale.shape[1] == 1:
        quantize_rows(x, data, scale, how, dependents=dependents)
    else:
        quantize_groups(x, data, scale, group, how, dependents=dependents)
