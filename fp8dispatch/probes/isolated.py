"""The canary in a child process, for native code that may abort, hang or lose the CUDA context.

The child is a fresh interpreter, never a fork. It first runs the canary of plain torch: where that
fails, memory is short, the device is in exclusive mode or not there, and nothing is said about the
backend. Only then it runs the backend, under a time limit and a limit on what it may print. The
verdict comes back as a line of JSON with a number that only parent and child know, so that nothing
a library prints can be taken for it.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal

from fp8dispatch import failures
from fp8dispatch.recipe import Granularity, Recipe

if TYPE_CHECKING:
    import torch

    from fp8dispatch.backends.contract import Capability

Outcome = Literal["right", "wrong", "crashed", "hung", "flooded", "untested"]

START_LIMIT_S = 120.0
"""For starting Python, importing torch and the canary of plain torch; beyond it: untested."""

OUTPUT_LIMIT = 1 << 20
"""Bytes on stdout and stderr together; a stub that prints in every thread passes it at once."""

BUSY_SHARE = 0.5
"""Of the time limit: where plain torch needs more for its canary, a late answer says nothing."""

_POLL_S = 0.05
_DRAIN_S = 1.0  # for what a dead child left in the pipes
# The child's first act, in one line: find modules exactly where the parent finds them.
_START = (
    "import json, sys; request = json.loads(sys.stdin.readline()); sys.path[:] = request['path']; "
    "from fp8dispatch.probes.isolated import run_child; run_child(request)"
)

# What the child's libraries need to be found and to run as they do here. Names that look like
# secrets stay out whatever they begin with, and so does our own configuration.
_KEPT = """
    PATH HOME USER LOGNAME LANG TMPDIR TEMP TMP SYSTEMROOT WINDIR USERPROFILE APPDATA LOCALAPPDATA
    PROGRAMDATA CC CXX VIRTUAL_ENV
"""
_KEPT_PREFIXES = """
    LC_ LD_ DYLD_ PYTHON CONDA_ XDG_ CUDA CUBLAS CUDNN NVIDIA_ HIP_ ROCM ROCR_ HSA_ TORCH PYTORCH_
    TRITON_ OMP_ MKL_ KMP_ GOMP_ FBGEMM_ MSLK_ DG_ CUTLASS CUTE_
"""
_SECRET = ("TOKEN", "SECRET", "PASSW", "CREDENTIAL", "API_KEY", "APIKEY", "PRIVATE", "AUTH")

# Signals that come from outside: the kernel's out-of-memory killer, a scheduler, a user.
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGALRM", "SIGXCPU")


@dataclass(frozen=True)
class IsolatedResult:
    """What became of a canary in a child process.

    Attributes:
        outcome: ``untested`` where the child could not be started, or memory, the device or time
            under load were short: that says nothing about the backend and must not be stored.
        reason: a sentence.
    """

    outcome: Outcome
    reason: str


def run_isolated(
    backend_name: str, device: str, recipe: Recipe, timeout_s: float
) -> IsolatedResult:
    """Run the canary of a backend in a child process.

    Args:
        backend_name: a registered name, or ``"module:attribute"`` for a Backend that is not.
        device: as torch names it in this process, ``"cuda:0"`` say.
        recipe: the recipe to vouch for.
        timeout_s: seconds that the backend may take, from the moment the child is ready.
    """
    if not sys.executable:
        return IsolatedResult("untested", "this process has no Python interpreter to start")
    nonce = secrets.token_hex(16)
    request = {
        "nonce": nonce,
        "path": sys.path,
        "backend": backend_name,
        "device": device,
        "uuid": _uuid(device),
        "granularity": recipe.granularity.value,
        "block_size": recipe.block_size,
        "limit_s": START_LIMIT_S + timeout_s + 10,
    }
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=_environment(os.environ),
            start_new_session=True,
        )
    except OSError as error:
        return IsolatedResult("untested", f"no child process could be started: {error}")
    try:
        output = _Output(process, nonce)
        _send(process, request)
        return _watch(process, output, timeout_s)
    finally:
        _kill(process)


class _Output:
    """What a child says, read by threads so that no full pipe can stop it."""

    def __init__(self, process: subprocess.Popen[bytes], nonce: str) -> None:
        self._nonce = nonce
        self._size = 0
        self._stderr = bytearray()
        self._lock = threading.Lock()
        self.news = threading.Event()
        self.ready_s: float | None = None
        self.verdict: IsolatedResult | None = None
        self._readers = [
            threading.Thread(target=self._read, args=arguments, daemon=True)
            for arguments in ((process.stdout, self._hear), (process.stderr, self._note))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def flooded(self) -> bool:
        return self._size > OUTPUT_LIMIT

    def drain(self) -> None:
        for reader in self._readers:
            reader.join(_DRAIN_S)

    def last_words(self) -> str:
        """The last line on stderr, in brackets; empty where there is none."""
        lines = self._stderr.decode(errors="replace").strip().splitlines()
        return f" ({lines[-1].strip()[:200]})" if lines else ""

    def _read(self, pipe: IO[bytes], take: Callable[[bytes], None]) -> None:
        with pipe:
            for piece in iter(lambda: pipe.read(1 << 16), b""):
                with self._lock:
                    self._size += len(piece)
                if self.flooded:
                    self.news.set()
                    return
                take(piece)

    def _note(self, piece: bytes) -> None:
        self._stderr += piece
        del self._stderr[:-4096]

    _rest = b""

    def _hear(self, piece: bytes) -> None:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            message = _message(line, self._nonce)
            if message is None:
                continue
            if message["stage"] == "ready":
                self.ready_s = float(message["seconds"])
            else:
                self.verdict = IsolatedResult(message["stage"], str(message["reason"]))
            self.news.set()


def _message(line: bytes, nonce: str) -> dict[str, Any] | None:
    """A line of the child's own; anything else is chatter."""
    if nonce.encode() not in line:
        return None
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and message.get("nonce") == nonce else None


def _watch(process: subprocess.Popen[bytes], output: _Output, timeout_s: float) -> IsolatedResult:
    deadline = time.monotonic() + START_LIMIT_S
    ready = False
    while True:
        exited = process.poll() is not None
        if exited:
            _kill(process)  # whatever it started itself may hold the pipes open
            output.drain()
        if output.flooded:
            return IsolatedResult("flooded", f"it printed more than {OUTPUT_LIMIT} bytes")
        if output.verdict is not None:
            return output.verdict
        if exited:
            return _epitaph(process.returncode, output)
        if output.ready_s is not None and not ready:
            ready = True
            deadline = time.monotonic() + timeout_s
        if time.monotonic() > deadline:
            return _late(output, timeout_s)
        output.news.wait(_POLL_S)
        output.news.clear()


def _epitaph(code: int, output: _Output) -> IsolatedResult:
    """What a child died of without a verdict."""
    name = f"exit status {code}"
    if code < 0:
        with suppress(ValueError):
            name = signal.Signals(-code).name
    if output.ready_s is None:
        return IsolatedResult(
            "untested", f"the child ended with {name} before it was ready{output.last_words()}"
        )
    if name in _FROM_OUTSIDE:
        return IsolatedResult("untested", f"the child was ended from outside with {name}")
    return IsolatedResult("crashed", f"it ended its process with {name}{output.last_words()}")


def _late(output: _Output, timeout_s: float) -> IsolatedResult:
    """A time limit is the backend's fault only where plain torch was quick."""
    if output.ready_s is None:
        return IsolatedResult(
            "untested", f"the child was not ready after {START_LIMIT_S:g} s: is the machine busy?"
        )
    if output.ready_s > timeout_s * BUSY_SHARE:
        return IsolatedResult(
            "untested",
            f"no result after {timeout_s:g} s, but plain torch took {output.ready_s:.1f} s as "
            f"well: is the machine busy?",
        )
    return IsolatedResult("hung", f"no result after {timeout_s:g} s")


def _send(process: subprocess.Popen[bytes], request: Mapping[str, object]) -> None:
    if process.stdin is not None:
        with suppress(BrokenPipeError), process.stdin as pipe:  # how it died is seen soon enough
            pipe.write(json.dumps(request).encode() + b"\n")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the child and all that it started."""
    if sys.platform == "win32":
        process.kill()
    else:
        # PermissionError is what macOS says of a group that is only zombies.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # stuck in the driver: it cannot be waited for
        process.wait(5)


def _environment(parent: Mapping[str, str]) -> dict[str, str]:
    """The part of the environment that the child needs: passed on, not read."""
    names, prefixes = frozenset(_KEPT.split()), tuple(_KEPT_PREFIXES.split())
    kept = {
        name: value
        for name, value in parent.items()
        if (name.upper() in names or name.upper().startswith(prefixes))
        and not any(word in name.upper() for word in _SECRET)
    }
    # One thread is enough for the truth, and many wait for each other where cores are busy. The
    # current directory is not a place to import from, unless it is on the parent's path.
    ours = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    return {**kept, **ours}


def _uuid(device: str) -> str | None:
    """The identity of a CUDA device that is in use here; indices may differ in the child."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda") or not torch.cuda.is_initialized():
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def run_child(request: dict[str, Any]) -> None:
    """What the child does; it ends the process."""
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)

    def say(stage: str, **more: object) -> None:
        # On a line of its own, whatever was printed before.
        line = json.dumps({"nonce": request["nonce"], "stage": stage, **more})
        os.write(answer, b"\n" + line.encode() + b"\n")

    _limit(request["limit_s"])
    outcome, reason = _probe(request, say)
    say(outcome, reason=reason)
    os._exit(0)  # a library's clean-up is not part of the question


def _limit(limit_s: float) -> None:
    """No core files, and an end of its own should the parent be killed."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
        signal.alarm(int(limit_s))


def _probe(request: dict[str, Any], say: Callable[..., None]) -> tuple[Outcome, str]:
    recipe = Recipe(Granularity(request["granularity"]), request["block_size"])
    try:
        from fp8dispatch.backends.eager import BACKEND as plain
        from fp8dispatch.probes.numerics import run_canary

        device = _device(request)
        run_canary(plain, device, recipe)  # starts the device and loads its libraries
        start = time.perf_counter()
        control = run_canary(plain, device, recipe)
        if not control.right:
            return "untested", f"plain torch is not right on {device}: {control.reason}"
    except Exception as error:  # noqa: BLE001  # whatever it is, the backend had no part in it
        told = failures.describe_error(error)
        return "untested", f"plain torch does not run in the child, {told}"
    say("ready", seconds=time.perf_counter() - start)
    try:
        result = run_canary(_backend(request["backend"]), device, recipe)
    except Exception as error:  # noqa: BLE001  # a library may raise anything: that is the finding
        if failures.is_sticky_cuda_error(error):
            return "crashed", failures.verdict_of_error(error)[1]
        return failures.verdict_of_error(error)
    if not result.applicable:
        return "untested", result.reason
    return ("right" if result.right else "wrong"), result.reason


def _device(request: dict[str, Any]) -> torch.device:
    """The parent's device, by its identity where that is known."""
    import torch

    device = torch.device(request["device"])
    if request["uuid"] is None:
        return device
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == request["uuid"]:
            return torch.device("cuda", index)
    raise RuntimeError(f"{device} of the parent is not visible")


def _backend(name: str) -> Capability:
    from fp8dispatch.backends.contract import Capability

    module, colon, attribute = name.partition(":")
    if colon:
        found = getattr(importlib.import_module(module), attribute)
    else:
        from fp8dispatch import registry

        found = registry.find(name)
    if not isinstance(found, Capability):
        raise TypeError(f"{name} is of type {type(found).__name__}, not a Backend")
    return found
