"""Scratch memory of kernels, kept for each device and stream: no allocation in a warm call.

Two launches in one stream follow each other, so they may share it; two streams may not. A CUDA
graph may be replayed on any stream beside anything else, so a launch that is captured gets memory
of its own, which then belongs to the graph.
"""

from __future__ import annotations

import torch

from fp8dispatch.prepare import outside_of_pools

Workspace = tuple[torch.Tensor, torch.Tensor]
"""float32 elements of any content, and int32 counters that are zero between launches."""

_kept: dict[tuple[int, int], Workspace] = {}


def workspace(device: torch.device, elements: int, counters: int) -> Workspace:
    """Memory for one launch on the current stream of a CUDA device.

    Args:
        device: where; its current stream is the one that the launch goes to.
        elements: float32 elements at least.
        counters: int32 counters at least; the kernel that uses them leaves them zero.
    """
    if torch.cuda.is_current_stream_capturing():
        return _allocate(device, elements, counters)
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (index, torch.cuda.current_stream(device).cuda_stream)
    found = _kept.get(key)
    if found is None or found[0].numel() < elements or found[1].numel() < counters:
        if found is not None:
            elements, counters = max(elements, found[0].numel()), max(counters, found[1].numel())
        # What torch.compile's graphs allocate from may be given to others behind our back.
        found = _kept[key] = outside_of_pools(device, lambda: _allocate(device, elements, counters))
    return found


def _allocate(device: torch.device, elements: int, counters: int) -> Workspace:
    return (
        torch.empty(elements, dtype=torch.float32, device=device),
        torch.zeros(counters, dtype=torch.int32, device=device),
    )
