"""A checkpoint that Transformers can run: safetensors only, and no code of the checkpoint's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8dispatch import gguf
from fp8dispatch.errors import CalibrationError

_INSTALL = "pip install 'fp8dispatch[calibrate]'"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Attributes:
        name: of its folder.
        sha256: of its configuration and of the names and sizes of its weight files.
        model: in evaluation mode, its parameters without gradients.
        tokenizer: of Transformers.
        longest: the most tokens that the model takes.
        decoder_start: of an encoder with a decoder, the token that the decoder begins with; None
            of every other model.
    """

    name: str
    sha256: str
    model: nn.Module
    tokenizer: Any
    longest: int
    decoder_start: int | None = None


def fingerprint(directory: Path) -> str:
    """What tells one checkpoint from another without reading its weights.

    Raises:
        CalibrationError: the folder holds no safetensors, only pickles, or no configuration.
    """
    config = directory / "config.json"
    if not config.is_file():
        raise CalibrationError(
            f"a model folder must hold a config.json, found none in {directory}; name the folder "
            f"that Transformers' save_pretrained wrote"
        )
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
        ggufs = sorted(path.name for path in directory.glob(f"*{gguf.SUFFIX}"))
        remedy = "name the folder of the weights"
        if pickles:
            remedy = (
                "load it where you trust it and write it with save_pretrained("
                "safe_serialization=True)"
            )
        elif ggufs:
            remedy = gguf.remedy(ggufs[0])
        raise CalibrationError(
            f"weights must be safetensors, since a pickle can run code, found "
            f"{', '.join(pickles or ggufs) or 'no weights'} in {directory}; {remedy}"
        )
    digest = hashlib.sha256(config.read_bytes())
    for path in weights:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def load_checkpoint(directory: Path, dtype: str, device: torch.device) -> Checkpoint:
    """Load a model and its tokenizer from a folder; nothing is fetched.

    Args:
        directory: config.json, safetensors and tokenizer files.
        dtype: ``"auto"`` for the checkpoint's own, or a dtype's name.
        device: where to run it.

    Raises:
        CalibrationError: the folder holds no such model, Transformers is missing or cannot load
            it, or it is an encoder with a decoder that does not read text.
    """
    sha256 = fingerprint(directory)
    if find_spec("transformers") is None:
        raise CalibrationError(f"calibrating a checkpoint needs transformers: {_INSTALL}")
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # the command shows its own
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config: Any = transformers.AutoConfig.from_pretrained(directory, **safe)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, **safe)
        model = _model_class(transformers, config).from_pretrained(
            directory,
            config=config,
            use_safetensors=True,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            experts_implementation="eager",  # one expert after the other, so that each is seen
            **safe,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"Transformers must be able to load {directory} without running its code, found: "
            f"{reason}"
        ) from error
    text_config = config.get_text_config()
    longest = int(getattr(text_config, "max_position_embeddings", 0) or 0) or 1 << 20
    start = _decoder_start(directory, model, config)
    model = model.to(device).eval().requires_grad_(False)
    return Checkpoint(directory.resolve().name, sha256, model, tokenizer, longest, start)


def _decoder_start(directory: Path, model: Any, config: Any) -> int | None:
    """The decoder's first token, of an encoder with a decoder."""
    if not getattr(config, "is_encoder_decoder", False):
        return None
    reads = getattr(model, "main_input_name", "input_ids")
    owners = (config, getattr(model, "generation_config", None))
    found = (getattr(owner, "decoder_start_token_id", None) for owner in owners)
    start = next((token for token in found if isinstance(token, int)), None)
    if reads != "input_ids" or start is None:
        what = f"{reads}" if reads != "input_ids" else "no decoder_start_token_id"
        raise CalibrationError(
            f"an encoder with a decoder needs to read text and to say how its decoder begins, "
            f"found {what} in {directory}; run it yourself inside fp8dispatch.Calibrator"
        )
    return start


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the checkpoint names, so that layers are called as its tensors are."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel
