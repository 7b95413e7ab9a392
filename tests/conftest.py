"""What every test shares: the Triton interpreter on a CPU, poisoned memory, seeds, GPU shards."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import tempfile
import zlib
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# Triton decides at the moment a kernel is decorated whether it compiles or interprets it. Without
# a GPU only the interpreter can run our kernels, so the choice is made here, before any test module
# can import triton. Torch itself does not import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Verdicts of the tests' own backends must not reach the user's cache; workers inherit the folder.
os.environ.setdefault("FP8DISPATCH_CACHE_DIR", tempfile.mkdtemp(prefix="fp8dispatch-tests-"))

# Each worker of pytest-xdist would otherwise start as many threads as the machine has cores.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // _WORKERS))

# The GPU machine keeps its own packages, so hypothesis may be missing there.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    # "default" draws the same cases on every run, so that `make test` cannot fail by luck. A run
    # with new random cases is asked for: HYPOTHESIS_PROFILE=full or --hypothesis-profile=full.
    settings.register_profile("default", max_examples=40, deadline=None, derandomize=True)
    settings.register_profile(
        "full",
        max_examples=5000,
        deadline=None,
        derandomize=False,  # said aloud: under CI=true hypothesis itself would say otherwise
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--shard=i/n``."""
    parser.addoption(
        "--shard",
        metavar="I/N",
        default="1/1",
        help="run the I-th of N parts of the collected tests; a test stays in its part",
    )


def _parse_shard(text: str) -> tuple[int, int]:
    left, slash, right = text.partition("/")
    if slash and left.isdecimal() and right.isdecimal() and 1 <= int(left) <= int(right):
        return int(left), int(right)
    raise pytest.UsageError(f"--shard needs I/N with 1 <= I <= N, got {text!r}")


def _crc(item: pytest.Item) -> int:
    return zlib.crc32(item.nodeid.encode())


def pytest_itemcollected(item: pytest.Item) -> None:
    """Where there is a GPU, a test that takes the fixture `device` belongs to the GPU suite."""
    if "device" in getattr(item, "fixturenames", ()) and torch.cuda.is_available():
        item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this shard's tests: by the checksum of a test's name, so every machine agrees."""
    index, count = _parse_shard(config.getoption("--shard"))
    if count == 1:
        return
    dropped = [item for item in items if _crc(item) % count != index - 1]
    if dropped:
        items[:] = [item for item in items if _crc(item) % count == index - 1]
        config.hook.pytest_deselected(items=dropped)


@functools.cache
def _gpu_refusal() -> str | None:
    """Why tests marked `gpu` cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, torch finds none"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        return f"needs compute capability 8.9 or later, this device has {capability}"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu`, with the reason, where no device can run it."""
    if item.get_closest_marker("gpu") is not None and (reason := _gpu_refusal()) is not None:
        pytest.skip(reason)


@pytest.fixture
def device() -> str:
    """The device that a test of both kinds runs on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed the generators from the test's name: the same data alone, in a shard or on a worker."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """Each test finds its plans anew: one may have replaced what an earlier one rested on."""
    from fp8dispatch import generation  # not above: some tests watch the package being imported

    generation.renew()


@pytest.fixture(autouse=True)
def poison_empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill every fresh allocation with NaN (integers: their maximum), so unwritten output shows.

    Torch does this itself in deterministic mode, below Python, for every dtype (FP8 and E8M0
    included), every way to allocate and every device; warn-only mode keeps operators without a
    deterministic version usable. The marker `unpoisoned` leaves a test alone.
    """
    if request.node.get_closest_marker("unpoisoned") is not None:
        yield
        return
    fills = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.set_deterministic_debug_mode(mode)
