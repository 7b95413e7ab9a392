"""The tuned orders in force in this process, as the router asks for them on the cold path.

A measurement holds for its recipe, its class of accumulation, its N and K, and the **bucket** of
its M. Buckets end at powers of four: M = 1, 2 to 4, 5 to 16, 17 to 64, 65 to 256, 257 to 1024 and
so on. Of several measurements in a bucket the nearest M speaks, by ratio; of two that are as near,
the larger. A bucket in which nothing was measured keeps the order that it has without tuning.
Dtypes and a bias are not asked for: a backend that refuses them makes way for the next.

The tile of a backend that was found with an order holds where the order holds, and where the
backend can use it.

Numbers that were wrong while tuning keep the backend from every M of that recipe, N and K.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fp8dispatch import __version__, policy, registry
from fp8dispatch.machine import Machine
from fp8dispatch.problem import LinearProblem
from fp8dispatch.routes import TunedRoute

if TYPE_CHECKING:
    from fp8dispatch.tuning.store import DeviceFingerprint, TunedPoint, TunedStore

BUCKET_BASE = 4
NOT_STORED = "in this process only"

_log = logging.getLogger("fp8dispatch")


@dataclass(frozen=True)
class InForce:
    """What holds on a machine.

    Attributes:
        points: by recipe, accuracy, N and K.
        file: where they are kept; None for those of this process alone, and where there are none.
        date: of the newest, ``""`` where there are none.
        ignored: what was found and is not for this machine, in a sentence; else empty.
    """

    points: dict[tuple[str, str, int, int], list[TunedPoint]] = field(default_factory=dict)
    file: Path | None = None
    date: str = ""
    ignored: str = ""

    def __len__(self) -> int:
        return sum(len(points) for points in self.points.values())


_tables: dict[Machine, InForce] = {}
_unstored: dict[Machine, tuple[TunedPoint, ...]] = {}
_told: set[str] = set()


def bucket(m: int) -> int:
    """The largest M of the bucket that an M lies in: the power of four that is not below it."""
    top = 1
    while top < m:
        top *= BUCKET_BASE
    return top


def find(problem: LinearProblem, machine: Machine, *, quietly: bool = False) -> TunedRoute | None:
    """What tuning found for a call; None where nothing was measured that holds for it.

    Args:
        quietly: leave it to the caller to say what was found and is not for this machine.
    """
    if problem.family or problem.batch_invariant:
        return None  # experts are not tuned; a batch must not be summed as another is not
    table = in_force(machine)
    if table.ignored and not quietly:
        tell(table.ignored)
    key = (str(problem.recipe), problem.accuracy.value, problem.n, problem.k)
    points = table.points.get(key)
    if not points:
        return None
    near = [one for one in points if one.order and bucket(one.m) == bucket(problem.m)]
    wrong = {name: reason for one in points for name, reason in one.wrong.items()}
    if not near:
        return TunedRoute((), "", wrong) if wrong else None
    point = min(near, key=lambda one: (abs(math.log(one.m / max(problem.m, 1))), -one.m))
    stored = table.file is not None and point not in _unstored.get(machine, ())
    where = str(table.file) if stored else NOT_STORED
    return TunedRoute(point.order, f"tuned, {where}, {point.date}", wrong, point.tiles)


def in_force(machine: Machine) -> InForce:
    """Everything that holds on a machine, read from disk when it is first asked for."""
    table = _tables.get(machine)
    if table is None:
        table = _tables[machine] = _load(machine)
    return table


def keep(machine: Machine, point: TunedPoint, store: TunedStore | None, reason: str) -> Path | None:
    """Put a new measurement into force: on disk where that can be done, else in this process.

    Args:
        machine: where it was measured.
        point: the measurement.
        store: where to keep it; None where there is no place.
        reason: why it must not be written; empty where the store's turn is held.

    Returns:
        The file that it is in; None where it is kept in this process alone, which is said once.
    """
    path = None
    if store is not None and not reason:
        try:
            path = store.add(fingerprint_of(machine), (point,))
        except OSError as error:
            reason = f"{store.directory} cannot be used ({type(error).__name__}: {error})"
    if path is None:
        from fp8dispatch.tuning.store import merged

        _unstored[machine] = merged(_unstored.get(machine, ()), (point,))
        tell(
            f"tuned routes hold for this process only, since {reason}; set FP8DISPATCH_CACHE_DIR "
            f"to a directory that can be written"
        )
    _tables.clear()
    return path


def forget() -> None:
    """Drop what was read; files and what holds for this process alone stay."""
    _tables.clear()
    _told.clear()


def clear() -> int:
    """Drop everything, on disk as well; the number of files deleted.

    Raises:
        OSError: a file that cannot be deleted.
    """
    forget()
    _unstored.clear()
    store, _ = open_store()
    return 0 if store is None else store.clear()


def tell(sentence: str) -> None:
    """Say something once in this process."""
    if sentence not in _told:
        _told.add(sentence)
        _log.warning("%s", sentence)


def open_store() -> tuple[TunedStore | None, str]:
    """The tuned orders on disk; None, and why, where there is no home to keep them in."""
    from fp8dispatch.tuning.store import TunedStore

    try:
        return TunedStore(policy.cache_directory()), ""
    except RuntimeError as error:  # pathlib's word for a user without a home
        return None, str(error)


def fingerprint_of(machine: Machine) -> DeviceFingerprint:
    """What a measurement on a machine holds for."""
    from fp8dispatch.tuning.store import DeviceFingerprint

    wanted = {"torch", "triton", "cuda", "hip"}
    versions: dict[str, str] = {}
    for name in registry.NAMES:
        backend = registry.load(name)
        wanted.update(backend.distributions)
        wanted.update(() if backend.distribution is None else (backend.distribution,))
        if not backend.refuse_machine(machine):  # of others it says nothing, and may change
            versions |= {f"{name} {tool}": text for tool, text in backend.toolchain().items()}
        plugin = registry.plugin_version(name)
        if plugin is not None:
            versions[f"plugin {name}"] = plugin
    versions |= {name: text for name, text in machine.versions.items() if name in wanted}
    return DeviceFingerprint(
        device=f"{machine.device_type} {machine.device_name}",
        capability=machine.capability,
        memory_bytes=machine.memory_bytes,
        driver=machine.driver,
        versions=versions,
        fp8dispatch=__version__,
    )


def _load(machine: Machine) -> InForce:
    points, file, ignored = _unstored.get(machine, ()), None, ""
    store = _store_if_there()
    if store is not None:
        fingerprint = fingerprint_of(machine)
        found, ignored = store.load(fingerprint)
        if found is not None:
            file = store.path(fingerprint)
            from fp8dispatch.tuning.store import merged

            points = merged(found.points, points)
    table: dict[tuple[str, str, int, int], list[TunedPoint]] = {}
    for point in points:
        key = (point.recipe, point.accuracy, point.n, point.k)
        table.setdefault(key, []).append(point)
    date = max((point.date for point in points), default="")
    return InForce(table, file, date, ignored)


def _store_if_there() -> TunedStore | None:
    """The store where somebody has tuned; most have not, and need not wait for pydantic."""
    try:
        if not (policy.cache_directory() / "tuned").is_dir():
            return None
    except (OSError, RuntimeError):
        return None
    return open_store()[0]
