"""What every backend answers and does.

Its answers need no torch, so that the router and the doctor can ask without waiting for the import;
only its computation does (`fp8dispatch.backends.compute`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from packaging.version import Version

from fp8dispatch.backends.deferred import computed_in
from fp8dispatch.errors import BackendUnavailableError, Refusal
from fp8dispatch.machine import Machine
from fp8dispatch.problem import Accuracy, LinearProblem
from fp8dispatch.recipe import Granularity, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from fp8dispatch.kernels.tile import Tile
    from fp8dispatch.quantization.activation import QuantizedActivation


class Weight(NamedTuple):
    """The weight of one call, checked and oriented; made anew in every call, so cheap to make.

    Attributes:
        data: [N, K] FP8, any strides.
        scale: fp32 multipliers, contiguous: [1] per tensor, [N, 1] per row, [ceil(N / bn),
            ceil(K / bk)] per block.
        recipe: what `scale` means.
        scale_source: the caller's tensor that `scale` was made from; layouts that a backend
            prepares are remembered with it.
    """

    data: torch.Tensor
    scale: torch.Tensor
    recipe: Recipe
    scale_source: torch.Tensor


class Capability(ABC):
    """Where something runs and what it takes: declared as data where data can say it.

    `refuse_call` holds the rest.
    """

    name: ClassVar[str]
    distribution: ClassVar[str | None] = None
    """What `minimum_version` speaks of; one of `fp8dispatch.probes.packages.DISTRIBUTIONS`."""
    distributions: ClassVar[tuple[str, ...]] = ()
    """Whatever else may carry its code: a stored verdict holds for these versions alone."""
    minimum_version: ClassVar[str] = "0"
    install_hint: ClassVar[str] = ""
    capabilities: ClassVar[tuple[tuple[int, int], ...] | None] = None
    """CUDA compute capabilities it runs on, each named; None means any device."""
    verified_capabilities: ClassVar[tuple[tuple[int, int], ...]] = ()
    """Where its native code has been seen to run; elsewhere its first run is in a child process."""
    verified_versions: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Distribution -> the releases that were seen to run there; empty means any."""
    recipes: ClassVar[frozenset[Granularity]] = frozenset(Granularity)
    weight_dtypes: ClassVar[frozenset[str]]
    out_dtypes: ClassVar[frozenset[str]] = frozenset({"bfloat16", "float16", "float32"})
    align_n: ClassVar[int] = 1
    align_k: ClassVar[int] = 1
    quantizes_with_kernels: ClassVar[bool | None] = None
    """Quantise with our Triton kernels or in plain torch; None takes the kernels on a GPU."""
    accuracies: ClassVar[frozenset[Accuracy]] = frozenset({Accuracy.EXACT})
    canary_sizes: ClassVar[tuple[tuple[int, int, int], ...]] = ()
    """M, N, K that the canary takes beside its own, small ones: where the sizes of a call choose
    among several kernels, one for each kernel that the canary's own sizes do not reach."""
    quantizes_activations: ClassVar[bool] = True
    """`linear` multiplies FP8 activations. False gives other numbers, and needs `opt_in`."""
    batch_invariant: ClassVar[bool] = False
    """Computes each row alike whatever M is, bit for bit, where the problem asks for that."""
    any_strides: ClassVar[bool] = False
    """Reads a weight of any strides at the same speed: it needs no transposed copy for dX."""
    opt_in: ClassVar[str] = ""
    """Why it runs only where the policy names it, worded to follow "since"; empty: no need to."""
    rows_per_scale: ClassVar[int] = 1
    """Rows of dynamic activations that share a scale. More than 1 is another recipe, with other
    numbers than everybody else's, and therefore needs `opt_in`."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        others = (
            (cls.rows_per_scale != 1, f"rows_per_scale={cls.rows_per_scale}"),
            (not cls.quantizes_activations, "quantizes_activations=False"),
        )
        for differs, found in others:
            if differs and not cls.opt_in:
                raise TypeError(
                    f"{cls.__name__} needs opt_in to say why it must be named, found {found}, "
                    f"whose numbers nobody may get unasked"
                )

    def is_verified(self, machine: Machine) -> bool:
        """This native code has been seen to run on this kind of machine."""
        return machine.capability in self.verified_capabilities and all(
            (found := machine.version(name)) is not None and found.public in releases
            for name, releases in self.verified_versions.items()
        )

    def toolchain(self) -> Mapping[str, str]:
        """What else makes its code here, beside packages: name -> which one, found by looking.

        A stored verdict holds for these alone, as it does for the versions of packages.
        """
        return {}

    def refuse_machine(self, machine: Machine) -> tuple[Refusal, ...]:
        """Why the backend cannot run on this machine at all; empty when it can."""
        refusals: list[Refusal] = []
        if self.distribution is not None:
            found = machine.version(self.distribution)
            if found is None or found.release < Version(self.minimum_version).release:
                refusals.append(
                    Refusal(
                        "version",
                        f"{self.distribution} >= {self.minimum_version}{self.install_hint}",
                        machine.versions.get(self.distribution, "none"),
                    )
                )
        if self.capabilities is not None and (
            machine.is_rocm or machine.capability not in self.capabilities
        ):
            known = ", ".join(f"{major}.{minor}" for major, minor in self.capabilities)
            found_text = f"ROCm on {machine}" if machine.is_rocm else str(machine)
            refusals.append(
                Refusal("capability", f"a CUDA device of capability {known}", found_text)
            )
        return tuple(refusals)

    def refuse_problem(self, problem: LinearProblem, machine: Machine) -> tuple[Refusal, ...]:
        """Why the backend does not take this call; empty when it does."""
        refusals: list[Refusal] = []
        if problem.recipe.granularity not in self.recipes:
            names = " or ".join(sorted(recipe.value for recipe in self.recipes))
            refusals.append(Refusal("recipe", f"a {names} recipe", str(problem.recipe)))
        for code, allowed, found in (
            ("weight-dtype", self.weight_dtypes, problem.weight_dtype),
            ("out-dtype", self.out_dtypes, problem.out_dtype),
        ):
            if found not in allowed:
                what = code.replace("-", " ")
                refusals.append(Refusal(code, f"{what} {' or '.join(sorted(allowed))}", found))
        for axis, size, align in (
            ("N", problem.n, self.align_n),
            ("K", problem.k, self.align_k),
        ):
            if size % align:
                refusals.append(
                    Refusal(
                        f"align-{axis.lower()}", f"{axis} a multiple of {align}", f"{axis}={size}"
                    )
                )
        if problem.accuracy is Accuracy.EXACT and Accuracy.EXACT not in self.accuracies:
            refusals.append(Refusal("accuracy", "a policy that allows fast accumulation", "exact"))
        if problem.batch_invariant and not self.batch_invariant:
            need = "a policy without batch_invariant (how it sums depends on the number of rows)"
            refusals.append(Refusal("batch-invariance", need, "batch_invariant=True"))
        if problem.gradient and not self.quantizes_activations:
            need = 'dgrad="dequantized" (it quantises no dY)'
            refusals.append(Refusal("gradient", need, 'dgrad="fp8"'))
        refusals += self.refuse_call(problem, machine)
        return tuple(refusals)

    def refuse_call(self, problem: LinearProblem, machine: Machine) -> list[Refusal]:
        """Refusals that the declared data cannot express."""
        return []

    def loadable(self, recipe: Recipe) -> tuple[Refusal, ...]:
        """Import what the backend needs and say why it cannot compute a recipe; may take seconds.

        Asked once `refuse_machine` and `refuse_problem` refuse nothing, and never during capture.
        """
        return ()

    def require(self, recipe: Recipe) -> None:
        """Import what the backend needs.

        Raises:
            BackendUnavailableError: with the refusals of `loadable`.
        """
        reasons = self.loadable(recipe)
        if reasons:
            told = "; ".join(f"{self.name} {reason}" for reason in reasons)
            raise BackendUnavailableError(f"{told}; exclude it or repair the installation")


class Backend(Capability):
    """A way to compute ``out = dequantised(x) @ dequantised(weight).T + bias``."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        linear, settled = (
            next(one for one in cls.__mro__ if name in one.__dict__)
            for name in ("linear", "settled")
        )
        if linear is cls and settled not in (cls, Backend):
            raise TypeError(
                f"{cls.__name__} needs a settled() of its own beside its linear(), found that of "
                f"{settled.__name__}, whose repeated calls compute the linear of {settled.__name__}"
            )

    def row_multiple(self, problem: LinearProblem) -> int:
        """Rows of quantised activations come padded to this multiple, with zeros of scale 1."""
        return 1

    linear: Callable[
        [torch.Tensor, Weight, torch.Tensor | None, torch.Tensor | None, LinearProblem],
        torch.Tensor,
    ] = computed_in("fp8dispatch.backends.compute.linear")
    """``linear(x, weight, bias, activation_scale, problem)``: quantise the activations, multiply,
    add the bias. A backend that fuses the quantisation overrides this.

    Args:
        x: [M, K] bf16, fp16 or fp32, any strides; M, N and K are at least 1.
        weight: the FP8 weight.
        bias: [N] of any float dtype, added exactly once.
        activation_scale: one fp32 element for static activations, else None.
        problem: the same call as plain data; gives output dtype and accuracy.

    Returns:
        [M, N] in ``problem.out_dtype``.
    """

    def settled(
        self,
        weight: Weight,
        activation_scale: torch.Tensor | None,
        problem: LinearProblem,
        device: torch.device,
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] | None:
        """`linear` for calls that come again, as a function of X, ``weight.data`` and bias.

        Those calls have the same M and dtype of X, and weight, scales and bias over the same
        memory; the function keeps neither weight nor bias alive. None where it would save nothing.
        """
        return None

    def tiles(self, problem: LinearProblem, device: torch.device) -> tuple[Tile, ...]:
        """What `tune` may try as ``problem.tile`` beside the backend's own choice.

        Each must give the same bits; it is compared with the backend's own choice before it is
        timed. None of them is offered by a backend that does not look at ``problem.tile``.
        """
        return ()

    @abstractmethod
    def matmul(
        self,
        x: QuantizedActivation,
        weight: Weight,
        bias: torch.Tensor | None,
        problem: LinearProblem,
    ) -> torch.Tensor:
        """Multiply activations that are quantised already, add the bias.

        Args:
            x: data [M, K], or with rows beyond M as `row_multiple` asks for them; scale
                [ceil(rows / rows_per_scale), groups], M-major when it comes from `linear`, or
                [1, 1]. Operands that a caller quantised have a scale for each row: a backend
                with another `rows_per_scale` raises BackendUnavailableError for them.
            weight, bias, problem: as in `linear`.

        Returns:
            [M, N] in ``problem.out_dtype``.
        """
