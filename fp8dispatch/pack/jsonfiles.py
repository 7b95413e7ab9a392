"""JSON from strangers: bounded, without duplicate keys, and checked by a pydantic model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fp8dispatch.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
"""Longest JSON file that is read; the index of the largest published models has 10 MB."""

Model = TypeVar("Model", bound=BaseModel)


def read_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: a file that is missing, longer than `limit` bytes, or no JSON object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path}: the file must be readable, found: {error.strerror or error}; check the path "
            f"and its permissions"
        ) from error
    if len(text) > limit:
        raise CheckpointError(
            f"{path}: a JSON file of a checkpoint must be at most {limit} bytes long, found more; "
            f"it is no such file, or a damaged one"
        )
    return parse_object(text, str(path))


def read_model(path: Path, model: type[Model], limit: int = MAX_JSON_BYTES) -> Model:
    """A JSON file as a pydantic model.

    Raises:
        CheckpointError: as `read_object`, or content that the model does not take.
    """
    return check_model(read_object(path, limit), model, str(path))


def check_model(content: dict[str, Any], model: type[Model], where: str) -> Model:
    """Parsed JSON as a pydantic model; the first thing that does not fit is named.

    Raises:
        CheckpointError: content that the model does not take.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CheckpointError(
            f"{where}: {place[:200]} must fit {model.__name__}, found: {first['msg']}; correct the "
            f"file"
        ) from error


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """JSON text as a dict, strict: UTF-8, one object, no key twice, no NaN or infinity.

    Raises:
        CheckpointError: anything else.
    """
    try:
        parsed = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(
            f"{where}: the JSON must be well formed, found: {reason[:200]}; the file is damaged, "
            f"fetch it again"
        ) from error
    if not isinstance(parsed, dict):
        raise CheckpointError(
            f"{where}: the JSON must be an object, found {type(parsed).__name__}; the file is "
            f"damaged, fetch it again"
        )
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} twice")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"the constant {name}, which is no JSON")


def to_bytes(content: object) -> bytes:
    """An object as the JSON text that we write: indented, keys as given, one newline at the end."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
