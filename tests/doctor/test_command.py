"""The commands: their arguments, their exit codes, and what they do without torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fp8dispatch import cli, policy, trust
from fp8dispatch.doctor import __main__ as doctor
from fp8dispatch.doctor import collect as collecting
from fp8dispatch.doctor.collect import collect
from fp8dispatch.overrides import set_backend, use_backend
from tests.doctor.conftest import H200

if TYPE_CHECKING:
    from pathlib import Path

    from tests.doctor.conftest import Plant

# Runs the doctor where some modules cannot be imported, and fails if others were.
_WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise {error}(name + " is not here")

sys.meta_path.insert(0, Blocker())
from fp8dispatch.doctor.__main__ import main
code = main({arguments!r})
loaded = [name for name in {unwanted!r} if name in sys.modules]
if loaded:
    print("loaded:", *loaded, file=sys.stderr)
    code = 70  # none of the doctor's own
sys.exit(code)
"""


def run(
    *arguments: str,
    blocked: tuple[str, ...] = (),
    error: str = "ModuleNotFoundError",
    unwanted: tuple[str, ...] = (),
    first_on_path: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    code = _WITHOUT.format(
        blocked=blocked, error=error, arguments=list(arguments), unwanted=unwanted
    )
    environment = dict(os.environ)
    if first_on_path is not None:
        environment["PYTHONPATH"] = os.pathsep.join((str(first_on_path), *sys.path[1:]))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )


@pytest.mark.parametrize("error", ["ModuleNotFoundError", "OSError", "AttributeError"])
def test_everything_else_is_said_where_torch_cannot_be_imported(error: str) -> None:
    result = run("--json", blocked=("torch", "triton"), error=error)

    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert result.returncode == report["exit_code"]
    assert report["exit_code"] in (1, 3)
    sentences = [finding["sentence"] for finding in report["findings"]]
    said = [one for one in sentences if one.startswith("backends, routes and verdicts need torch")]
    assert len(said) == 1
    assert f"{error}: torch is not here" in said[0]
    assert report["devices"][0]["decided"] is False
    assert report["libraries"]
    assert report["cache"]["path"]


def test_text_is_whole_where_torch_cannot_be_imported() -> None:
    result = run(blocked=("torch",))

    assert result.returncode in (1, 3), result.stderr
    assert "pip install sgl-deep-gemm" in result.stdout
    assert "need torch, and it cannot be imported" in " ".join(result.stdout.split())
    assert "Routes" not in result.stdout


def test_another_machine_needs_no_torch_here() -> None:
    result = run("--machine", "h100", blocked=("torch",))

    assert result.returncode == 0, result.stdout + result.stderr
    assert "Routes on h100" in result.stdout


def test_torch_that_is_here_and_does_not_import_is_found_by_probing(tmp_path: Path) -> None:
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')\n", "utf-8")
    (torch / "version.py").write_text("__version__ = '2.99.0+cu130'\ncuda = '13.0'\n", "utf-8")

    listed = json.loads(run("--json", first_on_path=tmp_path).stdout)
    probed = json.loads(run("--json", "--probe", first_on_path=tmp_path).stdout)

    for report in (listed, probed):
        assert {"name": "torch", "found": "2.99.0+cu130"}.items() <= report["libraries"][0].items()
    assert all(device["routes"] for device in listed["devices"] if device["decided"])
    assert not [one for one in listed["findings"] if "libcudart" in one["sentence"]]
    assert [device["decided"] for device in probed["devices"]] == [False] * len(probed["devices"])
    (sentence,) = [one["sentence"] for one in probed["findings"] if one["level"] == "degraded"]
    assert "(OSError: libcudart.so.13: cannot open)" in sentence


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--json"],
        ["--machine", "h100"],
        ["--shape", "16,4096,7168", "--recipe", "block"],
        ["--shape", "16,4096,7168", "--recipe", "row", "--experts", "8", "--batched"],
        ["--machine", "b200", "--json", "--shape", "16,4096,7168", "--recipe", "row"],
        ["--clear-cache"],
    ],
)
def test_neither_torch_nor_a_library_is_imported_without_probing(arguments: list[str]) -> None:
    """Importing torch alone takes longer than a report may."""
    libraries = ("triton", "torchao", "fbgemm_gpu", "mslk", "deep_gemm", "transformers")
    result = run(*arguments, unwanted=("torch", "numpy", *libraries))

    assert result.returncode in (0, 1, 3), result.stderr


def test_the_subcommand_imports_no_torch_either() -> None:
    code = (
        "import sys; from fp8dispatch.cli import main; main(['doctor']); "
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert result.returncode == 0, result.stderr


def test_no_gpu_library_starts_without_probing() -> None:
    code = (
        "import torch; from fp8dispatch.doctor.__main__ import main; main([]); "
        "assert not torch.cuda.is_initialized()"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "16,4096", "--recipe", "row"], "--shape must be M,N,K .* found '16,4096'"),
        (["--shape", "16,0,8", "--recipe", "row"], "N and K at least 1"),
        (["--shape", "-1,8,8", "--recipe", "row"], ""),
        (["--shape", "1,8,8"], "--shape alone: add --recipe"),
        (["--recipe", "row"], "--recipe alone: add --shape"),
        (["--shape", "1,8,8", "--recipe", "column"], "--recipe must be .* found 'column'"),
        (["--shape", "1,8,8", "--recipe", "block:128"], "block:BNxBK such as"),
        (["--shape", "1,8,8", "--recipe", "row:1x128"], "block:BNxBK such as"),
        (["--shape", "1,8,8", "--recipe", "block:0x128"], "block_size must be positive"),
        (["--experts", "8"], "--experts 8 is of --shape .*: add both"),
        (["--shape", "1,8,8", "--recipe", "row", "--batched"], "--batched .* add --experts E"),
        (["--shape", "1,8,8", "--recipe", "row", "--experts", "0"], "number of experts, found 0"),
        (["--shape", "1,8,8", "--experts", "2"], "--shape alone: add --recipe"),
        (["--machine", "h300"], "a machine must be one of a100, .* found 'h300'"),
        (["--machine", "h100", "--probe"], "a machine that is not here"),
        (["--machine", "h100", "--device", "0"], "a machine that is not here"),
        (["--device", "first"], "invalid int value"),
        (["--unknown"], "unrecognized arguments"),
    ],
)
def test_usage_is_refused_with_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = doctor.main(arguments)
    except SystemExit as exit_:  # argparse's way
        code = exit_.code

    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert re.search(sentence, captured.err)


@pytest.mark.parametrize(
    ("recipe", "meaning"),
    [
        ("tensor", "tensor"),
        ("row", "row"),
        ("block", "block 128x128"),
        ("block:1x128", "block 1x128"),
        ("block:64x32", "block 64x32"),
    ],
)
def test_one_call_by_its_shape(
    recipe: str, meaning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["doctor", "--machine", "h200", "--shape", "16,4096,7168", "--recipe", recipe])

    out = capsys.readouterr().out
    assert code == 0
    assert f"runs M=16 N=4096 K=7168, {meaning}, float8_e4m3fn weight" in " ".join(out.split())
    assert "Routes" not in out


def test_the_command_has_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err

    assert cli.main(["doctor", "--json", "--machine", "rtx-4090"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["device"] == "rtx-4090"


def test_interruption_has_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collecting, "collect", interrupted)

    assert doctor.main([]) == 5
    assert "interrupted" in capsys.readouterr().err


def test_cache_is_counted_and_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "verdicts"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.json").write_text("{}", "utf-8")

    before = collect(machine="h100").cache
    after = collect(machine="h100", clear_cache=True).cache

    assert (before.path, before.verdicts, before.cleared) == (str(folder), 3, None)
    assert (after.verdicts, after.cleared) == (0, 3)
    assert not list(folder.iterdir())


def test_cache_that_cannot_be_cleared_is_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    def clear() -> int:
        raise PermissionError("as planted")

    monkeypatch.setattr(trust, "clear_stored", clear)

    report = collect(machine="h100", clear_cache=True)

    assert report.exit_code == 1
    assert report.findings[0].sentence.endswith("cannot be read or deleted: as planted")


def test_every_place_that_states_backends_is_named(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200)
    monkeypatch.setenv("FP8DISPATCH_BACKEND", "cublaslt,triton")
    monkeypatch.setenv("FP8DISPATCH_ACCURACY", "fast")
    set_backend("-torchao")

    with use_backend("triton"):
        report = collect()

    stated = [(one.source, one.backends, one.accuracy, one.in_force) for one in report.overrides]
    assert stated == [
        ("argument backend=", None, None, False),
        ("use_backend", "triton", None, True),
        ("set_backend", "-torchao", None, False),
        ("environment", "cublaslt,triton", "fast", True),
    ]
    assert report.devices[0].routes[0].decided_by == "use_backend"


def test_batch_invariance_is_shown_where_it_is_stated(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(H200)
    monkeypatch.setenv(policy.INVARIANT_VARIABLE, "1")
    policy.reload_environment()
    try:
        report = collect()
    finally:
        monkeypatch.undo()
        policy.reload_environment()

    stated = {one.source: (one.batch_invariant, one.in_force) for one in report.overrides}
    assert stated["environment"] == (True, True)
    assert stated["set_backend"] == (None, False)
    assert {choice.backend for choice in report.devices[0].routes} == {"triton"}
