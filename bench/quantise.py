"""Quantising activations: ``python -m bench quantise``.

* "plain": bf16 rows into FP8 with a scale per token and 128 columns (both layouts of scales) or per
  token, beside "copy", which moves the same number of bytes: 2 read and 1 written for each element,
  and the scales.
* "rms_norm", "silu_mul": the fused forms beside the two steps apart, in plain torch and compiled by
  torch.compile. What counts is the faster of the two.

Everything cold: CUDA graphs of launches that walk over copies of the input, together larger than
L2. Results are checked against float64 first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import fp8dispatch
from bench.arms import Checked
from bench.session import Point, Row, Session
from bench.timing import alternate, copies_for, table
from fp8dispatch.quantization.activation import QuantizedActivation, quantize_activation

ROWS, COLUMNS = (256, 1024, 4096, 8192), (2048, 7168, 8192, 16384)
FUSED_COLUMNS = (2048, 4096, 7168, 14336)
EPS = 1e-6
_FP8 = torch.float8_e4m3fn
_HALF_STEP = 2.0**-4  # e4m3fn: three bits of mantissa
_SMALLEST = 2.0**-9  # its smallest step, near zero, in units of the scale
Tensors = tuple[torch.Tensor, ...]


def points(session: Session) -> Iterator[Point]:
    """Plain, then fused."""
    rows = (3, 40) if session.rehearsal else ROWS
    for part, columns, measured in (
        ("plain", COLUMNS, plain),
        ("rms_norm", FUSED_COLUMNS, rms_norm),
        ("silu_mul", FUSED_COLUMNS, silu_mul),
    ):
        if session.takes(part):
            for k in (256,) if session.rehearsal else columns:
                for m in rows:
                    yield f"{part} {m}x{k}", partial(measured, session, m, k)


def plain(session: Session, m: int, k: int) -> Row:
    """The quantisers of [m, k] bf16 against a copy of as many bytes."""
    inputs = _inputs(session, m, k, 1)
    moved = m * k * 3 + m * -(-k // 128) * 4
    copied = [
        (torch.randint(0, 255, (moved // 2,), dtype=torch.uint8, device=session.device),)
        for _ in inputs
    ]
    quantisers: dict[str, Callable[[torch.Tensor], QuantizedActivation]] = {
        "group 128": lambda x: quantize_activation(x, 128, _FP8),
        "group 128, rows padded to 4": lambda x: quantize_activation(x, 128, _FP8, pad_rows_to=4),
        "token": lambda x: quantize_activation(x, k, _FP8),
    }
    checked = Checked()
    for name, quantise in quantisers.items():
        group = k if name == "token" else 128
        check = partial(_check, inputs[0][0].double(), group, 0.0)
        checked.try_arm(name, partial(quantise, inputs[0][0]), check)  # type: ignore[arg-type]
    walks = {name: _chain(session, quantisers[name], inputs) for name in checked.arms}
    walks["copy"] = _chain(session, torch.clone, copied)
    return _row(session, "plain", m, k, walks, checked) | {"bytes_moved": moved}


def rms_norm(session: Session, m: int, k: int) -> Row:
    """RMSNorm and quantisation in one kernel, against the two."""
    gain = torch.rand(k, device=session.device, dtype=torch.bfloat16) + 0.5

    def fused(x: torch.Tensor, gain: torch.Tensor) -> QuantizedActivation:
        return fp8dispatch.rms_norm_quantize(x, gain, EPS, group_size=128)

    def truth(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        wide = x.double()
        return wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain.double()

    inputs = [(x, gain) for (x,) in _inputs(session, m, k, 1)]
    return _fused(session, "rms_norm", m, k, inputs, (fused, norm, truth))


def silu_mul(session: Session, m: int, k: int) -> Row:
    """SiLU-gating and quantisation in one kernel, against the steps apart."""

    def fused(gate: torch.Tensor, up: torch.Tensor) -> QuantizedActivation:
        return fp8dispatch.silu_mul_quantize(gate, up, group_size=128)

    def truth(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate.double()) * up.double()

    inputs = _inputs(session, m, k, 2)
    return _fused(session, "silu_mul", m, k, inputs, (fused, gate_and_up, truth))


def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """RMSNorm as a step of its own."""
    return F.rms_norm(x, x.shape[-1:], gain, EPS)


def gate_and_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU-gating as a step of its own."""
    return F.silu(gate) * up


@functools.cache
def _compiled(step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A step as torch.compile makes it, once for all sizes."""
    return torch.compile(step, dynamic=True)


def _fused(
    session: Session,
    part: str,
    m: int,
    k: int,
    inputs: Sequence[Tensors],
    functions: tuple[Any, Any, Any],
) -> Row:
    fused, apart, truth = functions
    expected = truth(*inputs[0])

    def quantised(first: Callable[..., torch.Tensor]) -> Callable[..., QuantizedActivation]:
        return lambda *tensors: quantize_activation(first(*tensors), 128, _FP8)

    # Each step apart rounds to bf16: at most 2^-8 of the value for the norm, and for the product.
    candidates = {"fused": (fused, 2.0**-8), "apart": (quantised(apart), 2.0**-6)}
    if not session.rehearsal:  # on a CPU it would take a C++ compiler, for no figure
        candidates["apart, compiled"] = (quantised(_compiled(apart)), 2.0**-6)
    checked = Checked()
    with torch.inference_mode():
        for name, (function, slack) in candidates.items():
            check = partial(_check, expected, 128, slack)
            checked.try_arm(name, partial(function, *inputs[0]), check)
        walks = {name: _chain(session, candidates[name][0], inputs) for name in checked.arms}
        return _row(session, part, m, k, walks, checked)


def _inputs(session: Session, m: int, k: int, count: int) -> list[Tensors]:
    copies = 2 if session.rehearsal else copies_for(m * k * 2 * count)
    return [
        tuple(torch.randn(m, k, device=session.device, dtype=torch.bfloat16) for _ in range(count))
        for _ in range(copies)
    ]


def _chain(
    session: Session, function: Callable[..., Any], inputs: Sequence[Tensors]
) -> Callable[[], float]:
    return session.timer.chain([partial(function, *tensors) for tensors in inputs])


def _check(expected: torch.Tensor, group: int, slack: float, out: QuantizedActivation) -> None:
    """Scales are the largest magnitude over 448, values within half a step of the truth.

    Args:
        slack: what the steps before the quantiser may round, relative to a value.
    """
    m, k = expected.shape
    groups = -(-k // group)
    padded = F.pad(expected.abs(), (0, groups * group - k)).view(m, groups, group)
    amax = padded.amax(-1)
    scale = torch.where(amax == 0, 1.0, amax / 448)
    got = out.scale[:m].double()
    assert got.shape == scale.shape, f"scales {tuple(got.shape)}, needs {tuple(scale.shape)}"
    assert bool(((got - scale).abs() <= (slack + 2.0**-22) * scale).all()), "a scale is wrong"
    wide = got.repeat_interleave(group, 1)[:, :k]
    error = (out.data[:m].float().double() * wide - expected).abs()
    bound = (_HALF_STEP + slack) * expected.abs() + (_SMALLEST / 2 + slack) * wide
    # A value above the limit by a rounding of the scale saturates.
    assert bool((error <= bound + 448 * (slack + 2.0**-22) * wide).all()), "a value is wrong"


def _row(
    session: Session,
    part: str,
    m: int,
    k: int,
    walks: dict[str, Callable[[], float]],
    checked: Checked,
) -> Row:
    figures = alternate(walks, session.rounds)
    return {"part": part, "m": m, "k": k, **table(figures), **checked.told()}
