"""Every kind of our Gluon kernels on Hopper, by name: ``python -m bench hopper``.

Block scales (128x128), bf16 output. A kernel that hangs cannot be stopped from within, so each kind
first computes right numbers in a watched child of its own ("safety", side by side; meanwhile other
children let the libraries compile what the rest needs). What fails or hangs there is left out of
the rest:

* "gemm": M >= 128, every kind that fits beside DeepGEMM and cuBLASLt, a CUDA graph behind a flush;
* "decode": M <= 64, cold, as in the suite `decode`.

The suites `linear`, `gemm` and `decode` time what the library itself chooses among these kinds;
this one says whether it should choose otherwise. ``--parts safety`` stops after the first part.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.arms import Checked, Linear
from bench.gemm import admit
from bench.session import Point, Row, Session, make_session
from bench.shapes import DECODE, GRID
from bench.timing import alternate, copies_for, table
from fp8dispatch import registry
from fp8dispatch.backends.contract import Weight
from fp8dispatch.kernels.hopper_config import (
    HopperConfig,
    choose_config,
    decode_config,
    gemm_config,
)
from fp8dispatch.prepare import weight_scale_fp32
from fp8dispatch.recipe import BLOCK_128

GEMM_ROWS = (128, 256, 512, 1024, 4096)
DECODE_ROWS = (1, 16, 32, 64)
PEERS = ("deepgemm", "cublaslt")
SAFETY = (
    "wide", "square", "narrow", "split", "split3", "split4", "narrow_split", "narrow_split3",
    "narrow_split4", "decode", "decode_tall", "decode_split",
)  # fmt: skip
SAFETY_GEMM = ((256, 4096, 7168), (130, 264, 1040), (2100, 4096, 2048))
SAFETY_DECODE = ((16, 4096, 7168), (64, 4096, 7168), (5, 1000, 1040))
SAFETY_SECONDS = 110.0
HANG_SECONDS = SAFETY_SECONDS + 60
REPEATS = 50
UNFIT = "no shape for it"


def points(session: Session) -> Iterator[Point]:
    """Safety, then what is safe."""
    if session.rehearsal:
        yield "configurations", configurations
        return
    safe: list[str] = []
    yield "safety", partial(safety, safe, warm=session.parts != ("safety",))
    if session.takes("gemm"):
        for weight in GRID:
            for m in GEMM_ROWS:
                label = f"gemm {m}x{weight.n}x{weight.k}"
                yield label, partial(gemm, session, safe, m, weight.n, weight.k)
    if session.takes("decode"):
        for weight in DECODE:
            for m in DECODE_ROWS:
                label = f"decode {m}x{weight.n}x{weight.k}"
                yield label, partial(decode, session, safe, m, weight.n, weight.k)


def configurations() -> Row:
    """A rehearsal: the kinds that would be timed on a GPU of 132 multiprocessors."""
    return {
        "kinds": {
            f"{m}x{weight.n}x{weight.k}": {
                "kinds": sorted(kinds_for(m, weight.n, weight.k, 132)),
                "chosen": chosen_kind(m, weight.n, weight.k, 132),
            }
            for weight in GRID
            for m in (*GEMM_ROWS, *DECODE_ROWS)
        }
    }


def kinds_for(m: int, n: int, k: int, sms: int) -> dict[str, HopperConfig]:
    """Our kernels that fit a shape, by name, without the choice among them."""
    if m > 64:
        found = {
            "wide": gemm_config("wide", m, k),
            "square": gemm_config("square", m, k),
            "narrow": gemm_config("square", m, k, narrow=True),
        }
        for parts in (2, 3, 4):
            for name, narrow in (("split", False), ("narrow_split", True)):
                config = gemm_config("split", m, k, split=parts, narrow=narrow)
                if config.tiles(m, n) * parts <= sms and k >= 128 * parts:
                    found[name if parts == 2 else f"{name}{parts}"] = config
        return found
    base = decode_config(m, n, k, sms)
    found = {"decode": base}
    if base.block_n == 64 and m > 16:
        chunk = min(base.chunk, 2)
        stages = min(base.stages, 8) // chunk * chunk
        found["decode_tall"] = base._replace(block_n=128, chunk=chunk, stages=stages)
    if n < 8192:
        split = base.split * 2
        share = -(-(-(-k // 128) // split) // base.chunk) * base.chunk
        found["decode_split"] = base._replace(split=split, stages=min(base.stages, share))
    return found


def chosen_kind(m: int, n: int, k: int, sms: int) -> str:
    """The kind that the library takes, by the names of `kinds_for`."""
    choice = choose_config(m, n, k, False, sms)
    kinds = kinds_for(m, n, k, sms)
    return next((name for name, config in kinds.items() if config == choice), choice.kind)


def kind_arm(operands: Linear, config: HopperConfig, copy: int = 0) -> Callable[[], torch.Tensor]:
    """The multiplication alone by one configuration."""
    ours: Any = registry.load("gluon")
    problem = operands.explain("gluon").problem
    data, scale = operands.weights[copy]
    fp32 = weight_scale_fp32(scale, BLOCK_128, operands.n, operands.k)
    weight = Weight(data, fp32, BLOCK_128, scale)
    quantized = operands.quantized("gluon")
    return lambda: ours.multiply(quantized, weight, None, problem, config)


def safety(safe: list[str], *, warm: bool) -> Row:
    """Each kind in a child, and a child for each weight that compiles the rest; fills `safe`."""
    names = [*SAFETY, *(f"warm:{one.n}x{one.k}" for one in GRID if warm)]
    children = {
        name: subprocess.Popen(
            [sys.executable, "-m", "bench.hopper", name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    end = time.monotonic() + SAFETY_SECONDS
    told = {name: finish(child, end) for name, child in children.items()}
    safe += [name for name in SAFETY if told[name] == "right"]
    wrong = {name: said for name, said in told.items() if said not in ("right", UNFIT)}
    return {"part": "safety", "safe": list(safe), **({"wrong": wrong} if wrong else {})}


def finish(child: subprocess.Popen[str], end: float) -> str:
    """ "right", or how a child ended otherwise."""
    try:
        out, err = child.communicate(timeout=max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        _, err = child.communicate()
        return f"no end within its limit (a hang?): {err[-400:]}"
    if child.returncode != 0:
        return f"exit {child.returncode}: {err[-400:]}"
    return json.loads(out.splitlines()[-1])["told"] if out.strip() else "no answer"


def answer(name: str, device: str = "cuda") -> str:
    """In a child: "right", where a kind computes right numbers and repeats them bit for bit."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    if name.startswith("warm:"):
        n, k = (int(number) for number in name.removeprefix("warm:").split("x"))
        for m in (*GEMM_ROWS, *DECODE_ROWS):
            operands = Linear(m, n, k, BLOCK_128, device)
            admit(operands, PEERS)
            for config in kinds_for(m, n, k, sms).values():
                kind_arm(operands, config)()
            torch.cuda.synchronize()
        return "right"
    fitted = 0
    for m, n, k in SAFETY_DECODE if name.startswith("decode") else SAFETY_GEMM:
        config = kinds_for(m, n, k, sms).get(name)
        if config is None:
            continue
        fitted += 1
        operands = Linear(m, n, k, BLOCK_128, device)
        arm, checked = kind_arm(operands, config), Checked()
        if not checked.try_arm(name, arm, operands.check("gluon")):
            return str(checked.told())
        first = arm()
        for _ in range(REPEATS):
            if not torch.equal(arm(), first):
                return f"{m}x{n}x{k} does not repeat bit for bit"
    return "right" if fitted else UNFIT


def _operands(device: str, m: int, n: int, k: int, safe: list[str], copies: int = 1) -> Any:
    """Operands, the peers that are right, and our kinds that are safe and right."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    operands = Linear(m, n, k, BLOCK_128, device, copies=copies)
    checked = admit(operands, PEERS)
    kinds = {name: one for name, one in kinds_for(m, n, k, sms).items() if name in safe}
    for name, config in kinds.items():
        checked.try_arm(name, kind_arm(operands, config), operands.check("gluon"))
    shape = {"m": m, "n": n, "k": k, "ours": chosen_kind(m, n, k, sms)}
    return operands, checked, kinds, shape


def gemm(session: Session, safe: list[str], m: int, n: int, k: int) -> Row:
    """One shape with M >= 256."""
    with torch.inference_mode():
        _, checked, _, shape = _operands(session.device, m, n, k, safe)
        replays = checked.captured(
            {name: partial(session.timer.replay, arm) for name, arm in checked.arms.items()}
        )
        figures = alternate(
            {name: partial(session.timer.single, arm) for name, arm in replays.items()},
            session.rounds,
        )
    return {"part": "gemm", **shape, **table(figures), **checked.told()}


def decode(session: Session, safe: list[str], m: int, n: int, k: int) -> Row:
    """One shape with M <= 64, cold."""
    copies = 2 if session.rehearsal else copies_for(n * k)
    with torch.inference_mode():
        operands, checked, kinds, shape = _operands(session.device, m, n, k, safe, copies)
        makers = {}
        for name in checked.arms:
            make = functools.partial(operands.alone, name)
            if name in kinds:
                make = functools.partial(kind_arm, operands, kinds[name])
            calls = [make(copy) for copy in range(copies)]
            makers[name] = partial(session.timer.chain, calls)
        figures = alternate(checked.captured(makers), session.rounds)
    return {"part": "decode", **shape, **table(figures), **checked.told()}


if __name__ == "__main__":
    make_session("cuda")  # seeds as the suite does
    print(json.dumps({"told": answer(sys.argv[1])}))
