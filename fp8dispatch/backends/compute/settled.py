"""Linears that are made again and again: two launches that are ready but for two addresses.

What a small linear costs on the host is Python. A `Settled` stands for the calls over one weight
with one number of rows; for each stream, thread and form of X it keeps two launches, of a quantiser
and of a GEMM, in which everything but X and the output is filled in. What is left of a call is to
look them up, to allocate the output and to launch.

The quantised activations lie in memory of the thread and stream (`workspace`), so a call that is
captured into a CUDA graph, or whose activations are too large to be kept, goes the backend's
ordinary way, and so does everything where launches cannot be made ready.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import get_ident
from typing import Any, NamedTuple

import torch

from fp8dispatch.backends.contract import Backend, Weight
from fp8dispatch.prepare import outside_of_pools
from fp8dispatch.problem import LinearProblem
from fp8dispatch.workspace import is_small

_MOST_FORMS = 256


class Ready(NamedTuple):
    """A linear whose launches are ready.

    Attributes:
        quantize: the launch that reads X.
        multiply: the launch that writes the output.
        kept: memory that the launches name and that nobody else may keep alive.
    """

    quantize: Callable[[torch.Tensor], None]
    multiply: Callable[[torch.Tensor], None]
    kept: tuple[Any, ...]


Make = Callable[
    [torch.Tensor, Weight, "torch.Tensor | None", "torch.Tensor | None"], "Ready | None"
]
"""X, weight, bias, activation scale -> their launches on the current stream; None where they cannot
be made ready."""


class Settled:
    """The linear of a backend over one weight with one number of rows.

    It keeps neither the weight nor the bias alive: the caller passes them, the same tensors over
    the same memory every time, or drops it. It serves any stream and thread.

    Args:
        backend: computes what is not ready.
        weight: the weight; its fp32 scale is kept.
        activation_scale: one fp32 element for static activations, kept, or None.
        problem: sizes and dtypes.
        device: of the weight, with its index.
        make: makes launches ready.
    """

    def __init__(
        self,
        backend: Backend,
        weight: Weight,
        activation_scale: torch.Tensor | None,
        problem: LinearProblem,
        device: torch.device,
        make: Make,
    ) -> None:
        self._backend = backend
        self._scale, self._recipe = weight.scale, weight.recipe
        self._static = activation_scale
        self._problem = problem
        self._device: int = device.index
        self._make = make
        groups = weight.scale.shape[1] if weight.recipe.block_size is not None else 1
        self._small = is_small(problem.m, problem.k, groups)
        # An output is made like this one of a single element: half the cost of `torch.empty`.
        dtype = getattr(torch, problem.out_dtype)
        # Not in the memory of a graph of torch.compile, which counts what a warm-up run leaves.
        one = outside_of_pools(device, lambda: torch.empty(1, dtype=dtype, device=device))
        self._like = one.expand(problem.m, problem.n)
        self._ready: dict[Hashable, Ready | None] = {}

    def __call__(
        self, x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The linear.

        Args:
            x: [M, K], of the dtype with which it was settled, any strides.
            data: the weight.
            bias: [N] or None.
        """
        device = self._device
        key = (
            torch._C._cuda_getCurrentRawStream(device),
            get_ident(),
            x.stride(),
            x.data_ptr() & 15,
            None if bias is None else bias.data_ptr(),
        )
        ready = self._ready.get(key)
        if (
            ready is None
            or torch._C._cuda_isCurrentStreamCapturing()
            or torch._C._cuda_getDevice() != device
        ):
            return self._unready(key, x, data, bias)
        out = torch.empty_like(self._like)
        ready.quantize(x)
        ready.multiply(out)
        return out

    def _unready(
        self, key: Hashable, x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        weight = Weight(data, self._scale, self._recipe, self._scale)
        out = self._backend.linear(x, weight, bias, self._static, self._problem)
        if (
            self._small
            and key not in self._ready
            and torch.cuda.current_device() == self._device
            and not torch.cuda.is_current_stream_capturing()
        ):
            if len(self._ready) >= _MOST_FORMS:
                self._ready.clear()
            self._ready[key] = self._make(x, weight, bias, self._static)
        return out
