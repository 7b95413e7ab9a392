"""Delayed scaling: the scale of a call comes from the magnitudes of the calls before it.

The rule is TransformerEngine's (delayed_scaling.cu): a window of the last amax values, its
maximum or its newest entry, and ``scale = amax / 448 * 2 ** margin`` in our convention. Four
things differ on purpose. Scales are updated whether gradients are recorded or not; theirs are not
under inference mode. An amax that is not finite is dropped instead of standing in the window. The
first call without a seed uses its own amax and not the scale 1. And `freeze` is explicit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fp8dispatch.calibrate.scales import AmaxSeed
from fp8dispatch.checks import check_activations, check_choice, check_size
from fp8dispatch.errors import InvalidInputError
from fp8dispatch.formats import FLOAT8_DTYPES, round_scale
from fp8dispatch.modules import FP8Linear
from fp8dispatch.quantization.eager import scale_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

Algorithm = Literal["max", "most_recent"]
FEWEST_WARMUP_STEPS, MOST_WARMUP_STEPS = 50, 200


class DelayedScaling(nn.Module):
    """The static scale of one layer's inputs, following them until it is frozen.

    Nothing waits for the GPU: the window and the scale stay on their device.

    Args:
        history_length: calls in the window.
        margin: octaves of headroom: the scale is ``2 ** margin`` times larger.
        algorithm: ``"max"`` of the window, or ``"most_recent"``.
        warmup_steps: calls until the scale is called warm, 50 to 200.
        freeze_when_warm: freeze by itself then, for scales that do not change any more.
        dtype: the FP8 dtype of the activations.
        device: where window and scale are kept.

    Raises:
        InvalidInputError: arguments that do not fit.
    """

    amax_history: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        *,
        history_length: int = 1024,
        margin: float = 0,
        algorithm: Algorithm = "max",
        warmup_steps: int = FEWEST_WARMUP_STEPS,
        freeze_when_warm: bool = True,
        dtype: torch.dtype = torch.float8_e4m3fn,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_size("history_length", history_length)
        check_choice("dtype", dtype, FLOAT8_DTYPES)
        if algorithm not in ("max", "most_recent"):
            raise InvalidInputError(
                f"algorithm must be 'max' or 'most_recent', found {algorithm!r}"
            )
        whole = isinstance(warmup_steps, int) and not isinstance(warmup_steps, bool)
        if not whole or not FEWEST_WARMUP_STEPS <= warmup_steps <= MOST_WARMUP_STEPS:
            raise InvalidInputError(
                f"warmup_steps must be from {FEWEST_WARMUP_STEPS} to {MOST_WARMUP_STEPS}, found "
                f"{warmup_steps!r}: fewer leave the scale to chance, more add nothing"
            )
        if not isinstance(margin, (int, float)) or not -32 <= margin <= 32:
            raise InvalidInputError(f"margin must be from -32 to 32 octaves, found {margin!r}")
        self.margin = margin
        self.algorithm = algorithm
        self.warmup_steps = warmup_steps
        self.freeze_when_warm = freeze_when_warm
        self.dtype = dtype
        self.steps = 0
        self.frozen = False
        self.settled = False  # the layer has the frozen scale
        self.hook: RemovableHandle | None = None  # of the layer that it is attached to
        self._seeded = False
        self.register_buffer("amax_history", torch.zeros(history_length, device=device))
        self.register_buffer("scale", torch.ones(1, device=device))

    @property
    def warm(self) -> bool:
        """Whether `warmup_steps` calls were seen."""
        return self.steps >= self.warmup_steps

    def seed(self, history: Sequence[float] | AmaxSeed) -> None:
        """Start from calibrated magnitudes, newest first; `amax_seeds` makes them.

        Raises:
            InvalidInputError: no magnitudes, or one that is negative or not finite.
        """
        values = history.amax_history if isinstance(history, AmaxSeed) else tuple(history)
        if not values or not all(math.isfinite(value) and value >= 0 for value in values):
            raise InvalidInputError(
                "a seed must hold finite magnitudes, found none or one that is not; take it from "
                "amax_seeds"
            )
        values = values[: self.amax_history.numel()]
        with torch.no_grad():
            self.amax_history.zero_()
            self.amax_history[: len(values)] = torch.tensor(values)
            self._rescale()
        self._seeded = True

    def freeze(self) -> None:
        """Keep the scale as it is: calls give the same numbers every time."""
        self.frozen = True

    def unfreeze(self) -> None:
        """Follow the inputs again, for another warm-up."""
        self.frozen = self.settled = False
        self.steps = 0
        self._seeded = True  # the scale that was frozen is the one to start from

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The scale for this call, one fp32 element; its magnitude counts from the next one on.

        Args:
            x: activations [..., K], bfloat16, float16 or float32.
        """
        check_activations("x", x)
        if self.frozen:
            return self.scale
        with torch.no_grad():
            amax = x.detach().abs().amax().float() if x.numel() else self.scale.new_zeros(())
            if self.steps == 0 and not self._seeded:
                self.update(amax)
                return self.scale.clone()
            used = self.scale.clone()
            self.update(amax)
        return used

    def update(self, amax: torch.Tensor) -> None:
        """Count one call's amax, an element on the window's device; nothing while frozen."""
        if self.frozen:
            return
        with torch.no_grad():
            counts = torch.isfinite(amax)
            rolled = self.amax_history.roll(1)
            rolled[0] = amax.to(rolled)
            self.amax_history.copy_(torch.where(counts, rolled, self.amax_history))
            self._rescale()
        self.steps += 1
        if self.warm and self.freeze_when_warm:
            self.freeze()

    def _rescale(self) -> None:
        newest = self.algorithm == "most_recent"
        amax = self.amax_history[0] if newest else self.amax_history.amax()
        wanted = scale_of(amax.reshape(1), self.dtype) * 2.0**self.margin
        self.scale.copy_(torch.where(amax > 0, wanted, self.scale))

    def get_extra_state(self) -> dict[str, Any]:
        """The counters, which are no tensors."""
        return {"steps": self.steps, "frozen": self.frozen, "seeded": self._seeded}

    def set_extra_state(self, state: Any) -> None:
        """What `get_extra_state` gave."""
        self.steps, self.frozen = int(state["steps"]), bool(state["frozen"])
        self._seeded = bool(state["seeded"])
        self.settled = False

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> DelayedScaling:
        """Let ``.to`` and its kin move the window and the scale, but keep them in fp32."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def attach_delayed_scaling(
    model: nn.Module, seeds: Mapping[str, AmaxSeed] | None = None, **options: Any
) -> dict[str, DelayedScaling]:
    """Let the static activation scales of a model's `FP8Linear` layers follow their inputs.

    Each layer with an ``activation_scale`` gets a `DelayedScaling` as its child, which sets that
    scale before every call until it is frozen. `detach_delayed_scaling` takes them off again.

    Args:
        model: any module that holds `FP8Linear` layers with static activations.
        seeds: of `amax_seeds`, by the layers' names; layers without one start from their first
            call.
        options: as for `DelayedScaling`.

    Returns:
        The new modules, by the layers' names.

    Raises:
        InvalidInputError: no such layer, one that has delayed scaling already, or a seed of a
            layer that is not there.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, FP8Linear) and layer.activation_scale is not None
    }
    unknown = set(seeds or ()) - set(layers)
    taken = [name for name, layer in layers.items() if hasattr(layer, "delayed_scaling")]
    if not layers or unknown or taken:
        found = (
            f"seeds of {', '.join(sorted(unknown))}, which are none"
            if unknown
            else f"{taken[0]!r}, which has it already"
            if taken
            else "none"
        )
        raise InvalidInputError(
            f"delayed scaling needs FP8Linear layers with static activations, found {found}; make "
            f"them with an activation_scale"
        )
    made = {}
    for name, layer in layers.items():
        scaling = DelayedScaling(device=layer.weight.device, **options)
        if seeds and name in seeds:
            scaling.seed(seeds[name])
        layer.delayed_scaling = scaling
        scaling.hook = layer.register_forward_pre_hook(_set_scale)
        made[name] = scaling
    return made


def detach_delayed_scaling(model: nn.Module) -> None:
    """Take off what `attach_delayed_scaling` put on; the scales stay as they are."""
    for layer in model.modules():
        scaling = getattr(layer, "delayed_scaling", None)
        if isinstance(scaling, DelayedScaling):
            if scaling.hook is not None:
                scaling.hook.remove()
            del layer.delayed_scaling


def _set_scale(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
    """A forward pre-hook: the scale that this call uses."""
    assert isinstance(layer, FP8Linear)
    assert layer.activation_scale is not None
    scaling = layer.delayed_scaling
    assert isinstance(scaling, DelayedScaling)
    if scaling.settled:
        return  # writing the same scale again would have it checked again, which waits for the GPU
    settled = scaling.frozen
    with torch.no_grad():
        used = scaling(arguments[0])
        layer.activation_scale.copy_(round_scale(used, layer.activation_scale.dtype))
    scaling.settled = settled
