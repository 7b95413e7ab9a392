"""GGUF files are not read here; what to tell a user who has one."""

from __future__ import annotations

SUFFIX = ".gguf"

_REMEDY = (
    "restore it with transformers' AutoModelForCausalLM.from_pretrained(FOLDER, "
    "gguf_file='{file}'), load its state_dict() into a model made from its config without "
    "quantization_config, and take what that model's save_pretrained writes"
)


def remedy(file: str) -> str:
    """How the model in a GGUF file becomes safetensors, as the end of a sentence."""
    return _REMEDY.format(file=file)
