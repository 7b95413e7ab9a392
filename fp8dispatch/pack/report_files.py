"""A report as files: JSON for programs, Markdown for people, a picture of all layers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fp8dispatch.pack.figures import SUSPICIOUS_SQNR, TensorFigures
from fp8dispatch.pack.report import WORST, Report
from fp8dispatch.pack.scheme import MSE


def report_files(report: Report, path: Path) -> tuple[dict[str, bytes], list[str]]:
    """The files of a report, and what to tell the user about them.

    Args:
        report: what to say.
        path: of the JSON file; the others lie beside it.

    Returns:
        name -> content, and sentences: that the picture needs matplotlib, where it is missing.
    """
    files = {
        path.with_suffix(".json").name: (report.model_dump_json(indent=1) + "\n").encode(),
        path.with_suffix(".md").name: markdown(report).encode(),
    }
    if find_spec("matplotlib") is None:
        return files, [
            "the report's picture needs matplotlib, found none installed; pip install "
            "'fp8dispatch[plot]' and repeat with --force for it"
        ]
    # Imported here because it imports matplotlib, which is not a requirement of the package.
    from fp8dispatch.pack.picture import picture

    files[path.with_suffix(".png").name] = picture(report)
    return files, []


def markdown(report: Report) -> str:
    """The report as a page."""
    totals = report.totals
    before, after = totals.bytes_before, totals.bytes_after
    searched = " Scales have the least squared error of eight." if report.scales == MSE else ""
    lines = [
        f"# FP8 report: {report.model_type or 'model'}, {report.recipe} in {report.format}",
        "",
        f"{totals.weights} weights ({totals.values:,} values) were quantised, {totals.kept} "
        f"tensors kept. {before:,} bytes became {after:,} ({after / max(1, before):.1%})."
        f"{searched}",
        "",
        f"SQNR of all values: {_db(totals.sqnr_db)} dB; lowest of a weight: "
        f"{_db(totals.lowest_sqnr_db)} dB. Clipped values: {totals.clipped}. Scales over zeros "
        f"alone: {totals.zero_blocks}.",
        "",
    ]
    if totals.suspicious:
        lines += [
            f"**{len(totals.suspicious)} weights are below {SUSPICIOUS_SQNR:g} dB**, where E4M3 "
            f"gives about 31.5 dB: they hold values of very different size, or are damaged.",
            "",
        ]
    by_name = {one.name: one for one in report.tensors}
    lines += [
        f"## The {len(report.worst)} weights with the lowest SQNR",
        "",
        "| weight | shape | scheme | SQNR dB | relative error | cosine | max error | amax "
        "| amax / p99.9 | to zero | scales |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(by_name[name]) for name in report.worst),
        "",
    ]
    spiky = sorted(report.activation_saturation.items(), key=lambda item: -item[1])[:WORST]
    if spiky:
        lines += [
            "## The inputs with the largest amax / p99.9",
            "",
            "| module | ratio |",
            "|---|---|",
            *(f"| {_cell(name)} | {ratio:.1f} |" for name, ratio in spiky),
            "",
        ]
    return "\n".join(lines)


def _row(one: TensorFigures) -> str:
    ratio = "" if one.saturation_ratio is None else f"{one.saturation_ratio:.1f}"
    cosine = "" if one.cosine is None else f"{one.cosine:.6f}"
    return (
        f"| {_cell(one.name)} | {one.shape[0]} x {one.shape[1]} | {one.scheme} | "
        f"{_db(one.sqnr_db)} | {one.relative_error:.2%} | {cosine} | {one.max_abs_error:.3g} | "
        f"{one.amax:.3g} | {ratio} | {one.flushed:.2%} | {one.scale_min:.3g} to "
        f"{one.scale_max:.3g} |"
    )


def _cell(name: str) -> str:
    return name.replace("|", "\\|")


def _db(value: float | None) -> str:
    return "no loss" if value is None else f"{value:.2f}"
