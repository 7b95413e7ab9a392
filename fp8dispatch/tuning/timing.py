"""Times calls against each other, and ranks them where the difference is more than noise.

Arms alternate, so that a clock that drifts drifts for all of them, and each figure is a median over
rounds. How one call is timed is an argument, a `Timer`.

In eager inference Python prepares the next call while the device computes this one, so a stream of
calls goes as fast as the slower of the two. `DeviceTimer` therefore gives the larger of the time on
the device, with cold weights, and the time that the call keeps Python busy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fp8dispatch.errors import BackendUnavailableError
from fp8dispatch.failures import describe_error, is_sticky_cuda_error

if TYPE_CHECKING:
    import torch

Call = Callable[[], object]

Timer = Callable[[Call], float]
"""Microseconds of one call, which it makes as often as it likes."""

ROUNDS = 7
SMALLEST_BAND = 0.03
"""Smaller differences are taken for noise, however steady the rounds were."""

_HOPELESS = 2.0  # times as slow as the fastest after the first rounds: not timed further
_FIRST_ROUNDS = 2
_REPEATS = 10  # calls of one sample on a GPU, of which the median counts
_FLUSH_BYTES = 256 << 20  # where the device does not say how large its L2 is


@dataclass(frozen=True)
class Timing:
    """What one arm took.

    Attributes:
        us: median over the rounds, in microseconds.
        spread: how far the rounds lie apart, the fastest and the slowest left out, as a share of
            the median.
    """

    us: float
    spread: float


def time_arms(
    arms: Mapping[str, Call], timer: Timer, rounds: int = ROUNDS
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time every arm in turn, round by round.

    An arm that is hopelessly slow in the first rounds keeps what it took there.

    Returns:
        Arm -> timing, and arm -> error for those that raised while they were timed.

    Raises:
        BackendUnavailableError: an arm lost the CUDA context: no other can be timed after it.
    """
    samples: dict[str, list[float]] = {name: [] for name in arms}
    failed: dict[str, Exception] = {}
    running = list(arms)
    for turn in range(rounds):
        for name in tuple(running):
            try:
                samples[name].append(timer(arms[name]))
            except Exception as error:  # any library's: reported beside the others' times
                if is_sticky_cuda_error(error):
                    raise lost_context(name, "timed", error) from error
                failed[name] = error
                running.remove(name)
        if turn + 1 == _FIRST_ROUNDS and running:
            limit = _HOPELESS * min(min(samples[name]) for name in running)
            running = [name for name in running if min(samples[name]) <= limit]
    timings = {name: _timing(taken) for name, taken in samples.items() if name not in failed}
    return timings, failed


def lost_context(name: str, doing: str, error: Exception) -> BackendUnavailableError:
    """What to raise for a backend after which nothing runs in this process any more.

    Args:
        name: of the backend, with a tile behind it where it is not the backend's own choice.
        doing: what it was when it happened, "timed" say.
        error: what it raised.
    """
    backend = name.split(" ")[0]
    return BackendUnavailableError(
        f"{name} lost the CUDA context while it was {doing} ({describe_error(error)}); restart the "
        f"process and leave the backend out with FP8DISPATCH_BACKEND=-{backend}"
    )


def rank(timings: Mapping[str, Timing], order: Sequence[str]) -> tuple[str, ...]:
    """The arms, the fastest first; of those that tie, the first in `order` comes first.

    Two arms tie where they differ by no more than the band: `SMALLEST_BAND`, or the larger of their
    spreads. Each place goes to the first in `order` of those that tie with the fastest left.

    Args:
        order: names every arm.
    """
    left = [name for name in order if name in timings]
    ranked: list[str] = []
    while left:
        best = timings[min(left, key=lambda name: timings[name].us)]
        winner = next(name for name in left if _ties(timings[name], best))
        ranked.append(winner)
        left.remove(winner)
    return tuple(ranked)


def default_timer(device: torch.device) -> Timer:
    """How calls on a device are timed unless something else is asked for."""
    return DeviceTimer(device) if device.type == "cuda" else wall_clock


def wall_clock(call: Call) -> float:
    """Microseconds until a call returns, the median of three: for the CPU."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e6


class DeviceTimer:
    """Times calls on a GPU: L2 flushed before each, and the larger of device and host time."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        cached = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
        # Twice the cache leaves nothing of the weight in it, whatever it replaces first.
        size = 2 * cached or _FLUSH_BYTES
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, call: Call) -> float:
        import torch

        with torch.cuda.device(self._device):
            event = cast("Callable[..., Any]", torch.cuda.Event)  # its constructor has no types
            events = [
                (event(enable_timing=True), event(enable_timing=True)) for _ in range(_REPEATS)
            ]
            host = []
            for start, end in events:
                self._flush.zero_()
                start.record()
                before = time.perf_counter()
                call()
                host.append((time.perf_counter() - before) * 1e6)
                end.record()
            torch.cuda.synchronize()
        device = [float(start.elapsed_time(end)) * 1e3 for start, end in events]
        return max(statistics.median(device), statistics.median(host))


def _timing(samples: Sequence[float]) -> Timing:
    middle = sorted(samples)[1:-1] if len(samples) > 3 else sorted(samples)
    median = statistics.median(samples)
    return Timing(median, (middle[-1] - middle[0]) / median if median > 0 else 0.0)


def _ties(one: Timing, best: Timing) -> bool:
    band = max(SMALLEST_BAND, one.spread, best.spread)
    return one.us <= best.us * (1 + band)
