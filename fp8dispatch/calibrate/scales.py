"""Static scales from statistics: of activations, of the KV cache, and seeds of delayed scaling."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from fp8dispatch.calibrate.methods import Method, amax_by, check_method
from fp8dispatch.calibrate.siblings import expert_peers, fused_groups
from fp8dispatch.calibrate.stats import CalibrationStats
from fp8dispatch.checks import check_choice
from fp8dispatch.errors import CalibrationError
from fp8dispatch.formats import FLOAT8_DTYPES, max_value
from fp8dispatch.quantization.eager import scale_of
from fp8dispatch.quantization.kv_cache import KV_DTYPES, KVScales, kv_scale_of

_log = logging.getLogger("fp8dispatch")


@dataclass(frozen=True)
class Unobserved:
    """Layers without statistics of their own.

    Attributes:
        experts: experts that no token was routed to, whose peers' scale stands in.
        layers: layers that no call reached, for which there is no scale.
    """

    experts: tuple[str, ...]
    layers: tuple[str, ...]


def activation_scales(
    stats: CalibrationStats,
    method: Method | None = None,
    *,
    percentile: float | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    allow_incomplete: bool = False,
) -> dict[str, float]:
    """One static activation scale for each linear layer: ``value = data * scale``.

    ``scale = amax / max_value(dtype)``, and 1 where all inputs were zero, as everywhere in this
    library; it is what `fp8_linear` takes as ``activation_scale`` and what checkpoints store as
    ``input_scale``. Layers that are fused when served (q, k, v; gate, up) get the largest scale
    of their group. An expert that no token was routed to gets the largest scale of its peers.

    Args:
        stats: from `CalibrationStats.load`, or of a `Calibrator`.
        method: ``"max"``, ``"percentile"`` or ``"mse"``; None takes the one that the statistics
            name.
        percentile: of method percentile, above 0 and up to 100; None takes the statistics' own.
        dtype: the FP8 dtype of the activations: 448 or, for FNUZ, 240 becomes their largest.
        allow_incomplete: take statistics of a run that was interrupted.

    Returns:
        Scales by the layers' names. Layers that no call reached are missing; `unobserved` lists
        them.

    Raises:
        InvalidInputError: an unknown method, percentile or dtype.
        CalibrationError: the statistics are incomplete.
    """
    method = stats.method if method is None else method
    percentile = stats.percentile if percentile is None else percentile
    check_method(method, percentile)
    check_choice("dtype", dtype, FLOAT8_DTYPES)
    if not stats.complete and not allow_incomplete:
        raise CalibrationError(
            f"the statistics must be of a finished run, found one that was interrupted after "
            f"{stats.samples} samples; run the same command again to resume it"
        )
    limits = {
        name: amax_by(method, record.magnitudes(), percentile=percentile, dtype=dtype)
        for name, record in stats.modules.items()
        if record.values
    }
    for group in fused_groups(limits):
        shared = max(limits[name] for name in group)
        limits.update(dict.fromkeys(group, shared))
    _warn_of_clipping(stats, limits, method)
    _lend_to_idle_experts(stats, limits)
    spoilt = [name for name in limits if stats.modules[name].nonfinite]
    if spoilt:
        _log.warning(
            "the inputs of %d layers held NaN or infinity during calibration, such as %s; their "
            "scales come from the finite values alone",
            len(spoilt),
            spoilt[0],
        )
    return {name: _scale(limits[name], dtype) for name in stats.modules if name in limits}


def unobserved(stats: CalibrationStats) -> Unobserved:
    """The experts that no token was routed to, and the layers that no call reached."""
    idle = [name for name, record in stats.modules.items() if not record.values]
    routed = {expert_peers(name) for name, record in stats.modules.items() if record.values}
    experts = [name for name in idle if expert_peers(name) in routed - {None}]
    return Unobserved(tuple(experts), tuple(name for name in idle if name not in set(experts)))


def kv_cache_scales(
    stats: CalibrationStats,
    *,
    per_head: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> dict[str, KVScales]:
    """The scales of each layer's keys and values, ``value = data * scale``.

    Args:
        stats: statistics that were collected with the KV cache.
        per_head: one scale for each head instead of one for the layer.
        dtype: of the cache: an FP8 dtype, or int8.

    Returns:
        Scales by the attention modules' names; checkpoints store those of a layer as
        ``k_scale`` and ``v_scale`` beside it.

    Raises:
        CalibrationError: the statistics have no KV cache.
    """
    check_choice("dtype", dtype, KV_DTYPES)
    if not stats.kv_cache:
        raise CalibrationError(
            "the statistics must include the KV cache, found none; calibrate a decoder without "
            "--no-kv-cache"
        )

    def scale(amax: list[float]) -> torch.Tensor:
        return kv_scale_of(torch.tensor(amax if per_head else [max(amax)]), dtype)

    return {
        name: KVScales(scale(record.key_amax), scale(record.value_amax))
        for name, record in stats.kv_cache.items()
    }


@dataclass(frozen=True)
class AmaxSeed:
    """What delayed scaling starts from, in both conventions by name.

    Attributes:
        amax_history: magnitudes of the newest calls, newest first, as TransformerEngine keeps
            them.
        scale: ours, ``value = data * scale``: the largest of the history over the format's.
        quantization_scale: its reciprocal counterpart, ``448 / amax``: what TransformerEngine
            calls ``scale``. Its ``scale_inv`` is our `scale`.
    """

    amax_history: tuple[float, ...]
    scale: float
    quantization_scale: float


def amax_seeds(
    stats: CalibrationStats, length: int = 1024, dtype: torch.dtype = torch.float8_e4m3fn
) -> dict[str, AmaxSeed]:
    """A warm start for delayed scaling, ours (`DelayedScaling.seed`) or TransformerEngine's.

    Args:
        stats: the statistics; fused layers get one history, the largest of each call.
        length: of the history at most.
        dtype: the FP8 dtype of the activations.
    """
    check_choice("dtype", dtype, FLOAT8_DTYPES)
    histories = {
        name: record.amax_history[::-1][:length]
        for name, record in stats.modules.items()
        if record.values
    }
    for group in fused_groups(histories):
        calls = min(len(histories[name]) for name in group)
        shared = [max(histories[name][call] for name in group) for call in range(calls)]
        histories.update(dict.fromkeys(group, shared))
    seeds = {}
    for name, history in histories.items():
        scale = _scale(max(history, default=0.0), dtype)
        largest = max(history, default=0.0)
        quantization = max_value(dtype) / largest if largest > 0 else 1.0
        seeds[name] = AmaxSeed(tuple(history), scale, quantization)
    return seeds


def _warn_of_clipping(stats: CalibrationStats, limits: dict[str, float], method: Method) -> None:
    """Say where a method cuts off outliers that are far above the rest: they often matter."""
    cut = [name for name, limit in limits.items() if stats.modules[name].amax > 64 * limit > 0]
    if cut:
        _log.warning(
            "method %s clips the inputs of %d layers to less than 1/64 of their largest value, "
            "such as %s (%.4g to %.4g); compare the layer's output both ways, or use one scale per "
            "token there",
            method,
            len(cut),
            cut[0],
            stats.modules[cut[0]].amax,
            limits[cut[0]],
        )


def _lend_to_idle_experts(stats: CalibrationStats, limits: dict[str, float]) -> None:
    largest: dict[str, float] = {}
    for name, limit in limits.items():
        peers = expert_peers(name)
        if peers is not None:
            largest[peers] = max(limit, largest.get(peers, 0.0))
    for name in unobserved(stats).experts:
        limits[name] = largest[expert_peers(name) or ""]


def _scale(amax: float, dtype: torch.dtype) -> float:
    return float(scale_of(torch.tensor(amax), dtype))
