"""What is computed once per weight: checked fp32 scales, and the layouts that backends need.

A result lives as long as the tensor it was made from and is dropped when that tensor changes: a
change that torch counts (in-place operations), new memory, or `invalidate`. Writes that torch
does not count, through ``.data`` or by another library, need `invalidate`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from fp8dispatch import generation
from fp8dispatch.checks import check_dense
from fp8dispatch.errors import ScaleValueError
from fp8dispatch.formats import decode_scale
from fp8dispatch.recipe import Recipe

T = TypeVar("T")


class _Entry:
    """Everything prepared from the tensors over one storage."""

    __slots__ = ("results", "storage", "version")

    def __init__(self, storage: torch.UntypedStorage, version: int) -> None:
        identity = id(storage)

        def forget(reference: weakref.ref[torch.UntypedStorage]) -> None:
            entry = _entries.get(identity)
            if entry is not None and entry.storage is reference:
                del _entries[identity]

        self.storage = weakref.ref(storage, forget)
        self.version = version
        self.results: dict[Hashable, Any] = {}


_entries: dict[int, _Entry] = {}


def prepared(tensor: torch.Tensor, key: Hashable, build: Callable[[], T]) -> T:
    """``build()``, remembered with the memory of `tensor` until that changes or is freed.

    Results belong to the storage, so that views made anew in every call, such as
    ``weight_scale.t()``, are found again. The first call on a GPU waits for the result, so that
    any stream may use it afterwards; a result built while a CUDA graph is captured exists only
    when the graph is replayed, and is not remembered.

    Args:
        tensor: what the result is made from.
        key: what is prepared; shape, strides, offset and dtype of `tensor` are added to it.
        build: makes the result, which must not share the storage of `tensor`: the cache would
            keep it alive for ever.
    """
    storage = tensor.untyped_storage()
    version = _version(tensor)
    where = (key, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
    entry = _entries.get(id(storage))
    current = entry is not None and entry.storage() is storage and entry.version == version
    if entry is not None and current and where in entry.results:
        found: T = entry.results[where]
        return found
    if _capturing(tensor):
        return build()
    result = outside_of_pools(tensor.device, build) if tensor.is_cuda else build()
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    if entry is None or not current:
        entry = _entries[id(storage)] = _Entry(storage, version)
    entry.results[where] = result
    return result


def invalidate(*tensors: torch.Tensor) -> None:
    """Forget what was prepared from weights or scales that changed behind torch's back.

    Args:
        tensors: the weights or scales, or any views of them.

    Raises:
        DTypeError: not a dense tensor.
    """
    for tensor in tensors:
        check_dense("each argument", tensor)
        _entries.pop(id(tensor.untyped_storage()), None)
    generation.renew()


def prepared_bytes(tensor: torch.Tensor) -> int:
    """Memory of all that is kept prepared from the storage of `tensor`, and from that in turn."""
    entry = _entries.get(id(tensor.untyped_storage()))
    results = () if entry is None else tuple(entry.results.values())
    tensors = [result for result in results if isinstance(result, torch.Tensor)]
    return sum(result.nbytes + prepared_bytes(result) for result in tensors)


def weight_scale_fp32(scale: torch.Tensor, recipe: Recipe, n: int, k: int) -> torch.Tensor:
    """The checked fp32 multipliers of a weight, contiguous, in the recipe's canonical shape.

    Raises:
        ScaleValueError: a value is NaN, infinite or negative. Values are read once per tensor
            (one synchronisation) and not again until it changes.
    """
    key = ("weight", recipe, n, k)
    return _checked(scale, key, "weight_scale", recipe.scale_shape(n, k), positive=False)


def expert_scale_fp32(
    scale: torch.Tensor, recipe: Recipe, experts: int, n: int, k: int
) -> torch.Tensor:
    """The same for the weights of experts: [E, 1], [E, N, 1] or [E] grids of blocks."""
    key = ("experts", recipe, experts, n, k)
    shape = (experts, *recipe.scale_shape(n, k))
    return _checked(scale, key, "weight_scale", shape, positive=False)


def expert_activation_scale_fp32(scale: torch.Tensor, experts: int) -> torch.Tensor:
    """Checked static activation scales, one fp32 element for each expert [E], maybe repeated."""
    checked = _checked(scale, "activation", "activation_scale", (scale.numel(),), positive=True)
    return checked.expand(experts)


def activation_scale_fp32(scale: torch.Tensor) -> torch.Tensor:
    """The checked static activation scale as one fp32 element; checked once, like a weight's."""
    return _checked(scale, "activation", "activation_scale", (1,), positive=True)


def _checked(
    scale: torch.Tensor, key: Hashable, name: str, shape: tuple[int, ...], *, positive: bool
) -> torch.Tensor:
    def build() -> torch.Tensor:
        decoded = decode_scale(scale.detach()).reshape(shape).contiguous()
        if decoded.untyped_storage().data_ptr() == scale.untyped_storage().data_ptr():
            decoded = decoded.clone()  # a view in the cache would keep its own key alive
        if not _capturing(scale):  # values cannot be read then; they are at the next call outside
            _check_values(decoded, name, positive=positive)
        return decoded

    return prepared(scale, key, build)


def _check_values(scale: torch.Tensor, name: str, *, positive: bool) -> None:
    right = torch.isfinite(scale) & ((scale > 0) if positive else (scale >= 0))
    if bool(right.all()):
        return
    wrong = scale[~right]
    kind = "finite and positive" if positive else "finite and not negative"
    remedy = "calibrate it" if positive else "quantise the weight"
    raise ScaleValueError(
        f"{name} must be {kind}, found {float(wrong[0])} among {wrong.numel()} of "
        f"{scale.numel()} values; {remedy} again or repair the checkpoint"
    )


def outside_of_pools(device: torch.device, build: Callable[[], T]) -> T:
    """``build()`` on a thread of its own, on the caller's stream.

    Before torch.compile captures a CUDA graph it runs the code once, with all that the thread
    allocates taken from the graph's private pool. What is remembered must not lie there.
    """
    if device.type != "cuda":
        return build()
    stream = torch.cuda.current_stream(device)

    def run() -> T:
        with torch.cuda.stream(stream), torch.no_grad():
            return build()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _version(tensor: torch.Tensor) -> int:
    # Inference tensors have no version counter: their changes need `invalidate`.
    return -1 if tensor.is_inference() else tensor._version
