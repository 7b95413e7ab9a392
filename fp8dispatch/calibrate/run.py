"""Calibrating a checkpoint on a text: in batches, saved on the way, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8dispatch.calibrate.checkpoint import Checkpoint, fingerprint, load_checkpoint
from fp8dispatch.calibrate.methods import DEFAULT_PERCENTILE, Method
from fp8dispatch.calibrate.names import names_in_files, renamed
from fp8dispatch.calibrate.observe import Calibrator
from fp8dispatch.calibrate.output_error import OutputError, output_errors
from fp8dispatch.calibrate.stats import CalibrationStats, SourceRecord, merge_stats
from fp8dispatch.calibrate.text import Split, Text, read_text, tokenize
from fp8dispatch.errors import CalibrationError

_SAVE_EVERY = 16


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        model: folder of a checkpoint (see `load_checkpoint`).
        text: a .txt or .jsonl file (see `read_text`).
        output: where the statistics go.
        samples: how many samples of the text.
        sequence_length: tokens of a sample at most.
        batch_size: samples of a call; above 1 they are padded, and the padding is masked.
        split: one sample per line, or the whole text in pieces.
        method, percentile: what the statistics name as the way to make scales.
        dtype: of the model, ``"auto"`` for the checkpoint's own.
        device: as torch names it.
        exclude_first_tokens, kv_cache: as in `Calibrator`.
    """

    model: Path
    text: Path
    output: Path
    samples: int = 256
    sequence_length: int = 2048
    batch_size: int = 1
    split: Split = "lines"
    method: Method = "max"
    percentile: float = DEFAULT_PERCENTILE
    dtype: str = "auto"
    device: str = "cpu"
    exclude_first_tokens: int = 0
    kv_cache: bool = True

    def source(self, text: Text, model_sha256: str) -> SourceRecord:
        """What the statistics will say of their origin."""
        return SourceRecord(
            model=self.model.resolve().name,
            model_sha256=model_sha256,
            text=text.name,
            text_sha256=text.sha256,
            settings={
                "sequence_length": self.sequence_length,
                "batch_size": self.batch_size,
                "split": self.split,
                "dtype": self.dtype,
                "exclude_first_tokens": self.exclude_first_tokens,
                "kv_cache": self.kv_cache,
            },
        )


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        stats: also in the plan's output file.
        samples: how many were there to run, at most the plan's.
        output_errors: of the layers with outliers, by name and by way: static scales of the
            methods max and percentile, and one scale per token.
    """

    stats: CalibrationStats
    samples: int
    output_errors: dict[str, dict[str, OutputError]]


def run_plan(
    plan: Plan,
    *,
    restart: bool = False,
    on_progress: Callable[[int, int, int], None] = lambda samples, of, tokens: None,
) -> Result:
    """Calibrate, going on where an interrupted run of the same plan stopped.

    The statistics of a resumed run are those of an uninterrupted one. Layers are called as in the
    checkpoint's files.

    Args:
        plan: what to run.
        restart: start anew, whatever the output file holds.
        on_progress: called with samples done, samples in all and tokens done.

    Raises:
        CalibrationError: the model or the text cannot be used, or the output file holds
            statistics of something else.
    """
    text = read_text(plan.text)
    source = plan.source(text, fingerprint(plan.model))
    done = None if restart else _found(plan, source)
    checkpoint = load_checkpoint(plan.model, plan.dtype, torch.device(plan.device))
    ids = tokenize(
        text,
        checkpoint.tokenizer,
        split=plan.split,
        samples=plan.samples,
        length=min(plan.sequence_length, checkpoint.longest),
    )
    stats = _observe(plan, checkpoint, ids, source, done, on_progress)
    stats.save(plan.output)
    names = names_in_files(checkpoint.model)
    in_memory = renamed(stats, {there: here for here, there in names.items()})
    errors = output_errors(checkpoint.model, in_memory, lambda: _forward(checkpoint, ids[:1]))
    return Result(stats, len(ids), {names.get(name, name): ways for name, ways in errors.items()})


def _found(plan: Plan, source: SourceRecord) -> CalibrationStats | None:
    """The statistics that the output file holds, if they are of this plan and can go on."""
    if not plan.output.exists():
        return None
    found = CalibrationStats.load(plan.output)
    begun = found.sources[0] if len(found.sources) == 1 else None
    if begun is None or begun.model_copy(update={"samples": 0}) != source:
        raise CalibrationError(
            f"{plan.output} must hold statistics of the same model, text and settings to go on "
            f"with, found others; name another file, or start anew with --force"
        )
    if begun.samples > plan.samples:
        raise CalibrationError(
            f"{plan.output} must hold at most {plan.samples} samples to go on with, found "
            f"{begun.samples}; ask for more, or start anew with --force"
        )
    return found


def _observe(
    plan: Plan,
    checkpoint: Checkpoint,
    ids: list[list[int]],
    source: SourceRecord,
    done: CalibrationStats | None,
    on_progress: Callable[[int, int, int], None],
) -> CalibrationStats:
    first = 0 if done is None else done.samples
    calibrator = Calibrator(
        checkpoint.model,
        exclude_first_tokens=plan.exclude_first_tokens,
        kv_cache=plan.kv_cache,
        method=plan.method,
        percentile=plan.percentile,
    )

    def so_far(samples: int, complete: bool) -> CalibrationStats:
        part = source.model_copy(update={"first": first, "samples": samples - first})
        found = calibrator.stats(sources=[part], complete=complete)
        found = renamed(found, names_in_files(checkpoint.model, found.kv_cache))
        if done is None:
            return found
        named = {"complete": True, "method": plan.method, "percentile": plan.percentile}
        return merge_stats(done.model_copy(update=named), found)

    on_progress(first, len(ids), 0 if done is None else done.tokens)
    saved = at = first
    with calibrator:
        for batch in _batches(ids[first:], plan.batch_size):
            calibrator.count_samples(len(batch), sum(map(len, batch)))
            _forward(checkpoint, batch)
            at += len(batch)
            if at - saved >= _SAVE_EVERY and at < len(ids):
                stats = so_far(at, complete=False)
                stats.save(plan.output)
                saved = at
            on_progress(at, len(ids), (done.tokens if done else 0) + calibrator.tokens)
    return so_far(at, complete=True)


def _batches(ids: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _forward(checkpoint: Checkpoint, batch: list[list[int]]) -> None:
    """One call, padded on the right; padding never reaches the tokens before it.

    The decoder of an encoder with a decoder is given the same text, one token later, as in
    training: so both have the same tokens and the same padding.
    """
    device = next(checkpoint.model.parameters()).device
    longest = max(map(len, batch))
    if longest == 0:
        return  # samples of characters that the tokenizer drops
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
    inputs = {"input_ids": _padded(batch, longest), "attention_mask": mask}
    if checkpoint.decoder_start is not None:
        later = [[checkpoint.decoder_start, *row[:-1]] for row in batch]
        inputs["decoder_input_ids"] = _padded(later, longest)
        inputs["decoder_attention_mask"] = mask
    with torch.no_grad():
        checkpoint.model(**{name: tensor.to(device) for name, tensor in inputs.items()})


def _padded(rows: list[list[int]], length: int) -> torch.Tensor:
    return torch.tensor([(row + [0] * length)[:length] for row in rows])
