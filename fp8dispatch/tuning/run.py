"""`tune`: measure the backends on this machine, keep the orders, and let the router follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fp8dispatch import decide, policy, registry
from fp8dispatch.errors import DeviceError, InvalidInputError
from fp8dispatch.policy import Policy
from fp8dispatch.probes.device import describe
from fp8dispatch.recipe import BLOCK_128, Recipe
from fp8dispatch.tuning import orders
from fp8dispatch.tuning.measure import Point, measure
from fp8dispatch.tuning.shapes import ShapeLike, parse_shapes
from fp8dispatch.tuning.store import TunedPoint, now
from fp8dispatch.tuning.timing import Timer, default_timer

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
"""One M in each bucket of `orders` that models commonly call, its largest."""

OnStep = Callable[[int, int, str], None]
"""Called with (done, of, what comes next)."""


@dataclass(frozen=True)
class TuningReport:
    """What tuning measured.

    Attributes:
        device: where, as torch names it.
        machine: its name and capability.
        accuracy: the least exact class of accumulation that the policy allowed.
        points: each size with the order that was found, and what every backend did.
        file: where the orders are kept; None where they hold for this process alone.
    """

    device: str
    machine: str
    accuracy: str
    points: tuple[Point, ...]
    file: Path | None

    @property
    def wrong(self) -> tuple[str, ...]:
        """What computed wrong numbers somewhere: backends, or a backend with one of its tiles."""
        arms = (arm for point in self.points for arm in point.arms)
        return tuple(dict.fromkeys(arm.name for arm in arms if arm.state == "wrong"))

    def as_dict(self) -> dict[str, Any]:
        """Plain data as JSON knows it."""
        return {
            "device": self.device,
            "machine": self.machine,
            "accuracy": self.accuracy,
            "file": None if self.file is None else str(self.file),
            "points": [
                {
                    **asdict(point.size),
                    "recipe": str(point.recipe),
                    "order": list(point.order),
                    "before": point.before,
                    "tiles": {name: str(tile) for name, tile in point.tiles.items()},
                    "arms": [asdict(arm) for arm in point.arms],
                }
                for point in self.points
            ],
        }


def tune(
    shapes: ShapeLike | Sequence[ShapeLike],
    recipe: str | Recipe = BLOCK_128,
    tokens: Sequence[int] = TOKENS,
    *,
    backends: str | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    timer: Timer | None = None,
) -> TuningReport:
    """Time the backends on this machine, and route calls like those to the fastest from now on.

    Each size is run by every backend that the router admits, its output compared with float64 on
    the same quantised operands, and the whole `fp8_linear` call timed. Differences within the noise
    (3 %, or the spread of the rounds) leave the default order. `triton` is also timed with other
    tiles than its own choice, which give the same bits, and keeps the best. The orders and tiles
    are kept in the cache directory for this GPU, driver and these versions, and hold for calls of
    the same recipe, N and K whose M lies in the same bucket: up to 1, 4, 16, 64, and so on by
    powers of four. What is stated about backends still comes first, and batch-invariant calls
    ignore both.

    Args:
        shapes: ``(M, N, K)``, ``(N, K)``, the path of a Transformers ``config.json`` or its folder,
            or several of these.
        recipe: ``"tensor"``, ``"row"``, ``"block"`` (128x128) or a `Recipe`.
        tokens: M for those shapes that do not say it.
        backends: which to time, as in `use_backend`: ``"triton,cublaslt"`` or ``"-torchao"``; None
            takes all that the policy does not exclude. What must be named is never timed.
        device: a CUDA device, default the current one; ``"cpu"`` times the CPU.
        progress: show a progress bar on stderr; None shows it on a terminal.
        timer: gives the microseconds of a call; None takes the larger of device and host time.

    Returns:
        What was measured, refused and found wrong, size by size.

    Raises:
        InvalidInputError: shapes, a config, a recipe or tokens that cannot be read; a capture into
            a CUDA graph is under way.
        DeviceError: no such device.
        UnknownBackendError, ConfigurationError: a statement that cannot be read.
        BackendUnavailableError: a backend lost the CUDA context; what was measured before is kept.
    """
    with _bar(progress) as on_step:
        return run_tuning(shapes, recipe, tokens, backends, device, timer, on_step)


def run_tuning(
    shapes: ShapeLike | Sequence[ShapeLike],
    recipe: str | Recipe,
    tokens: Sequence[int],
    backends: str | None,
    device: str | torch.device | None,
    timer: Timer | None,
    on_step: OnStep,
) -> TuningReport:
    """`tune` with steps told to `on_step`."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise InvalidInputError(
            "tune must run outside of a CUDA graph's capture, found one under way; tune before "
            "capturing"
        )
    sizes = parse_shapes(shapes, tokens)
    meant = Recipe.parse(recipe)
    allowed = _allowed(backends)
    where = _device(device)
    machine = describe(where)
    store, problem = orders.open_store()
    fingerprint = orders.fingerprint_of(machine)
    points: list[Point] = []
    file: Path | None = None
    try:
        with torch.cuda.device(where) if where.type == "cuda" else nullcontext():
            timed_by = timer or default_timer(where)
            for done, size in enumerate(sizes):
                on_step(done, len(sizes), f"M={size.m} N={size.n} K={size.k}")
                with nullcontext(problem) if store is None else store.turn(fingerprint) as reason:
                    point = measure(size, meant, where, machine, allowed, timed_by)
                    points.append(point)
                    if point.order or point.wrong:
                        found = orders.keep(machine, _record(point, allowed), store, reason)
                        file = found or file
            on_step(len(sizes), len(sizes), "done")
    finally:
        decide.forget()  # what was measured before an interruption holds as well
    return TuningReport(str(where), str(machine), allowed.accuracy.value, tuple(points), file)


def _record(point: Point, allowed: Policy) -> TunedPoint:
    return TunedPoint(
        recipe=str(point.recipe),
        accuracy=allowed.accuracy.value,
        m=point.size.m,
        n=point.size.n,
        k=point.size.k,
        order=point.order,
        us={name: round(us, 3) for name, us in point.us.items()},
        wrong={name: reason[:300] for name, reason in point.wrong.items()},
        tiles=dict(point.tiles),
        tuned_at=now(),
    )


def _allowed(backends: str | None) -> Policy:
    """Which backends to time: as stated here, or all but those that the policy excludes.

    A list of the policy is left out: while one is stated no tuned order is asked for.
    """
    stated = policy.resolve(None, registry.NAMES)
    if backends is None:
        return replace(stated, only=())
    only, excluded = policy.parse_backends(backends, registry.NAMES)
    return replace(stated, only=only, excluded=excluded)


def _device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device("cuda" if device is None else device)
    except RuntimeError as error:
        raise DeviceError(
            f"device must be a CUDA device or 'cpu', found {device!r}: {str(error).splitlines()[0]}"
        ) from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise DeviceError(f"device must be a CUDA device or 'cpu', found {found}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = found.index
    if index is None:
        index = torch.cuda.current_device() if count else 0
    if index >= count:
        raise DeviceError(
            f"tune needs the GPU {found}, torch finds {count}; name one that is there, or 'cpu'"
        )
    return torch.device("cuda", index)


@contextmanager
def _bar(progress: bool | None) -> Iterator[OnStep]:
    console = Console(stderr=True, force_terminal=progress)
    with bar_on(console) as on_step:
        yield on_step


@contextmanager
def bar_on(console: Console) -> Iterator[OnStep]:
    """A progress bar where the console is a terminal; silent elsewhere."""
    columns = (
        TextColumn("tuning {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)

        def step(done: int, of: int, what: str) -> None:
            bar.update(task, completed=done, total=of, description=what)

        yield step
