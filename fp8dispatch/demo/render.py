"""The demo's report as text for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from fp8dispatch.demo.report import DemoReport

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def render(report: DemoReport, console: Console) -> None:
    """Print the tables and the verdict of every check."""
    machine = report.machine
    capability = "" if machine.capability is None else " sm_{}{}".format(*machine.capability)
    console.print(
        f"{report.model} on {machine.device}{capability} ({machine.threads} CPU threads), "
        f"torch {report.versions['torch']}; {report.sentences} sentences, {report.tokens} tokens, "
        f"M = {report.rows_of_x} with padding",
        highlight=False,
        markup=False,
    )
    console.print(_comparison(report))
    if report.recipes:
        first = report.recipes[0]
        console.print(
            f"fp8 {first.recipe}, first layer: {first.explanation}", highlight=False, markup=False
        )
    _render_checks(report, console)


def _comparison(report: DemoReport) -> Table:
    table = Table(title="Embeddings against fp32")
    table.add_column("weights")
    table.add_column("backend")
    for heading in ("linear bytes before", "after", "worst cosine", "mean cosine", "ms per pass"):
        table.add_column(heading, justify="right")
    for row in report.baselines:
        table.add_row(
            _SHORT[row.dtype],
            "torch",
            "",
            "",
            f"{row.worst_cosine:.5f}",
            f"{row.mean_cosine:.5f}",
            f"{row.seconds * 1e3:.2f}",
        )
    for result in report.recipes:
        table.add_row(
            f"fp8 {result.recipe}",
            ", ".join(result.backends),
            _mebibytes(result.bytes_before),
            _mebibytes(result.bytes_after),
            f"{result.worst_cosine:.5f}",
            f"{result.mean_cosine:.5f}",
            f"{result.seconds * 1e3:.2f}",
        )
    return table


def _render_checks(report: DemoReport, console: Console) -> None:
    lora = report.lora
    losses = " -> ".join(f"{loss:.4f}" for loss in lora.losses)
    console.print(
        f"LoRA (rank {lora.rank}, {lora.adapted} layers, {lora.trained_parameters} parameters) "
        f"on frozen FP8 {lora.recipe} weights, loss before and after two steps: {losses}",
        highlight=False,
    )
    checks = [
        (
            f"fp8 {result.recipe}: every cosine to fp32 is at least {report.min_cosine}",
            result.passed,
        )
        for result in report.recipes
    ]
    before, first, second = lora.losses
    checks += [
        ("the loss falls at each step", second < first < before),
        ("only the LoRA parameters got gradients", lora.only_adapters_got_gradients),
        ("the FP8 weights are unchanged, byte for byte", lora.weights_unchanged),
    ]
    for claim, holds in checks:
        verdict = "[green]ok[/]    " if holds else "[red]FAILED[/]"
        console.print(f"{verdict}  {claim}", highlight=False)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
