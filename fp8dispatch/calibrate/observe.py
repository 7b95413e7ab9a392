"""Watching the inputs of every linear layer while a model runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fp8dispatch.calibrate.experts import ExpertInputs, stacked_weights
from fp8dispatch.calibrate.kv_cache import KVObserver
from fp8dispatch.calibrate.magnitudes import Magnitudes
from fp8dispatch.calibrate.methods import DEFAULT_PERCENTILE, Method, check_method
from fp8dispatch.calibrate.stats import CalibrationStats, SourceRecord, record_of
from fp8dispatch.errors import CalibrationError, DTypeError, ShapeError
from fp8dispatch.modules import FP8Linear

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class _Layer:
    """What was seen of one layer."""

    in_features: int
    calls: int = 0
    unmasked_calls: int = 0
    magnitudes: Magnitudes = field(default_factory=Magnitudes)
    history: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Mask:
    """Which tokens of a call [B, T] are real, and which of those count; None where all do."""

    real: torch.Tensor | None
    counted: torch.Tensor | None

    @classmethod
    def of(cls, given: torch.Tensor, exclude_first: int) -> _Mask:
        real = given != 0
        counted = real & (real.cumsum(1) > exclude_first) if exclude_first else real
        return cls(*(None if bool(mask.all()) else mask for mask in (real, counted)))


class Calibrator:
    """A context in which a model's calls are watched; `stats` says what was seen.

        with Calibrator(model) as calibrator:
            for batch in batches:
                model(**batch)
        calibrator.stats().save("stats.json")

    Seen are the inputs of every ``nn.Linear`` and `FP8Linear`, of experts that are stacked in one
    parameter, and the KV cache that the model returns. Padding does not count: a call's
    ``attention_mask`` [B, T] is found by itself, other masks are given with `masked`.

    Args:
        model: any module, in the dtype that it is to be calibrated in.
        exclude_first_tokens: leave out that many real tokens at the beginning of each sequence,
            where massive activations sit, from the layers' statistics (not from the cache's).
        kv_cache: whether to watch the cache in the model's output.
        method, percentile: what the statistics will name as the way to make scales of them.

    Raises:
        DTypeError, InvalidInputError: arguments that do not fit.
        CalibrationError: the model has no linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        exclude_first_tokens: int = 0,
        kv_cache: bool = True,
        method: Method = "max",
        percentile: float = DEFAULT_PERCENTILE,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise DTypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
        check_method(method, percentile)
        if not isinstance(exclude_first_tokens, int) or exclude_first_tokens < 0:
            raise ShapeError(
                f"exclude_first_tokens must be 0 or more, found {exclude_first_tokens!r}"
            )
        self._model = model
        self._linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, FP8Linear))
        }
        self._stacked = stacked_weights(model)
        if not self._linears and not self._stacked:
            raise CalibrationError(
                f"a model with linear layers is needed, found none in {type(model).__name__}; "
                f"pass the model itself, before it is compiled or exported"
            )
        self._exclude = exclude_first_tokens
        self._method, self._percentile = method, percentile
        self._kv = KVObserver(model) if kv_cache else None
        self._open: ExitStack | None = None
        self._mask: _Mask | None = None
        self._outside: _Mask | None = None  # the mask that was in force before the model's call
        self._last: tuple[weakref.ref[torch.Tensor], int, Magnitudes, bool] | None = None
        self._samples = self._tokens = 0
        self._layers: dict[str, _Layer] = {}
        self._forget()

    def __enter__(self) -> Self:
        if self._open is not None:
            raise CalibrationError("a Calibrator is entered once, found it entered; leave it first")
        with ExitStack() as stack:
            for name, module in self._linears.items():
                hook = self._hook(name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            before = self._model.register_forward_pre_hook(self._before, with_kwargs=True)
            stack.callback(before.remove)
            after = self._model.register_forward_hook(self._after, always_call=True)
            stack.callback(after.remove)
            if self._stacked:
                stack.enter_context(ExpertInputs(self._stacked, self._expert))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._open is not None:
            self._open.close()
        self._open = self._last = self._mask = None

    @contextmanager
    def masked(self, mask: torch.Tensor) -> Iterator[None]:
        """Count only the tokens where `mask` [B, T] is not zero, in calls made inside.

        For models that do not take an ``attention_mask``. Inputs [B, T, K] and [B * T, K] are
        masked; those of other shapes are counted whole and `unmasked_calls` says how often.
        """
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            raise ShapeError("a mask must be a tensor [B, T], one value per token")
        outside, self._mask = self._mask, _Mask.of(mask, self._exclude)
        self._last = None
        try:
            yield
        finally:
            self._mask, self._last = outside, None

    def count_samples(self, samples: int, tokens: int) -> None:
        """Note how much was run; only shown, never computed with."""
        self._samples += samples
        self._tokens += tokens

    @property
    def tokens(self) -> int:
        """Tokens noted with `count_samples`."""
        return self._tokens

    def stats(
        self, *, sources: Iterable[SourceRecord] = (), complete: bool = True
    ) -> CalibrationStats:
        """What was seen so far, as data that can be saved."""
        return CalibrationStats(
            method=self._method,
            percentile=self._percentile,
            complete=complete,
            samples=self._samples,
            tokens=self._tokens,
            sources=list(sources),
            modules={
                name: record_of(
                    layer.magnitudes,
                    layer.in_features,
                    layer.calls,
                    layer.history,
                    layer.unmasked_calls,
                )
                for name, layer in self._layers.items()
            },
            kv_cache=self._kv.records() if self._kv is not None else {},
        )

    def _forget(self) -> None:
        self._layers = {name: _Layer(module.in_features) for name, module in self._linears.items()}
        for stacked in self._stacked:
            for expert in range(stacked.weight.shape[0]):
                # Its in_features are known when the first input comes: [E, N, K] or [E, K, N].
                self._layers.update({name: _Layer(1) for name in stacked.names(expert)})

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                with torch._C.DisableTorchFunction():
                    self._count((name,), x)

        return hook

    def _expert(self, names: tuple[str, ...], x: torch.Tensor) -> None:
        for name in names:
            self._layers[name].in_features = x.shape[-1]
        self._count(names, x)

    def _count(self, names: tuple[str, ...], x: torch.Tensor) -> None:
        found, whole = self._magnitudes(x)
        for name in names:
            layer = self._layers[name]
            layer.calls += 1
            layer.unmasked_calls += whole
            layer.magnitudes.add(found)
            if found.values:
                layer.history.append(found.amax)

    def _magnitudes(self, x: torch.Tensor) -> tuple[Magnitudes, bool]:
        """Of the tokens that count, and whether padding could not be told; q, k and v ask once."""
        version = -1 if x.is_inference() else x._version
        last = self._last
        if last is not None and last[0]() is x and last[1] == version:
            return last[2], last[3]
        rows, whole = self._tokens_of(x)
        found = Magnitudes.of(rows)
        self._last = weakref.ref(x), version, found, whole
        return found, whole

    def _tokens_of(self, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        mask = self._mask.counted if self._mask is not None else None
        if mask is None:
            return x, False
        if x.shape[:-1] == mask.shape:
            return x[mask.to(x.device)], False
        if x.dim() == 2 and x.shape[0] == mask.numel():
            return x[mask.reshape(-1).to(x.device)], False
        return x, True

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._outside, self._last = self._mask, None
        given = kwargs.get("attention_mask")
        if isinstance(given, torch.Tensor) and given.dim() == 2:
            self._mask = _Mask.of(given, self._exclude)
        elif self._mask is None and self._exclude:
            tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
            if isinstance(tokens, torch.Tensor) and tokens.dim() >= 2:
                everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
                self._mask = _Mask.of(everything, self._exclude)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if self._kv is not None and cache is not None:
            self._kv.observe(cache, self._mask.real if self._mask is not None else None)
        self._mask, self._outside = self._outside, None
