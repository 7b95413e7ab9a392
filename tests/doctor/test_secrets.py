"""No secret of the environment reaches a report, however it comes there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fp8dispatch.doctor import secrets
from fp8dispatch.doctor.__main__ import main
from fp8dispatch.doctor.collect import collect
from tests.doctor.conftest import H200

if TYPE_CHECKING:
    from tests.doctor.conftest import Plant

SECRETS = {
    "HF_TOKEN": "hf_QkXwYzAbCdEfGhIjKlMnOpQrStUv",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "OPENAI_API_KEY": "sk-proj-0123456789abcdef",
    "DB_PASSWORD": "correct horse battery",
    "PLAIN_VARIABLE": "nobody asked for this one",
}


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_no_secret_is_printed(
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    # A message of somebody else's code may quote what it likes.
    plant(H200, problem=f"NVML says {SECRETS['AWS_SECRET_ACCESS_KEY']}")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FP8DISPATCH_BACKEND", SECRETS["HF_TOKEN"])
    monkeypatch.setenv("FP8DISPATCH_API_KEY", "short")

    main(arguments)

    captured = capsys.readouterr()
    for name, value in SECRETS.items():
        assert value not in captured.out + captured.err
        assert name not in captured.out
    assert "short" not in captured.out
    assert secrets.HIDDEN in captured.out


@pytest.mark.parametrize(
    "value",
    [
        "hf_abcdefgh12345678",
        "triton,ghp_0123456789abcdef",
        "AKIAIOSFODNN7EXAMPLE",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "/home/me/3f786850e387550fdab836ed7e6dc881de23001b/cache",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
    ],
)
def test_value_that_looks_like_a_token_is_hidden(value: str) -> None:
    (shown,) = secrets.shown_variables({"FP8DISPATCH_BACKEND": value})

    assert secrets.HIDDEN in shown.value


@pytest.mark.parametrize(
    "value",
    [
        "triton,eager",
        "-cublaslt,-deepgemm,-fbgemm",
        "0,1,2,3,4,5,6,7,10,11,12,13,14,15",
        "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
        "MIG-8932f937-d72c-4106-c12f-20bd9faed9f6",
        "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/0",
        "/scratch/users/somebody-with-a-long-name2/fp8dispatch_cache",
        "/tmp/pytest-of-root/pytest-12/test_that_has_a_long_name0/cache",
    ],
)
def test_value_that_is_none_is_shown(value: str) -> None:
    (shown,) = secrets.shown_variables({"CUDA_VISIBLE_DEVICES": value})

    assert shown.value == value


def test_only_the_variables_that_matter_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8DISPATCH_ACCURACY", "fast")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    shown = {one.name: one.value for one in collect(machine="h100").environment}

    assert shown.pop("FP8DISPATCH_CACHE_DIR")
    assert shown == {
        "FP8DISPATCH_ACCURACY": "fast",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "0",
    }
