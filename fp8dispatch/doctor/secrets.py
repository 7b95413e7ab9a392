"""What of the environment may be shown, and that nothing else of it gets into a report.

Shown are the variables that fp8dispatch and its probes read. The doctor only displays them: what
they mean is decided in `fp8dispatch.policy`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fp8dispatch.doctor.report import Report, VariableRecord

HIDDEN = "<hidden>"

_PREFIX = "FP8DISPATCH_"
_SHOWN = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
_ISSUED = re.compile(
    r"(hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|ASIA|AIza|eyJ)[\w.-]{8,}"
)
_DEVICE_ID = re.compile(r"(MIG-)?(GPU|MIG)-[0-9a-f/-]+", re.IGNORECASE)
# Long, and of letters and digits. A folder may have a long name too, so that in a path only runs
# without any sign count.
_RANDOM = re.compile(r"(?=[^\d]*\d)(?=[^A-Za-z]*[A-Za-z])[\w+/=.-]{20,}")
_RANDOM_IN_PATH = re.compile(r"(?=[^\d]*\d)(?=[^A-Za-z]*[A-Za-z])[A-Za-z0-9+=]{24,}")
# A shorter value of a variable with a secret's name may be a word, which must stay readable.
_SHORTEST = 12


def shown_variables(environment: Mapping[str, str]) -> tuple[VariableRecord, ...]:
    """The variables that matter here, by name; secrets in their values hidden."""
    return tuple(
        VariableRecord(name=name, value=HIDDEN if _SECRET_NAME.search(name) else _masked(value))
        for name, value in sorted(environment.items())
        if name.startswith(_PREFIX) or name in _SHOWN
    )


def scrubbed(report: Report, environment: Mapping[str, str]) -> Report:
    """The report without any secret that the environment holds.

    Messages of other people's code are part of a report, and may quote anything.
    """
    secrets = sorted(_secrets(environment), key=len, reverse=True)
    if not secrets:
        return report
    return Report.model_validate(_replaced(report.model_dump(), secrets))


def _secrets(environment: Mapping[str, str]) -> set[str]:
    found: set[str] = set()
    for name, value in environment.items():
        if _SECRET_NAME.search(name):
            if len(value) >= _SHORTEST:
                found.add(value)
        elif name.startswith(_PREFIX) or name in _SHOWN:
            found.update(_tokens(value))
    return found


def _masked(value: str) -> str:
    for token in _tokens(value):
        value = value.replace(token, HIDDEN)
    return value


def _tokens(value: str) -> Iterator[str]:
    """The parts of a value that look like a token, a key or a password."""
    for part in re.split(r"[,;\s]+", value):
        pattern = _RANDOM_IN_PATH if part.startswith(("/", "~", ".")) or ":\\" in part else _RANDOM
        for found in (_ISSUED.search(part), pattern.search(part)):
            if found is not None and not _DEVICE_ID.fullmatch(part):
                yield found[0]


def _replaced(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return value
    if isinstance(value, dict):
        return {key: _replaced(item, secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_replaced(item, secrets) for item in value)
    return value
