"""Backends that are wrong in one known way each, to prove that the canary sees it.

They derive from `eager`, so that nothing but the planted fault is wrong. Child processes load them
by ``"tests.probes.planted:NAME"``.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fp8dispatch.backends.contract import Weight
from fp8dispatch.backends.eager import Eager
from fp8dispatch.errors import Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.quantization.activation import QuantizedActivation
from fp8dispatch.recipe import Granularity, Recipe

Fault = Callable[
    [Eager, QuantizedActivation, Weight, "torch.Tensor | None", LinearProblem], torch.Tensor
]


class Planted(Eager):
    """Eager with a fault in `matmul`; `calls` counts what was asked of it."""

    name = "planted"

    def __init__(self, fault: Fault | None = None, **declared: Any) -> None:
        self.fault, self.calls = fault, 0
        for attribute, value in declared.items():
            setattr(self, attribute, value)

    def matmul(
        self,
        x: QuantizedActivation,
        weight: Weight,
        bias: torch.Tensor | None,
        problem: LinearProblem,
    ) -> torch.Tensor:
        self.calls += 1
        if self.fault is None:
            return super().matmul(x, weight, bias, problem)
        return self.fault(Eager(), x, weight, bias, problem)


def swapped_operands(eager, x, weight, bias, problem):
    """The product the other way round, its memory then read as [M, N]."""
    right = eager.matmul(x, weight, None, problem)
    out = right.t().contiguous().view(problem.m, problem.n)
    return out if bias is None else (out + bias).to(right.dtype)


def transposed_weight_scale(eager, x, weight, bias, problem):
    """Scales read with the other index running first."""
    scale = weight.scale.t().reshape(weight.scale.shape)
    return eager.matmul(x, weight._replace(scale=scale), bias, problem)


def transposed_activation_scale(eager, x, weight, bias, problem):
    """Row-major scales taken for M-major ones."""
    scale = x.scale.t().reshape(x.scale.shape)
    return eager.matmul(QuantizedActivation(x.data, scale), weight, bias, problem)


def reciprocal_scale(eager, x, weight, bias, problem):
    return eager.matmul(x, weight._replace(scale=1 / weight.scale), bias, problem)


def rounded_up_scale(eager, x, weight, bias, problem):
    """fp32 scales stored as UE8M0 without quantising the data again."""
    scale = torch.exp2(torch.ceil(torch.log2(weight.scale)))
    return eager.matmul(x, weight._replace(scale=scale), bias, problem)


def rounded_activation_scale(eager, x, weight, bias, problem):
    scale = torch.exp2(torch.round(torch.log2(x.scale)))
    return eager.matmul(QuantizedActivation(x.data, scale), weight, bias, problem)


def missing_bias(eager, x, weight, bias, problem):
    return eager.matmul(x, weight, None, problem)


def double_bias(eager, x, weight, bias, problem):
    out = eager.matmul(x, weight, bias, problem)
    return out if bias is None else (out + bias).to(out.dtype)


def missing_bias_in_fp16(eager, x, weight, bias, problem):
    return eager.matmul(x, weight, None if problem.out_dtype == "float16" else bias, problem)


def unwritten_tail(eager, x, weight, bias, problem):
    """Whole tiles of 4 rows only."""
    right = eager.matmul(x, weight, bias, problem)
    out = torch.empty_like(right)
    whole = problem.m // 4 * 4
    out[:whole] = right[:whole]
    return out


def unwritten_columns(eager, x, weight, bias, problem):
    right = eager.matmul(x, weight, bias, problem)
    out = torch.empty_like(right)
    out[:, :256] = right[:, :256]
    return out


def constant(eager, x, weight, bias, problem):
    return torch.full_like(eager.matmul(x, weight, bias, problem), 0.25)


def zeros(eager, x, weight, bias, problem):
    return torch.zeros_like(eager.matmul(x, weight, bias, problem))


def uninitialised(eager, x, weight, bias, problem):
    """What a kernel built for another architecture does: nothing."""
    dtype = getattr(torch, problem.out_dtype)
    return torch.empty((problem.m, problem.n), dtype=dtype, device=x.data.device)


def first_result_for_ever(eager, x, weight, bias, problem, kept={}):  # noqa: B006
    """Memory that still holds the result of an earlier call."""
    key = (problem.m, problem.n, problem.out_dtype)
    return kept.setdefault(key, eager.matmul(x, weight, bias, problem))


def wrong_block_size(eager, x, weight, bias, problem):
    """Blocks of half the rows: the next block's scale too early."""
    assert weight.recipe.block_size is not None
    rows, columns = weight.recipe.block_size
    recipe = Recipe(Granularity.BLOCK, (rows // 2, columns))
    scale = weight.scale.repeat(2, 1)
    return eager.matmul(x, weight._replace(scale=scale, recipe=recipe), bias, problem)


def padded_groups(eager, x, weight, bias, problem):
    """Weight scales read as if the groups of K were padded to a multiple of 4."""
    blocks, groups = weight.scale.shape
    padded = torch.zeros(blocks * (-(-groups // 4) * 4))
    padded[: weight.scale.numel()] = weight.scale.reshape(-1)
    scale = padded.view(blocks, -1)[:, :groups].contiguous()
    return eager.matmul(x, weight._replace(scale=scale), bias, problem)


def dropped_last_group(eager, x, weight, bias, problem):
    """Whole groups of four blocks of K only."""
    data = x.data.float()
    data[:, 512:] = 0
    return eager.matmul(QuantizedActivation(data.to(x.data.dtype), x.scale), weight, bias, problem)


def nan_for_zero_row(eager, x, weight, bias, problem):
    """Divides by the amax of a row that is zero."""
    out = eager.matmul(x, weight, bias, problem)
    out[(x.data.float() == 0).all(1)[: problem.m]] = torch.nan
    return out


def scaled_data_in_place(eager, x, weight, bias, problem):
    out = eager.matmul(x, weight, bias, problem)
    weight.scale.mul_(2)
    return out


def wrong_dtype(eager, x, weight, bias, problem):
    return eager.matmul(x, weight, bias, problem).double()


def wrong_device(eager, x, weight, bias, problem):
    return eager.matmul(x, weight, bias, problem).to("meta")


def wrong_shape(eager, x, weight, bias, problem):
    return eager.matmul(x, weight, bias, problem).t()


def one_element_off(eager, x, weight, bias, problem):
    """An error that the signal-to-noise ratio of its row does not show."""
    out = eager.matmul(x, weight, bias, problem)
    out[-1, 7] += 0.05 * out[-1].float().square().mean().sqrt()
    return out


def fast_accumulation(eager, x, weight, bias, problem):
    """What accumulation with about 14 bits over all of K does to the sum, at its worst."""
    wide = replace(problem, out_dtype="float32")
    mass = eager.matmul(
        QuantizedActivation(x.data.float().abs().to(x.data.dtype), x.scale),
        weight._replace(data=weight.data.float().abs().to(weight.data.dtype)),
        None,
        wide,
    )
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, mass.shape, generator=generator) * 2.0 - 1
    out = eager.matmul(x, weight, bias, wide) + sign * mass * 2.0**-11
    return out.to(getattr(torch, problem.out_dtype))


def raises(eager, x, weight, bias, problem):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def runs_out_of_memory(eager, x, weight, bias, problem):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def warns(eager, x, weight, bias, problem):
    raise UserWarning("deprecated")


def loses_the_context(eager, x, weight, bias, problem):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def asserts_on_device(eager, x, weight, bias, problem):
    """A real sticky error of CUDA."""
    outside = torch.full((1,), 10, device=x.data.device)
    return torch.zeros(4, device=x.data.device)[outside]


def hangs_on_device(eager, x, weight, bias, problem):
    """A kernel that runs for about 20 s, and a host that waits for it in the driver."""
    torch.cuda._sleep(40_000_000_000)
    return eager.matmul(x, weight, bias, problem)


def aborts(eager, x, weight, bias, problem):
    sys.stderr.write("Arch conditional MMA instruction used without targeting it. Aborting.\n")
    os.abort()


def segfaults(eager, x, weight, bias, problem):
    return ctypes.string_at(0)


def exits(eager, x, weight, bias, problem):
    os._exit(0)


def killed_from_outside(eager, x, weight, bias, problem):
    os.kill(os.getpid(), 9)


def hangs(eager, x, weight, bias, problem):
    time.sleep(600)


def floods(eager, x, weight, bias, problem):
    while True:
        os.write(1, b"Arch conditional MMA instruction used without targeting it\n" * 1000)


def lies(eager, x, weight, bias, problem):
    """Prints what a right backend's child would, as far as it can know it."""
    for nonce in ('"nonce": "", ', ""):
        os.write(1, b'\n{%s"stage": "right", "reason": "trust me"}\n' % nonce.encode())
    return constant(eager, x, weight, bias, problem)


def chatters(eager, x, weight, bias, problem):
    """Right, and talkative on both pipes, without ending its last line."""
    os.write(1, b"loading kernels ... \n" * 1000 + b"done")
    os.write(2, b"warning: \xff\xfe slow\n" * 1000)
    return eager.matmul(x, weight, bias, problem)


class OnlyAligned(Planted):
    """Takes multiples of 128 only, as some libraries do."""

    align_n = 128
    align_k = 128

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        if problem.m % 64:
            return [Refusal("align-m", "M a multiple of 64", f"M={problem.m}")]
        return []


RIGHT = Planted()
CHATTERS = Planted(chatters)
ABORTS = Planted(aborts)
ASSERTS_ON_DEVICE = Planted(asserts_on_device)
HANGS_ON_DEVICE = Planted(hangs_on_device)
SEGFAULTS = Planted(segfaults)
EXITS = Planted(exits)
KILLED = Planted(killed_from_outside)
HANGS = Planted(hangs)
FLOODS = Planted(floods)
LIES = Planted(lies)
RAISES = Planted(raises)
OUT_OF_MEMORY = Planted(runs_out_of_memory)
STICKY = Planted(loses_the_context)
REFUSES = Planted(recipes=frozenset())
FAST = Planted(fast_accumulation, accuracies=frozenset({Accuracy.FAST}))
