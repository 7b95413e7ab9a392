"""What packing a checkpoint would do, from headers alone: each tensor, where the result loads.

Nothing is written. Without flags the plan is for channel scales in the compressed-tensors format,
which loads everywhere. Exit codes: 0 packing can go ahead, 1 it would fail (the problems say why),
2 usage.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fp8dispatch.pack.commands.common import EXIT_CHECK_FAILED, EXIT_OK, guarded, output, print_json

if TYPE_CHECKING:
    from fp8dispatch.pack.options import PackOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("source", metavar="MODEL", help="a folder, a file or a hub cache folder")
    add_option_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def add_option_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that decide how a checkpoint is packed."""
    from fp8dispatch.pack.kvcache import KV_CHOICES
    from fp8dispatch.pack.layouts.catalog import ALIASES, LAYOUTS
    from fp8dispatch.pack.layouts.loadability import TARGETS
    from fp8dispatch.pack.options import PRESETS, OnRagged
    from fp8dispatch.pack.scheme import AMAX, SCALES, SCHEMES

    parser.add_argument("--recipe", choices=SCHEMES, help="how weights are quantised")
    parser.add_argument("--format", choices=[*LAYOUTS, *ALIASES], help="the on-disk format")
    parser.add_argument(
        "--preset", choices=PRESETS, help="recipe, format and dtype for this hardware"
    )
    parser.add_argument(
        "--dtype",
        choices=("float8_e4m3fn", "float8_e4m3fnuz"),
        help="FP8 dtype; FNUZ is for MI300 (gfx942)",
    )
    parser.add_argument("--target", choices=TARGETS, help="fail unless the result loads there")
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="ranks of tensor parallelism in vLLM"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help="leave modules as they are"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="quantise only these modules"
    )
    parser.add_argument(
        "--keep-ends",
        type=int,
        default=0,
        metavar="N",
        help="leave the first and the last N layers as they are",
    )
    parser.add_argument(
        "--on-ragged",
        choices=[one.value for one in OnRagged],
        help="what to do with weights that are no whole blocks",
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="statistics for static activation scales"
    )
    parser.add_argument(
        "--kv-scales", choices=KV_CHOICES, help="write the calibration's scales of the KV cache"
    )
    parser.add_argument(
        "--scales",
        choices=SCALES,
        default=AMAX,
        help="how scales are found: by the largest value (amax), or by the least squared error of "
        "eight candidates (mse), which takes several times as long",
    )
    parser.add_argument(
        "--keep-master", action="store_true", help="keep the source's weights in OUT/master"
    )


def options_of(arguments: argparse.Namespace) -> PackOptions:
    """The options that the arguments mean."""
    from fp8dispatch.pack.options import OnRagged, PackOptions

    return PackOptions(
        recipe=arguments.recipe,
        layout=arguments.format,
        dtype=arguments.dtype,
        preset=arguments.preset,
        target=arguments.target,
        tp=arguments.tp,
        skip=tuple(arguments.skip),
        only=tuple(arguments.only),
        on_ragged=None if arguments.on_ragged is None else OnRagged(arguments.on_ragged),
        calibration=None if arguments.calibration is None else Path(arguments.calibration),
        keep_master=arguments.keep_master,
        kv_scales=arguments.kv_scales,
        scales=arguments.scales,
        keep_ends=arguments.keep_ends,
    )


def run(arguments: argparse.Namespace) -> int:
    """Plan; returns the exit code."""

    def work() -> int:
        from fp8dispatch.pack.plan import plan_checkpoint
        from fp8dispatch.pack.summary import PlanSummary, render

        planned = plan_checkpoint(arguments.source, options_of(arguments))
        summary = PlanSummary.of(planned)
        if arguments.json:
            print_json(summary.model_dump_json(indent=2))
        else:
            render(summary, output())
        return EXIT_CHECK_FAILED if planned.problems else EXIT_OK

    return guarded(work)
