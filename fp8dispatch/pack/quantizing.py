"""The weights of one file into FP8, in units of some megabytes that threads take.

A unit is some rows of one weight: read, quantised, measured and written by one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch

from fp8dispatch.pack.figures import BandMeter, Sums, TensorFigures
from fp8dispatch.pack.layouts import codec
from fp8dispatch.pack.layouts.contract import Role
from fp8dispatch.pack.planned import Weight
from fp8dispatch.pack.strips import BandQuantizer, amax_of
from fp8dispatch.pack.tiling import Tiling
from fp8dispatch.pack.writer import ShardWriter
from fp8dispatch.recipe import TENSOR

UNIT_BYTES = 16 << 20


def quantize_weights(
    weights: list[Weight],
    writer: ShardWriter,
    pool: ThreadPoolExecutor,
    scales: str,
    measured: bool,
    others: list[Future[Any]],
    step: Callable[[int, int], None],
) -> list[TensorFigures]:
    """Quantise the weights of one file.

    Args:
        weights: of the file, as the plan has them.
        writer: of the file.
        pool: the threads that work.
        scales: one of `SCALES`.
        measured: whether figures are wanted.
        others: what else is being written to the file, to be waited for.
        step: called with (done, of) after each unit.

    Returns:
        The figures of the weights in their order; none where they are not wanted.

    Raises:
        NumericalOverflowError: a weight that holds NaN or infinity.
    """
    limits = _tensor_limits(weights, pool)
    units: list[list[Future[Sums | None]]] = []
    for weight in weights:
        tiling = Tiling.of(weight.module.scheme, weight.module.shape)
        amax = limits.get(weight.module.name)
        units.append(
            [
                pool.submit(
                    _quantize_unit, weight, tiling, writer, top, bottom, amax, scales, measured
                )
                for top, bottom in _unit_rows(weight, tiling)
            ]
        )
    finish([*others, *(future for futures in units for future in futures)], step)
    figures = []
    for weight, futures in zip(weights, units, strict=True):
        total = Sums()
        for future in futures:
            sums = future.result()
            if sums is not None:
                total.merge(sums)
        if measured:
            module = weight.module
            figures.append(total.figures(f"{module.name}.weight", module.shape, str(module.scheme)))
    return figures


def _tensor_limits(weights: list[Weight], pool: ThreadPoolExecutor) -> dict[str, torch.Tensor]:
    """Largest magnitudes of the weights that have one scale: they are needed before the first row
    is divided."""
    parts = {
        weight.module.name: [
            pool.submit(_amax_unit, weight, top, bottom)
            for top, bottom in _unit_rows(
                weight, Tiling.of(weight.module.scheme, weight.module.shape)
            )
        ]
        for weight in weights
        if weight.module.scheme.recipe == TENSOR
    }
    finish([future for futures in parts.values() for future in futures])
    return {
        # `max` propagates NaN, which is then refused with the weight's name.
        name: torch.cat([future.result() for future in futures]).max().reshape(1)
        for name, futures in parts.items()
    }


def _amax_unit(weight: Weight, top: int, bottom: int) -> torch.Tensor:
    return amax_of(weight.source.read(top, bottom))


def _unit_rows(weight: Weight, tiling: Tiling) -> Iterator[tuple[int, int]]:
    """Row ranges of the units of a weight: whole bands; all rows where any read takes them all."""
    row_bytes = weight.source.tensor.nbytes // max(1, tiling.n)
    bands = max(1, UNIT_BYTES // max(1, row_bytes * tiling.band))
    rows = tiling.n if weight.source.columns is not None else bands * tiling.band
    for top in range(0, tiling.n, rows):
        yield top, min(top + rows, tiling.n)


def _quantize_unit(
    weight: Weight,
    tiling: Tiling,
    writer: ShardWriter,
    top: int,
    bottom: int,
    tensor_amax: torch.Tensor | None,
    how: str,
    measured: bool,
) -> Sums | None:
    """Read, quantise, measure and write rows ``top`` to ``bottom`` of a weight."""
    module = weight.module
    where = f"{weight.origin.path}: tensor {weight.origin.name!r}"
    quantizer = BandQuantizer(tiling, module.scheme, where, how, keep=measured)
    meter = BandMeter(tiling, module.scheme) if measured else None
    values = weight.source.read(top, bottom)
    sums = Sums() if measured else None
    scales = []
    for start, stop in tiling.bands(top, bottom):
        rows = values[start - top : stop - top]
        band = quantizer.quantize(rows, tensor_amax)
        writer.write(module.tensors[0].name, band.data, start * tiling.k)
        if meter is not None and sums is not None:
            sums.merge(meter.measure(band, start))
        if tensor_amax is None or start == 0:
            scales.append(band.multipliers.reshape(-1))
    if scales:
        first = 0 if tensor_amax is not None else top // tiling.rows * tiling.scales_per_row
        _write_scales(weight, writer, torch.cat(scales), first)
    if top == 0 and weight.activation_scale is not None:
        stored = module.tensor(Role.ACTIVATION_SCALE)
        if stored is not None:
            scale = torch.tensor([weight.activation_scale], dtype=torch.float32)
            writer.write(stored.name, codec.encode(stored, scale))
    return sums


def _write_scales(
    weight: Weight, writer: ShardWriter, multipliers: torch.Tensor, first: int
) -> None:
    """Write some of a weight's scales. On disk they lie in the recipe's order in every format."""
    for stored in weight.module.tensors:
        if stored.role in (Role.WEIGHT_SCALE, Role.WEIGHT_SCALE_RECIPROCAL):
            part = replace(stored, shape=(multipliers.numel(),))
            writer.write(stored.name, codec.encode(part, multipliers), first)


def finish(futures: list[Future[Any]], step: Callable[[int, int], None] | None = None) -> None:
    """Wait for all; the first error ends the others and is raised."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=None, return_when="FIRST_COMPLETED")
        for future in done:
            if future.exception() is not None:
                for other in waiting:
                    other.cancel()
                wait(waiting)
                future.result()
        if step is not None:
            step(len(futures) - len(waiting), len(futures))
