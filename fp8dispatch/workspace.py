"""Scratch memory of kernels, kept for each device and stream: no allocation in a warm call.

Two launches in one stream follow each other, so they may share it; two streams may not. A CUDA
graph may be replayed on any stream beside anything else, so a launch that is captured gets memory
of its own, which then belongs to the graph. Its counters come from a supply that was zeroed before,
so that a graph does not have to clear them in every replay.
"""

from __future__ import annotations

import threading

import torch

from fp8dispatch.prepare import outside_of_pools

Workspace = tuple[torch.Tensor, torch.Tensor]
"""float32 elements of any content, and int32 counters that are zero between launches."""

Quantized = tuple[torch.Tensor, torch.Tensor]
"""FP8 [M, K] and float32 [M, groups] with strides (1, a multiple of 4): 16 bytes."""

SMALL = 16 << 20
"""Activations of up to this many bytes, scales included, are kept where calls take turns: 2048 rows
of 7168. With more the GPU is busy for longer than the host needs."""

_MOST_VIEWS = 4096
_SUPPLY = 1 << 20  # counters: 4 MB, enough for some thousand captured launches
_kept: dict[tuple[int, int], Workspace] = {}


class _Supply:
    """Zeroed counters for captured launches, each given away once: a graph keeps its own."""

    def __init__(self, device: torch.device) -> None:
        self._counters = torch.zeros(_SUPPLY, dtype=torch.int32, device=device)
        self._given = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> torch.Tensor | None:
        """Counters that nobody else has, 16 bytes apart from others; None when they run out."""
        with self._lock:
            first = self._given
            if first + count > _SUPPLY:
                return None
            self._given = first + (count + 3) // 4 * 4
        return self._counters[first : first + count]


_supplies: dict[int, _Supply] = {}


class _Threads(threading.local):
    """Memory for activations, of each thread: two on one stream could take turns in between."""

    def __init__(self) -> None:
        self.memory: dict[tuple[int, int], torch.Tensor] = {}
        self.views: dict[tuple[int, ...], Quantized] = {}


_threads = _Threads()


def workspace(device: torch.device, elements: int, counters: int) -> Workspace:
    """Memory for one launch on the current stream of a CUDA device.

    Args:
        device: where; its current stream is the one that the launch goes to.
        elements: float32 elements at least.
        counters: int32 counters at least; the kernel that uses them leaves them zero.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    if torch.cuda.is_current_stream_capturing():
        supply = _supplies.get(index)
        zeros = None if supply is None else supply.take(counters)
        if zeros is None:  # none left: the graph clears some of its own
            return _allocate(device, elements, counters)
        return torch.empty(elements, dtype=torch.float32, device=device), zeros
    key = (index, torch._C._cuda_getCurrentRawStream(index))
    found = _kept.get(key)
    if found is None or found[0].numel() < elements or found[1].numel() < counters:
        if found is not None:
            elements, counters = max(elements, found[0].numel()), max(counters, found[1].numel())
        # What torch.compile's graphs allocate from may be given to others behind our back.
        found = _kept[key] = outside_of_pools(device, lambda: _allocate(device, elements, counters))
        if index not in _supplies:
            _supplies[index] = outside_of_pools(device, lambda: _Supply(device))
            if device.type == "cuda":  # a graph may be replayed on any stream
                torch.cuda.current_stream(device).synchronize()
    return found


def quantized_activations(device: torch.device, m: int, k: int, groups: int) -> Quantized:
    """Memory for activations that are quantised and multiplied in one go, on the current stream.

    Where they are small, the calls of a thread on one stream take turns with the same memory, which
    saves two allocations a call; what it holds is overwritten by the next call.

    Args:
        device: a CUDA device with its index.
        m, k: rows and columns; a row of FP8 is a multiple of 16 bytes.
        groups: scales for each row.
    """
    if not takes_turns(m, k, groups):
        size = _bytes_of(m, k, groups)
        return _carve(torch.empty(size, dtype=torch.uint8, device=device), m, k, groups)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    place = (device.index, stream, m, k, groups)
    views = _threads.views
    found = views.get(place)
    if found is None:
        owner = (device.index, stream)
        memory = _threads.memory.get(owner)
        if memory is None:
            memory = _threads.memory[owner] = outside_of_pools(
                device, lambda: torch.empty(SMALL, dtype=torch.uint8, device=device)
            )
        if len(views) >= _MOST_VIEWS:
            views.clear()
        found = views[place] = _carve(memory, m, k, groups)
    return found


def takes_turns(m: int, k: int, groups: int) -> bool:
    """Whether a call on the current stream gets memory that stays; not while it is captured."""
    return is_small(m, k, groups) and not torch.cuda.is_current_stream_capturing()


def is_small(m: int, k: int, groups: int) -> bool:
    """Whether activations of this size are kept where calls take turns."""
    return _bytes_of(m, k, groups) <= SMALL


def _bytes_of(m: int, k: int, groups: int) -> int:
    return m * k + groups * ((m + 3) // 4 * 4) * 4


def _carve(memory: torch.Tensor, m: int, k: int, groups: int) -> Quantized:
    pitch = (m + 3) // 4 * 4
    data = memory[: m * k].view(torch.float8_e4m3fn).view(m, k)
    scale = memory[m * k : m * k + groups * pitch * 4].view(torch.float32).view(groups, pitch)
    return data, scale.t()[:m]


def _allocate(device: torch.device, elements: int, counters: int) -> Workspace:
    return (
        torch.empty(elements, dtype=torch.float32, device=device),
        torch.zeros(counters, dtype=torch.int32, device=device),
    )
