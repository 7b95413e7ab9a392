"""Measure the inputs of a model's linear layers on a text, for static activation scales.

MODEL_DIR is a folder with config.json, safetensors and tokenizer files, as Transformers reads it;
no pickle is opened and no code of the checkpoint runs. The text is a .txt file with a sample on
each line, or .jsonl with a string or an object with "text", "prompt" or "content". Progress is a
bar on a terminal and JSON lines elsewhere, on stderr. The same command resumes a run that was
interrupted. Needs: pip install 'fp8dispatch[calibrate]'.

Exit codes: 0 ok, 1 the statistics cannot be trusted (NaN or infinity were met), 2 usage, 3 no GPU
where one was asked for, 5 interrupted and resumable.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fp8dispatch.errors import CalibrationError, InvalidInputError

if TYPE_CHECKING:
    from fp8dispatch.calibrate.output_error import OutputError
    from fp8dispatch.calibrate.stats import CalibrationStats

EXIT_OK, EXIT_CHECK_FAILED, EXIT_USAGE, EXIT_NO_GPU, EXIT_INTERRUPTED = 0, 1, 2, 3, 5

_FEW_SAMPLES = 128
_ROWS = 10
_PLAIN_WIDTH = 110

OnProgress = Callable[[int, int, int], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``fp8dispatch calibrate``."""
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL_DIR", help="a checkpoint")
    parser.add_argument("--text", type=Path, metavar="FILE", help="samples, .txt or .jsonl")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", required=True, help="the statistics (JSON)"
    )
    parser.add_argument(
        "-n", "--samples", type=_positive, default=256, metavar="N", help="how many (256)"
    )
    parser.add_argument(
        "--method",
        choices=("max", "percentile", "mse"),
        default="max",
        help="how scales will be made of the statistics (max)",
    )
    parser.add_argument(
        "--percentile", type=float, default=99.99, metavar="Q", help="of that method (99.99)"
    )
    parser.add_argument(
        "--sequence-length",
        type=_positive,
        default=2048,
        metavar="T",
        help="tokens of a sample at most (2048, or fewer if the model takes fewer)",
    )
    parser.add_argument(
        "--split",
        choices=("lines", "chunks"),
        default="lines",
        help="a sample is a line, or the whole text is cut into pieces of --sequence-length",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=1,
        metavar="B",
        help="samples of a call (1); padding is masked, but not in the inputs of experts",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="of the model while it runs (auto: the checkpoint's)",
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu (default) or cuda")
    parser.add_argument(
        "--exclude-first-tokens",
        type=int,
        default=0,
        metavar="N",
        help="leave the first tokens of each sample out (0)",
    )
    parser.add_argument("--no-kv-cache", action="store_true", help="do not measure the KV cache")
    parser.add_argument("--force", action="store_true", help="start anew, never resume")
    parser.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="merge statistics of one model instead of running it",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate or merge; returns the exit code."""
    errors = Console(stderr=True)
    try:
        if arguments.merge:
            return _merge(arguments)
        return _calibrate(arguments, errors)
    except (CalibrationError, InvalidInputError) as error:
        errors.print(str(error), highlight=False, markup=False, soft_wrap=True)
        return EXIT_USAGE
    except KeyboardInterrupt:
        errors.print(
            f"interrupted; the same command goes on from what {arguments.output} holds",
            highlight=False,
            soft_wrap=True,
        )
        return EXIT_INTERRUPTED


def _calibrate(arguments: argparse.Namespace, errors: Console) -> int:
    if arguments.model is None or arguments.text is None:
        raise InvalidInputError(
            "calibrate needs MODEL_DIR and --text FILE, or --merge FILE ...; found neither pair"
        )
    if not arguments.output.parent.is_dir():
        raise InvalidInputError(
            f"--output needs an existing folder, there is none at {arguments.output.parent}"
        )
    # Torch and Transformers take seconds to import: not before the arguments have been read.
    import torch

    from fp8dispatch.calibrate.methods import check_method
    from fp8dispatch.calibrate.run import Plan, run_plan

    check_method(arguments.method, arguments.percentile)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        errors.print("--device cuda needs a CUDA device, torch finds none", highlight=False)
        return EXIT_NO_GPU
    plan = Plan(
        model=arguments.model,
        text=arguments.text,
        output=arguments.output,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        batch_size=arguments.batch_size,
        split=arguments.split,
        method=arguments.method,
        percentile=arguments.percentile,
        dtype=arguments.dtype,
        device=arguments.device,
        exclude_first_tokens=arguments.exclude_first_tokens,
        kv_cache=not arguments.no_kv_cache,
    )
    with _progress(errors) as on_progress:
        result = run_plan(plan, restart=arguments.force, on_progress=on_progress)
    notes = []
    if result.samples < arguments.samples:
        notes.append(f"the text has {result.samples} samples, {arguments.samples} were asked for")
    if result.samples < _FEW_SAMPLES:
        notes.append(f"{result.samples} samples are few; {_FEW_SAMPLES} to 512 are usual")
    return _summary(arguments, result.stats, result.output_errors, notes)


def _merge(arguments: argparse.Namespace) -> int:
    if arguments.model is not None or arguments.text is not None:
        raise InvalidInputError(
            "--merge takes files of statistics alone, found MODEL_DIR or --text beside it; run "
            "the two one after the other"
        )
    from fp8dispatch.calibrate.stats import CalibrationStats, merge_stats

    merged = merge_stats(*(CalibrationStats.load(path) for path in arguments.merge))
    named = {"method": arguments.method, "percentile": arguments.percentile}
    merged = merged.model_copy(update=named)
    merged.save(arguments.output)
    return _summary(arguments, merged, {}, [])


def _summary(
    arguments: argparse.Namespace,
    stats: CalibrationStats,
    output_errors: dict[str, dict[str, OutputError]],
    notes: list[str],
) -> int:
    """Print what was found; the exit code."""
    from fp8dispatch.calibrate.saturation import findings, saturation

    rows, found = saturation(stats), notes + findings(stats)
    if arguments.json:
        summary = {
            "output": str(arguments.output),
            "method": stats.method,
            "complete": stats.complete,
            "samples": stats.samples,
            "tokens": stats.tokens,
            "layers": len(stats.modules),
            "kv_cache_layers": len(stats.kv_cache),
            "findings": found,
            "saturation": [_plain(row) for row in rows],
            "output_errors": {
                name: {way: vars(error) for way, error in ways.items()}
                for name, ways in output_errors.items()
            },
        }
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")
    else:
        console = Console()
        console = console if console.is_terminal else Console(width=_PLAIN_WIDTH)
        console.print(
            f"{stats.samples} samples, {stats.tokens} tokens, {len(stats.modules)} layers, "
            f"{len(stats.kv_cache)} layers of KV cache: {arguments.output}",
            highlight=False,
            soft_wrap=True,
        )
        console.print(_table(rows[:_ROWS]))
        if output_errors:
            console.print(_errors_table(output_errors))
        for sentence in found:
            console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)
    spoilt = any(record.nonfinite for record in stats.modules.values())
    return EXIT_CHECK_FAILED if spoilt else EXIT_OK


def _plain(row: Any) -> dict[str, Any]:
    """A row of the saturation watch as JSON has it, which knows no infinity."""
    values = dict(vars(row))
    if values["ratio"] == float("inf"):
        values["ratio"] = None
    return values


def _table(rows: list[Any]) -> Table:
    table = Table(title="largest inputs against the rest", title_justify="left")
    for heading in ("layer", "amax", "p99.9", "ratio", "clipped", "underflow", ""):
        table.add_column(heading, justify="left" if heading in ("layer", "") else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.amax:.4g}",
            f"{row.p99_9:.4g}",
            f"{row.ratio:.4g}",
            f"{row.clipped:.2e}",
            f"{row.underflow:.2e}",
            "" if row.level == "fine" else row.level,
        )
    return table


def _errors_table(output_errors: dict[str, dict[str, OutputError]]) -> Table:
    table = Table(
        title="error of the output with these inputs in FP8: of all tokens, of the median token",
        title_justify="left",
    )
    ways = list(next(iter(output_errors.values())))
    for heading in ("layer", *ways):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for name, errors in output_errors.items():
        cells = [f"{errors[way].total:.2%}, {errors[way].median_token:.2%}" for way in ways]
        table.add_row(name, *cells)
    return table


@contextmanager
def _progress(errors: Console) -> Iterator[OnProgress]:
    """A bar on a terminal, a JSON line for each step elsewhere."""
    if not errors.is_terminal:

        def line(samples: int, of: int, tokens: int) -> None:
            event = {"event": "progress", "samples": samples, "of": of, "tokens": tokens}
            sys.stderr.write(json.dumps(event) + "\n")
            sys.stderr.flush()

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("loading", total=None)

        def update(samples: int, of: int, tokens: int) -> None:
            progress.update(task, description=f"{tokens} tokens", completed=samples, total=of)

        yield update


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {text}")
    return value
