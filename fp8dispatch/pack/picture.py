"""The report's picture: SQNR of each weight, and how far its largest value is above the others."""

from __future__ import annotations

import io

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from fp8dispatch.pack.figures import SUSPICIOUS_SQNR
from fp8dispatch.pack.report import Report

_WIDTH, _HEIGHT, _DPI = 12.0, 7.0, 100


def picture(report: Report) -> bytes:
    """The picture as PNG; equal reports give equal bytes.

    The upper half shows SQNR in dB, the lower one amax over the 99.9th percentile: of the weight,
    and of its input where a calibration was given.
    """
    # Margins by hand and numbers as they are: a computed layout and powers of ten set as formulas
    # take longer than all the rest.
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.94, bottom=0.08, hspace=0.08)
    places = range(len(report.tensors))
    sqnr = [one.sqnr_db if one.sqnr_db is not None else float("nan") for one in report.tensors]
    upper.plot(places, sqnr, "o", markersize=3, color="tab:blue")
    upper.axhline(SUSPICIOUS_SQNR, color="tab:red", linewidth=1, linestyle="--")
    upper.set_ylabel("SQNR of the weight [dB]")
    upper.set_title(f"{report.model_type or 'model'}: {report.recipe} in {report.format}")
    ratios = [one.saturation_ratio or float("nan") for one in report.tensors]
    lower.plot(places, ratios, "o", markersize=3, color="tab:blue", label="weight")
    if report.activation_saturation:
        inputs = [
            report.activation_saturation.get(one.name.removesuffix(".weight"), float("nan"))
            for one in report.tensors
        ]
        lower.plot(places, inputs, "x", markersize=4, color="tab:orange", label="input")
    lower.set_yscale("log")
    lower.yaxis.set_major_formatter(LogFormatter())
    lower.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))  # in narrow ranges
    lower.set_ylabel("amax / 99.9th percentile")
    lower.set_xlabel("quantised weight, in the order of the files")
    lower.legend(loc="upper right")
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
