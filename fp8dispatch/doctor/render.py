"""The doctor's report as text for a person, on terminals of 60 columns and more.

Tables hold what is short. Every sentence stands on lines of its own below them, where it is wrapped
and never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from fp8dispatch.doctor.report import (
        BackendRecord,
        ChoiceRecord,
        DeviceRecord,
        Report,
    )

_STYLES = {
    "right": "green",
    "healthy": "green",
    "wrong": "bold red",
    "broken": "bold red",
    "quarantined": "red",
    "degraded": "yellow",
    "no gpu": "yellow",
    "untested": "yellow",
}


def render(report: Report, console: Console, *, only_call: bool = False) -> None:
    """Print the report.

    Args:
        only_call: what was explained and the findings, without everything around them.
    """
    out = _Printer(console)
    if not only_call:
        _render_machine(report, out)
        _render_libraries(report, out)
        for devices in _alike(report.devices):
            first, names = devices[0], _names(devices)
            title = f"Backends on {names}: their numbers, or why not"
            _render_backends(title, first.backends, first.simulated, out)
            _render_routes(devices, out)
            title = f"Experts on {names}: the backends that have any, their numbers, or why not"
            _render_backends(title, first.experts, first.simulated, out)
            _render_expert_routes(devices, out)
        _render_overrides(report, out)
        _render_state(report, out)
    for device in report.devices:
        if device.call is not None:
            out.title(f"The call on {device.device}")
            for line in device.call.text.splitlines():
                out.line(line.strip(), indent=0 if not line.startswith(" ") else 2)
    _render_findings(report, out)


class _Printer:
    """Prints titles, tables and wrapped sentences; nothing is markup, and nothing is cut."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def title(self, text: str) -> None:
        self._console.print()
        self._console.print(Text(text, style="bold"))

    def line(self, text: str, *, indent: int = 0, style: str = "") -> None:
        wrapped = Text(text, style=style, overflow="fold").wrap(
            self._console, self._console.width - indent
        )
        for part in wrapped:
            part.rstrip()
            self._console.print(Text(" " * indent).append_text(part))

    def verbatim(self, text: str, *, indent: int = 0) -> None:
        """One line whatever its length: a command that is to be copied."""
        self._console.print(" " * indent + text, soft_wrap=True, highlight=False, markup=False)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        self._console.print(table)


def _render_machine(report: Report, out: _Printer) -> None:
    out.title("Machine")
    out.line(f"fp8dispatch {report.fp8dispatch}, Python {report.python}, {report.system}")
    rows = []
    for device in report.devices:
        kind = [device.architecture] if device.architecture else []
        if device.capability is not None:
            kind.append("consumer" if device.consumer else "datacenter")
        if device.mig:
            kind.append("MIG")
        rows.append(
            (
                device.device,
                device.name,
                "" if device.capability is None else "{}.{}".format(*device.capability),
                " ".join(kind),
                f"{device.memory_bytes / 2**30:.0f} GiB" if device.memory_bytes else "",
                device.driver,
            )
        )
    out.table(("device", "name", "cap.", "kind", "memory", "driver"), rows)
    if any(device.simulated for device in report.devices):
        out.line("Simulated: decided for that machine; nothing was or can be tested on it.")
    elif not report.probed:
        out.line("Nothing was imported: --probe imports torch and tests each backend's numbers.")


def _render_libraries(report: Report, out: _Printer) -> None:
    out.title("Libraries")
    out.table(
        ("library", "found", "needs"),
        [(one.name, one.found or "none", one.needs) for one in report.libraries],
    )
    hints = [one for one in report.libraries if one.install]
    if hints:
        out.line("What fits this torch, for those that are missing or do not fit:")
    for one in hints:
        out.line(f"{one.name}:", indent=2)
        out.verbatim(one.install, indent=4)


def _alike(devices: Sequence[DeviceRecord]) -> Iterator[list[DeviceRecord]]:
    """Devices that were decided, those with the same answers together."""
    groups: list[list[DeviceRecord]] = []
    for device in devices:
        if not device.decided:
            continue
        for group in groups:
            first = group[0]
            if _answers(first) == _answers(device):
                group.append(device)
                break
        else:
            groups.append([device])
    yield from groups


def _answers(device: DeviceRecord) -> tuple[object, ...]:
    return device.name, device.backends, device.routes, device.experts, device.expert_routes


def _render_backends(
    title: str, backends: Sequence[BackendRecord], simulated: bool, out: _Printer
) -> None:
    out.title(title)
    recipes = [one.recipe for backend in backends for one in backend.recipes]
    headings = list(dict.fromkeys(recipes))
    rows = [_backend_row(backend, headings) for backend in backends]
    out.table(("backend", *map(_column, headings)), rows)
    for backend in backends:
        for reason in backend.refusals:
            out.line(reason.sentence, indent=2)
        for one in backend.recipes:
            for reason in one.refusals:
                out.line(f"{one.recipe}: {reason.sentence}", indent=2)
    if simulated:
        return  # all is untested, for the one reason that stands above
    told: dict[str, list[str]] = {}
    for backend in backends:
        for one in backend.recipes:
            if one.verdict in ("wrong", "untested", "quarantined"):
                told.setdefault(f"{one.verdict}, {one.reason}", []).append(
                    f"{backend.name} {one.recipe}"
                )
    for reason_text, which in told.items():
        out.line(f"{', '.join(which)}: {reason_text}", indent=2)


def _column(recipe: str) -> str:
    """A recipe in a table, where 60 columns have to do: blocks by their size alone."""
    return recipe.removeprefix("block ")


def _backend_row(backend: BackendRecord, headings: Sequence[str]) -> tuple[str, ...]:
    if backend.refusals:
        return (backend.name, *("-" for _ in headings))
    verdicts = {one.recipe: one.verdict for one in backend.recipes}
    return (backend.name, *(_short(verdicts.get(heading, "")) for heading in headings))


def _short(verdict: str) -> str:
    return {"refused": "-", "not needed": "plain"}.get(verdict, verdict)


def _render_routes(devices: list[DeviceRecord], out: _Printer) -> None:
    device = devices[0]
    out.title(f"Routes on {_names(devices)}: what runs a call, bf16 output, no bias")
    _render_choices(
        device.routes,
        device.backends,
        device,
        ("recipe", "N x K"),
        lambda choice: (_column(choice.recipe), f"{choice.n} x {choice.k}"),
        lambda choice: f"M={choice.m}",
        out,
    )


def _render_expert_routes(devices: list[DeviceRecord], out: _Printer) -> None:
    device = devices[0]
    if not device.expert_routes:
        return
    of_all = device.expert_routes[0]
    weights = f"E={of_all.experts} N={of_all.n} K={of_all.k}"
    out.title(f"What runs experts on {_names(devices)}: {weights}, bf16 output, no bias")
    _render_choices(
        device.expert_routes,
        device.experts,
        device,
        ("recipe",),
        lambda choice: (_column(choice.recipe),),
        lambda choice: f"{'batched' if choice.batched else 'grouped'} M={choice.m}",
        out,
    )


def _render_choices(
    choices: Sequence[ChoiceRecord],
    backends: Sequence[BackendRecord],
    device: DeviceRecord,
    headings: tuple[str, ...],
    row_of: Callable[[ChoiceRecord], tuple[str, ...]],
    column_of: Callable[[ChoiceRecord], str],
    out: _Printer,
) -> None:
    """A table of choices, with the reasons below it that its marks name."""
    reasons: dict[tuple[str, ...], int] = {}
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for choice in choices:
        mark = reasons.setdefault(_reason(choice, backends, device.simulated), len(reasons) + 1)
        row = cells.setdefault(row_of(choice), {})
        row[column_of(choice)] = f"{choice.backend or 'ERROR'} [{mark}]"
    columns = list(dict.fromkeys(map(column_of, choices)))
    out.table(
        (*headings, *columns),
        [(*row, *(of_row.get(column, "") for column in columns)) for row, of_row in cells.items()],
    )
    for lines, mark in reasons.items():
        out.line(f"[{mark}] {lines[0]}")
        for line in lines[1:]:
            out.line(line, indent=4)


def _reason(
    choice: ChoiceRecord, backends: Sequence[BackendRecord], simulated: bool
) -> tuple[str, ...]:
    """Why a choice was made, in lines; choices with the same lines share a mark."""
    order = choice.route if choice.route != "default" else "the default for this GPU"
    stated = "" if choice.decided_by == "default" else f", decided by {choice.decided_by}"
    raises = "" if choice.error is None else "the call raises, since no backend is left; "
    tile = f", {choice.backend} {choice.tile}" if choice.tile else ""
    lines = [f"{raises}order: {order}{stated}{tile}"]
    cannot_run = {backend.name for backend in backends if backend.refusals}
    absent = [one.backend for one in choice.passed_over if one.backend in cannot_run]
    if absent:
        lines.append(f"{', '.join(absent)}: cannot run here, for the reasons above")
    lines += [
        reason.sentence
        for one in choice.passed_over
        if one.backend not in cannot_run
        for reason in one.refusals
    ]
    if choice.numbers == "untested" and not simulated:
        lines.append(f"the numbers of {choice.backend} are untested")
    return tuple(lines)


def _names(devices: Sequence[DeviceRecord]) -> str:
    return f"{', '.join(device.device for device in devices)} ({devices[0].name})"


def _render_overrides(report: Report, out: _Printer) -> None:
    out.title("Overrides, the nearest first")
    out.table(
        ("place", "backends", "accuracy", "batch-invariant", "dgrad", "in force"),
        [
            (
                one.source,
                one.backends or "none",
                one.accuracy or "none",
                {None: "none", True: "yes", False: "no"}[one.batch_invariant],
                one.dgrad or "none",
                "yes" if one.in_force else "",
            )
            for one in report.overrides
        ],
    )
    for variable in report.environment:
        out.line(f"{variable.name}={variable.value}", indent=2)


def _render_state(report: Report, out: _Printer) -> None:
    out.title("Quarantine")
    if not report.quarantine:
        out.line("empty (it holds for one process, and this one has made no calls)", indent=2)
    for held in report.quarantine:
        out.line(f"{held.backend}, {held.recipe}, {held.device}: {held.reason}", indent=2)
    out.title("Caches")
    cache = report.cache
    if cache.path is None:
        out.line("verdicts: no directory to keep them in", indent=2)
    else:
        out.line(f"verdicts: {cache.verdicts} in {cache.path}", indent=2)
    if cache.cleared is not None:
        out.line(f"deleted before: {cache.cleared}", indent=2)
    if cache.tuned_path is not None:
        out.line(f"files of tuned routes: {cache.tuned_files} in {cache.tuned_path}", indent=2)
    if cache.tuned_cleared is not None:
        out.line(f"deleted before: {cache.tuned_cleared}", indent=2)
    for device in report.devices:
        if device.tuned is not None and device.tuned.routes:
            tuned = device.tuned
            state = "in force" if tuned.in_force else "turned off by FP8DISPATCH_TUNED"
            where = f", {tuned.file}" if tuned.file else ", of this process alone"
            out.line(
                f"tuned routes for {device.device}: {tuned.routes} {state}, the newest of "
                f"{tuned.date}{where}",
                indent=2,
            )


def _render_findings(report: Report, out: _Printer) -> None:
    out.title(f"Findings: {report.status} (exit code {report.exit_code})")
    for finding in report.findings:
        out.line(f"{finding.level}: {finding.sentence}", style=_STYLES.get(finding.level, ""))
    if not report.findings:
        out.line("nothing is wrong")
