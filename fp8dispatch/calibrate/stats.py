"""The file of statistics: its schema, and how it is saved, loaded and merged.

JSON, one object:

    {"format": "fp8dispatch-calibration", "schema_version": 1, "fp8dispatch": "0.1.0",
     "method": "max", "percentile": 99.99,       how `activation_scales` reads it if not told
     "complete": true,                           false: interrupted, and can be resumed
     "samples": 256, "tokens": 31337,            padding not counted
     "sources": [{...}],                         what was run; one for each file merged into it
     "modules": {"model.layers.0.mlp.up_proj":   name of a linear layer, in the model's order
        {"in_features": 576,
         "calls": 256, "unmasked_calls": 0,      forward calls; those where padding may be counted
         "values": 18050112, "zeros": 12, "nonfinite": 0,
         "amax": 13.25,                          largest finite |x| of the layer's inputs
         "amax_history": [11.5, 13.25],          of each call, the newest last, at most 1024
         "histogram": {"first": 1830, "counts": [1, 0, 5]}}},
     "kv_cache": {"model.layers.0.self_attn":    name of an attention module
        {"key_amax": [9.1, 4.2], "value_amax": [1.0, 0.7]}}}       one number for each head

Bin b of a histogram counts the |x| whose fp32 bits, shifted right by 19, are b; but not zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import fp8dispatch
from fp8dispatch.atomic import write_atomically
from fp8dispatch.calibrate.magnitudes import BIN_COUNT, Magnitudes
from fp8dispatch.calibrate.methods import DEFAULT_PERCENTILE, Method
from fp8dispatch.errors import CalibrationError

SCHEMA_VERSION: Literal[1] = 1
HISTORY_LENGTH = 1024
"""Calls whose amax is kept, the default of delayed scaling's window too."""

_LARGEST_FILE = 1 << 30
_MOST_HEADS = 4096

Count = Annotated[int, Field(ge=0, le=2**62)]
Amax = Annotated[float, Field(ge=0, le=torch.finfo(torch.float32).max, allow_inf_nan=False)]


class Record(BaseModel):
    """A part of the statistics."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HistogramRecord(Record):
    """Counts of adjacent bins; those outside are zero."""

    first: Annotated[int, Field(ge=0, lt=BIN_COUNT)] = 0
    counts: Annotated[list[Count], Field(max_length=BIN_COUNT)] = []


class ModuleRecord(Record):
    """The inputs of one linear layer, as the module's docstring describes them."""

    in_features: Annotated[int, Field(ge=1)]
    calls: Count = 0
    unmasked_calls: Count = 0
    values: Count = 0
    zeros: Count = 0
    nonfinite: Count = 0
    amax: Amax = 0.0
    amax_history: Annotated[list[Amax], Field(max_length=HISTORY_LENGTH)] = []
    histogram: HistogramRecord = HistogramRecord()

    @model_validator(mode="after")
    def _adds_up(self) -> ModuleRecord:
        if self.histogram.first + len(self.histogram.counts) > BIN_COUNT:
            raise ValueError("its histogram reaches beyond the last bin")
        if self.zeros + sum(self.histogram.counts) != self.values:
            raise ValueError("its histogram and zeros do not add up to its values")
        return self

    def magnitudes(self) -> Magnitudes:
        """The histogram to compute with."""
        counts = torch.zeros(BIN_COUNT, dtype=torch.int64)
        first, found = self.histogram.first, self.histogram.counts
        counts[first : first + len(found)] = torch.tensor(found, dtype=torch.int64)
        return Magnitudes(self.values, self.zeros, self.nonfinite, self.amax, counts)


class KVRecord(Record):
    """The largest key and value of each head of one layer."""

    key_amax: Annotated[list[Amax], Field(min_length=1, max_length=_MOST_HEADS)]
    value_amax: Annotated[list[Amax], Field(min_length=1, max_length=_MOST_HEADS)]


class SourceRecord(Record):
    """What was run.

    Attributes:
        model: its folder's or class's name.
        model_sha256: of its configuration and of the names and sizes of its weight files.
        text: name of the text file.
        text_sha256: of its content.
        settings: what else a repetition needs, such as the sequence length.
        first, samples: which samples of the text: `samples` of them from number `first` on.
    """

    model: str = ""
    model_sha256: str = ""
    text: str = ""
    text_sha256: str = ""
    settings: dict[str, str | int | float | bool] = {}
    first: Count = 0
    samples: Count = 0


class CalibrationStats(Record):
    """The whole file."""

    format: Literal["fp8dispatch-calibration"] = "fp8dispatch-calibration"
    schema_version: Literal[1] = SCHEMA_VERSION
    fp8dispatch: str = fp8dispatch.__version__
    method: Method = "max"
    percentile: Annotated[float, Field(gt=0, le=100)] = DEFAULT_PERCENTILE
    complete: bool = True
    samples: Count = 0
    tokens: Count = 0
    sources: list[SourceRecord] = []
    modules: dict[str, ModuleRecord] = {}
    kv_cache: dict[str, KVRecord] = {}

    def save(self, path: Path | str) -> None:
        """Write the file, whole or not at all.

        Raises:
            CalibrationError: it cannot be written.
        """
        path = Path(path)
        try:
            write_atomically(path, (self.model_dump_json() + "\n").encode())
        except OSError as error:
            raise CalibrationError(
                f"the statistics must be written to {path}, which fails ({error.strerror}); name "
                f"another file"
            ) from error

    @classmethod
    def load(cls, path: Path | str) -> CalibrationStats:
        """Read and check a file.

        Raises:
            CalibrationError: no such file, or not one of ours; the sentence says what is wrong.
        """
        path = Path(path)
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise CalibrationError(
                    f"statistics must have less than {_LARGEST_FILE} bytes, found "
                    f"{path.stat().st_size} in {path}; make them with fp8dispatch calibrate"
                )
            content = path.read_bytes()
        except OSError as error:
            raise CalibrationError(
                f"statistics must be in a file that can be read, found {path} ({error.strerror}); "
                f"make them with fp8dispatch calibrate"
            ) from error
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            message = first["msg"].removeprefix("Value error, ")
            raise CalibrationError(
                f"{path} must hold statistics of schema {SCHEMA_VERSION}, found at {where}: "
                f"{message}; make them with fp8dispatch calibrate"
            ) from error


def record_of(
    magnitudes: Magnitudes,
    in_features: int,
    calls: int,
    amax_history: Iterable[float] = (),
    unmasked_calls: int = 0,
) -> ModuleRecord:
    """The record of a layer whose inputs have these magnitudes."""
    used = magnitudes.counts.nonzero().flatten()
    first, last = (int(used[0]), int(used[-1])) if used.numel() else (0, -1)
    return ModuleRecord(
        in_features=in_features,
        calls=calls,
        unmasked_calls=unmasked_calls,
        values=magnitudes.values,
        zeros=magnitudes.zeros,
        nonfinite=magnitudes.nonfinite,
        amax=magnitudes.amax,
        amax_history=list(amax_history)[-HISTORY_LENGTH:],
        histogram=HistogramRecord(first=first, counts=magnitudes.counts[first : last + 1].tolist()),
    )


def merge_stats(first: CalibrationStats, *others: CalibrationStats) -> CalibrationStats:
    """Statistics of one model from several runs, exactly as if one run had made them.

    Histories are put one after the other. The method is that of the first.

    Raises:
        CalibrationError: layers of one name that differ in size, or another model.
    """
    merged = first
    for other in others:
        models = {source.model_sha256 for source in (*merged.sources, *other.sources)} - {""}
        if len(models) > 1:
            raise CalibrationError(
                "statistics that are merged must be of one model, found those of "
                + " and ".join(sorted({source.model for source in merged.sources + other.sources}))
                + " with different files; calibrate them apart"
            )
        merged = merged.model_copy(
            update={
                "complete": merged.complete and other.complete,
                "samples": merged.samples + other.samples,
                "tokens": merged.tokens + other.tokens,
                "sources": _joined(merged.sources, other.sources),
                "modules": {
                    name: _merged(name, merged.modules.get(name), other.modules.get(name))
                    for name in {**merged.modules, **other.modules}
                },
                "kv_cache": {
                    name: _merged_kv(name, merged.kv_cache.get(name), other.kv_cache.get(name))
                    for name in {**merged.kv_cache, **other.kv_cache}
                },
            }
        )
    return merged


def _joined(first: list[SourceRecord], second: list[SourceRecord]) -> list[SourceRecord]:
    """Both lists; a source that goes on where the last one ended becomes part of it."""
    joined = list(first)
    for source in second:
        last = joined[-1] if joined else None
        if last is not None and source == last.model_copy(
            update={"first": last.first + last.samples, "samples": source.samples}
        ):
            joined[-1] = last.model_copy(update={"samples": last.samples + source.samples})
        else:
            joined.append(source)
    return joined


def _merged(name: str, one: ModuleRecord | None, two: ModuleRecord | None) -> ModuleRecord:
    if one is None or two is None:
        found = one or two
        assert found is not None
        return found
    if one.in_features != two.in_features:
        raise CalibrationError(
            f"statistics that are merged must be of one model, found {name} with "
            f"{one.in_features} and with {two.in_features} inputs; calibrate them apart"
        )
    both = one.magnitudes()
    both.add(two.magnitudes())
    return record_of(
        both,
        one.in_features,
        one.calls + two.calls,
        one.amax_history + two.amax_history,
        one.unmasked_calls + two.unmasked_calls,
    )


def _merged_kv(name: str, one: KVRecord | None, two: KVRecord | None) -> KVRecord:
    if one is None or two is None:
        found = one or two
        assert found is not None
        return found
    if len(one.key_amax) != len(two.key_amax) or len(one.value_amax) != len(two.value_amax):
        raise CalibrationError(
            f"statistics that are merged must be of one model, found {name} with "
            f"{len(one.key_amax)} and with {len(two.key_amax)} heads; calibrate them apart"
        )
    return KVRecord(
        key_amax=[max(pair) for pair in zip(one.key_amax, two.key_amax, strict=True)],
        value_amax=[max(pair) for pair in zip(one.value_amax, two.value_amax, strict=True)],
    )
