"""The canary of expert matmuls: the demands of `judgement`, and those that routing adds.

Five experts, one without rows and one with a single row; rows of no expert, by ids on both sides of
the range and behind the last offset, which must come out as zeros over poisoned memory; rows
gathered twice and scattered. Ways to call that a backend refuses are left out; it must take one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from fp8dispatch.errors import Refusal
from fp8dispatch.formats import activation_float8, dtype_name, max_value
from fp8dispatch.moe.backends.contract import ExpertBackend, ExpertWeights
from fp8dispatch.moe.routing import Routing
from fp8dispatch.probes.device import describe
from fp8dispatch.probes.judgement import CanaryResult, judge
from fp8dispatch.probes.known_operands import (
    make_activations,
    make_weight,
    normal,
    poison,
    spread,
    synchronize,
)
from fp8dispatch.problem import Accuracy, ExpertsProblem
from fp8dispatch.quantization.activation import quantize_activation
from fp8dispatch.recipe import Granularity, Recipe

_EXPERTS = 5
_ROWS = 132
_EMPTY, _SINGLE = 1, 3
_SEED = 0xE8


class _Operands:
    """The tensors of one call, on the CPU and on the device, and the truth in float64."""

    own_quantiser = True

    def __init__(self, problem: ExpertsProblem, device: torch.device, seed: int) -> None:
        self.problem = problem
        generator = torch.Generator(device="cpu").manual_seed(seed)
        m, n, k, recipe = problem.m, problem.n, problem.k, problem.recipe
        made = [make_weight(problem, generator) for _ in range(problem.experts)]
        data, scale = (torch.stack(parts) for parts in zip(*made, strict=True))
        inputs = m // 2 if problem.gathers else m
        x = make_activations(replace(problem, m=inputs), generator)
        bias = None
        if problem.has_bias:
            bias = normal((problem.experts, n), generator).to(getattr(torch, problem.out_dtype))

        ids = torch.randint(-1, problem.experts + 1, (m,), generator=generator)
        ids[ids == _EMPTY] = 0
        ids[ids == _SINGLE] = problem.experts + 7
        ids[m // 3] = _SINGLE
        of_expert = torch.where((ids < 0) | (ids >= problem.experts), problem.experts, ids)
        order = torch.argsort(of_expert, stable=True)
        source = torch.randint(inputs, (m,), generator=generator)
        if not problem.gathers:
            source = torch.arange(m)
        target = torch.randperm(m, generator=generator)
        if not problem.scatters:
            target = torch.arange(m)
        ends = torch.bincount(of_expert, minlength=problem.experts).cumsum(0)[: problem.experts]
        of_row = of_expert if problem.batched else of_expert[order]

        group, dtype = recipe.group_size(k), getattr(torch, problem.activation_dtype)
        static = None
        if problem.static_activation:
            static = x.float().abs().amax() / max_value(dtype)
            static = static * (torch.arange(problem.experts) + 1.5) / 2
        self.value = torch.zeros((m, n), dtype=torch.float64)
        self.mass, self.largest = self.value.clone(), self.value.clone()
        rows = 1 if recipe.granularity is not Granularity.TENSOR else n
        rows = rows if recipe.block_size is None else recipe.block_size[0]
        for expert in range(problem.experts):
            one = (of_row == expert).nonzero().flatten()
            if not one.numel():
                continue
            of_one = None if static is None else static[expert].reshape(1)
            plain = quantize_activation(x[source[one]], group, dtype, of_one, use_kernels=False)
            wide_x = plain.data.float().double() * spread(plain.scale, 1, group, plain.data.shape)
            grid = scale[expert].reshape(-1, scale[expert].shape[-1])
            wide = data[expert].float().double() * spread(grid, rows, group, data[expert].shape)
            added = torch.zeros(n) if bias is None else bias[expert]
            self.value[target[one]] = wide_x @ wide.t() + added.double()
            self.mass[target[one]] = wide_x.abs() @ wide.abs().t() + added.double().abs()
            self.largest[target[one]] = wide_x.abs().amax(1, keepdim=True) * wide.abs().amax(1)

        source_scale = scale.to(device)
        flat = source_scale.clone()
        self.weights = ExpertWeights(data.to(device), flat, recipe, scale_source=source_scale)
        self.x = x.to(device)
        self.bias = None if bias is None else bias.to(device)
        self.static = None if static is None else static.to(device)
        self.routing = Routing(
            problem.experts,
            m,
            inputs,
            ids.to(device) if problem.batched else None,
            None if problem.batched else ends.to(torch.int32).to(device),
            source.to(device) if problem.gathers else None,
            target.to(device) if problem.scatters else None,
        )
        self.before = [tensor.clone() for tensor in self._inputs()]

    def _inputs(self) -> list[torch.Tensor]:
        routing = self.routing
        tensors = [self.x, self.weights.data.view(torch.uint8), self.weights.scale]
        optional = (
            self.bias, self.static,
            routing.expert_ids, routing.offsets, routing.gather, routing.scatter,
        )  # fmt: skip
        return tensors + [tensor for tensor in optional if tensor is not None]

    def unchanged(self) -> bool:
        """No operand was written to."""
        return all(map(torch.equal, self._inputs(), self.before))


def run_experts_canary(
    backend: ExpertBackend, device: torch.device, recipe: Recipe
) -> CanaryResult:
    """`numerics.run_canary` for a backend of expert matmuls.

    Raises:
        Exception: whatever the backend raises; the caller knows what that means.
    """
    problems, refusals = _applicable(backend, device, recipe)
    if not problems:
        sentences = "; ".join(str(refusal) for refusal in refusals)
        return CanaryResult(False, f"not applicable: {backend.name} {sentences}", 0.0, False)
    problems = problems + _of_kernels(backend, device, problems[0])
    worst = 0.0
    with torch.autocast(device.type, enabled=False):
        for seed, problem in enumerate(problems, _SEED):
            operands = _Operands(problem, device, seed)
            poison(problem, device)
            out = backend.experts(
                operands.x, operands.weights, operands.bias, operands.static, operands.routing,
                problem,
            )  # fmt: skip
            synchronize(device)
            share, wrong = judge(out, operands)
            worst = max(worst, share)
            if wrong is not None:
                return CanaryResult(False, f"{problem}: {wrong}", worst)
    count = len(problems)
    return CanaryResult(True, f"right in {count} calls, {worst:.0%} of the bound used", worst)


def _applicable(
    backend: ExpertBackend, device: torch.device, recipe: Recipe
) -> tuple[list[ExpertsProblem], tuple[Refusal, ...]]:
    """The calls that the backend takes, or else why it refuses the first."""
    machine = describe(device)
    refused = backend.refuse_machine(machine)
    if refused:
        return [], refused
    dtypes = sorted(backend.weight_dtypes, key=lambda name: (name != "float8_e4m3fn", name))
    plain = ExpertsProblem(
        _ROWS,
        272,
        640,
        recipe,
        dtypes[0],
        dtype_name(activation_float8(getattr(torch, dtypes[0]))),
        "bfloat16" if "bfloat16" in backend.out_dtypes else min(backend.out_dtypes),
        experts=_EXPERTS,
    )
    for n, k in ((272, 640), (256, 640), (256, 512)):
        ways = list(_ways(replace(plain, n=n, k=k)))
        exact, fast = (
            [one for one in of_class if not backend.refuse_problem(one, machine)]
            for of_class in (ways, [replace(one, accuracy=Accuracy.FAST) for one in ways])
        )
        if Accuracy.FAST not in backend.accuracies:
            fast = []
        # Of the fast class one call will do, unless the recipe has no other.
        if exact or fast:
            return exact + (fast[-1:] if exact else fast), ()
    return [], backend.refuse_problem(plain, machine)


def _of_kernels(
    backend: ExpertBackend, device: torch.device, plain: ExpertsProblem
) -> list[ExpertsProblem]:
    """Both plain ways to call at each size that the backend names."""
    machine = describe(device)
    named = [
        replace(plain, m=m, n=n, k=k, has_bias=True, batched=batched)
        for m, n, k in backend.canary_sizes
        for batched in (False, True)
    ]
    return [one for one in named if not backend.refuse_problem(one, machine)]


def _ways(plain: ExpertsProblem) -> Iterator[ExpertsProblem]:
    """Each way to call, few rows and many for each expert, with and without a bias."""
    for has_bias in (False, True):
        for m in (_ROWS, 4 * _ROWS):
            problem = replace(plain, m=m, has_bias=has_bias)
            yield replace(problem, batched=True)
            yield problem
    yield replace(plain, batched=True, gathers=True)
    yield replace(plain, gathers=True, scatters=True, has_bias=True)
    yield replace(plain, gathers=True, static_activation=True, static_per_expert=True)
