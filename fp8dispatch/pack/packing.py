"""`pack_checkpoint`: carry a plan out, strip by strip, on several threads.

Torch's own threads are switched off meanwhile: the strips are small enough for one core's cache,
and the interpreter's lock is released in every operation that counts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fp8dispatch
from fp8dispatch.errors import CheckpointError, InvalidInputError
from fp8dispatch.pack.calibration import Calibration
from fp8dispatch.pack.checkpoint import CONFIG
from fp8dispatch.pack.figures import TensorFigures
from fp8dispatch.pack.jsonfiles import read_object, to_bytes
from fp8dispatch.pack.layouts import codec
from fp8dispatch.pack.options import PackOptions
from fp8dispatch.pack.output import OutputFolder, check_apart, source_fingerprint
from fp8dispatch.pack.plan import plan_checkpoint
from fp8dispatch.pack.planned import MASTER, Plan, Weight
from fp8dispatch.pack.quantizing import finish, quantize_weights
from fp8dispatch.pack.rawio import disk_errors, write_whole
from fp8dispatch.pack.report import REPORT, Report
from fp8dispatch.pack.report_files import report_files
from fp8dispatch.pack.summary import PackSummary, PlanSummary

MOST_WORKERS = 8
"""Threads that are taken unless more are asked for; a disk keeps up with fewer."""

OnStep = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Packed:
    """What `pack_checkpoint` did.

    Attributes:
        out: the folder.
        plan: what was carried out.
        resumed: whether a job that was killed was taken up.
        report: how much each weight lost; None where no report was asked for.
        report_files: the files that hold it.
        notes: what a user should know afterwards, one sentence each.
    """

    out: Path
    plan: Plan
    resumed: bool
    report: Report | None
    report_files: tuple[Path, ...]
    notes: tuple[str, ...]

    def summary(self) -> PackSummary:
        """The same as plain data, for ``--json``."""
        return PackSummary(
            out=str(self.out),
            resumed=self.resumed,
            plan=PlanSummary.of(self.plan),
            totals=None if self.report is None else self.report.totals,
            report_files=[str(path) for path in self.report_files],
            notes=list(self.notes),
        )


def pack_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PackOptions | None = None,
    *,
    calibration: Calibration | None = None,
    workers: int | None = None,
    report: bool | str | os.PathLike[str] = True,
    resume: bool = True,
    force: bool = False,
    progress: OnStep | None = None,
) -> Packed:
    """Quantise a checkpoint to FP8 on the CPU.

    Memory stays bounded by some strips of rows for each worker (a fused expert that lies
    transposed is read whole). The files are those of the source under the same names, and what
    belongs to the model is copied. A job that was killed goes on when it is repeated, and gives
    the same bytes.

    Args:
        source: a ``.safetensors`` file, a model folder, or a folder of the hub's cache.
        out: the folder to write; outside the source, new or empty.
        options: what to do; None packs channel scales in the compressed-tensors format.
        calibration: scales, in place of the file that the options name.
        workers: threads; None takes one for each core, at most `MOST_WORKERS`.
        report: measure what each weight lost, into ``fp8_report.json``, ``.md`` and ``.png`` in
            `out`, or into files beside the path given here; False saves the time.
        resume: take up a job that was killed.
        force: replace what is in `out`.
        progress: called with (done, of, file) after each unit of work.

    Raises:
        CheckpointError: a plan with problems, a source that changes meanwhile, or a folder that
            cannot be written.
        InvalidInputError: options that no choice takes.
        NumericalOverflowError: a weight that holds NaN or infinity; its file is not written.
    """
    planned = plan_checkpoint(source, options, calibration=calibration)
    return carry_out(
        planned,
        out,
        workers=workers,
        report=report,
        resume=resume,
        force=force,
        progress=progress,
    )


def carry_out(
    planned: Plan,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    report: bool | str | os.PathLike[str] = True,
    resume: bool = True,
    force: bool = False,
    progress: OnStep | None = None,
) -> Packed:
    """Do what a plan says; the arguments and errors are those of `pack_checkpoint`."""
    if workers is not None and workers < 1:
        raise InvalidInputError(f"workers must be at least 1, found {workers}")
    planned.refuse_problems()
    target = Path(out)
    measured = report is not False
    where = target / REPORT if isinstance(report, bool) else Path(report)
    if where.parent != target:
        check_apart(where.parent, planned.checkpoint)
    with OutputFolder(
        target,
        planned.checkpoint,
        planned.shards,
        _fingerprint(planned, measured),
        resume=resume,
        force=force,
    ) as output:
        with _threads(workers or default_workers()) as pool:
            _write_shards(planned, output, pool, measured, progress)
        found = _report(planned, output) if measured else None
        files, notes = report_files(found, where) if found is not None else ({}, [])
        inside = where.parent == target
        extra = {name: to_bytes(content) for name, content in _extra_files(planned).items()}
        if inside:
            extra |= files
        else:
            _write_beside(where.parent, files)
        output.finish(_config(planned), extra)
        return Packed(
            target,
            planned,
            output.resumed,
            found,
            tuple(where.parent / name for name in files),
            tuple(notes),
        )


def default_workers() -> int:
    """One thread for each core that this process may use, at most `MOST_WORKERS`."""
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed is not None else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


@contextmanager
def _threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Worker threads, each of which computes on its own; torch's number of threads comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, "fp8dispatch-pack", lambda: torch.set_num_threads(1))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _write_shards(
    planned: Plan,
    output: OutputFolder,
    pool: ThreadPoolExecutor,
    measured: bool,
    progress: OnStep | None,
) -> None:
    by_file: dict[str, list[Weight]] = {}
    for weight in planned.weights.values():
        by_file.setdefault(weight.origin.file, []).append(weight)
    pending = output.pending()
    for number, shard in enumerate(pending):

        def step(done: int, of: int, place: tuple[int, str] = (number, shard.file)) -> None:
            if progress is not None:
                progress(place[0] * 1000 + done * 1000 // of, len(pending) * 1000, place[1])

        note: dict[str, Any] = {"tensors": []}
        with output.shard(shard, note) as writer:
            if shard.file.startswith(f"{MASTER}/"):
                copies = [planned.checkpoint.tensor(spec.name) for spec in shard.specs]
                finish([pool.submit(writer.copy, tensor) for tensor in copies], step)
                continue
            kept = [one.tensor for one in planned.kept if one.tensor.file == shard.file]
            copied: list[Future[Any]] = [pool.submit(writer.copy, tensor) for tensor in kept]
            for scale in () if planned.kv is None else planned.kv.tensors:
                if scale.file == shard.file:
                    values = torch.tensor(scale.values, dtype=torch.float32)
                    writer.write(scale.stored.name, codec.encode(scale.stored, values))
            weights = by_file.get(shard.file, [])
            scales = planned.resolved.asked.scales
            figures = quantize_weights(weights, writer, pool, scales, measured, copied, step)
            note["tensors"] = [one.model_dump(mode="json") for one in figures]


def _fingerprint(planned: Plan, measured: bool) -> str:
    """A digest of all that the bytes of the result depend on."""
    digest = hashlib.sha256(source_fingerprint(planned.checkpoint).encode())
    resolved = planned.resolved
    seen: list[object] = [fp8dispatch.__version__, resolved.layout.name, measured]
    seen += [
        resolved.asked.scales,
        resolved.asked.keep_master,
        sorted(kept.tensor.name for kept in planned.kept),
    ]
    seen.append(None if planned.kv is None else planned.kv.tensors)
    for name, weight in planned.weights.items():
        module = weight.module
        seen.append((name, module.scheme, module.amax_history, weight.activation_scale))
    digest.update(repr(seen).encode())
    return digest.hexdigest()


def _report(planned: Plan, output: OutputFolder) -> Report:
    """The report of all files, those that an earlier run finished among them."""
    tensors = []
    for shard in planned.shards:
        path = output.note_path(shard)
        for content in read_object(path).get("tensors", []):
            tensors.append(TensorFigures.model_validate(content))
    ratios = {} if planned.calibration is None else planned.calibration.saturation
    return Report.of(planned, tensors, ratios)


def _config(planned: Plan) -> dict[str, Any]:
    config = planned.checkpoint.config
    if config is None:
        raise CheckpointError(
            f"{planned.checkpoint.folder}: a model needs {CONFIG} beside its weights, found none; "
            f"put the model's configuration there"
        )
    return {**config, "quantization_config": planned.resolved.layout.config(planned.contents)}


def _extra_files(planned: Plan) -> Mapping[str, Mapping[str, Any]]:
    return planned.resolved.layout.extra_files(planned.contents)


def _write_beside(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        temporary = folder / f"{name}.partial"
        with disk_errors(folder, "writable", "name another folder for the report"):
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(temporary, folder / name, content)
