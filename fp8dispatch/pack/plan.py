"""`plan_checkpoint`: what packing would do to each tensor, where the result loads, and why not.

Only headers and JSON are read, so a plan takes seconds for any model. Whatever packing would fail
at is in `Plan.problems`, but for what only the weights themselves can show (NaN, infinity) and
what the output folder can (its content, the space on its disk).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fp8dispatch.errors import CheckpointError
from fp8dispatch.pack.calibration import Calibration, read_calibration
from fp8dispatch.pack.checkpoint import CONFIG, Checkpoint
from fp8dispatch.pack.experts import WeightSource, is_fused, split
from fp8dispatch.pack.jsonfiles import read_object
from fp8dispatch.pack.kvcache import KVPlan, plan_kv
from fp8dispatch.pack.layouts.contract import PackedModule
from fp8dispatch.pack.layouts.loadability import TARGETS, Verdict, verdicts
from fp8dispatch.pack.layouts.reading import quantization_block
from fp8dispatch.pack.layouts.sharding import fused_siblings
from fp8dispatch.pack.options import PackOptions, Resolved, resolve
from fp8dispatch.pack.packed import METADATA_FILES
from fp8dispatch.pack.planned import Kept, Plan, Weight, contents_of
from fp8dispatch.pack.policy import SUFFIX, LayerPolicy, looks_quantized
from fp8dispatch.pack.ragged import apply_ragged
from fp8dispatch.pack.scheme import Activations


def plan_checkpoint(
    source: str | os.PathLike[str],
    options: PackOptions | None = None,
    *,
    calibration: Calibration | None = None,
) -> Plan:
    """Decide for every tensor of a checkpoint, without reading one.

    Args:
        source: a ``.safetensors`` file, a model folder, or a folder of the hub's cache.
        options: what to do; None packs channel scales in the compressed-tensors format, which
            loads everywhere.
        calibration: scales, in place of the file that the options name.

    Returns:
        The plan; `Plan.problems` says why `pack_checkpoint` would fail.

    Raises:
        CheckpointError: a source that cannot be read.
        InvalidInputError: options that no choice takes.
    """
    resolved = resolve(options or PackOptions())
    asked = resolved.asked
    checkpoint = Checkpoint.open(source)
    if calibration is None and asked.calibration is not None:
        calibration = read_calibration(asked.calibration, resolved.scheme.dtype)
    problems = _source_problems(checkpoint)
    policy = LayerPolicy(
        checkpoint.config, asked.skip, asked.only, asked.keep_ends, checkpoint.tensors
    )
    if asked.keep_ends and not policy.ends.stacks:
        problems.append(
            f"{checkpoint.folder}: --keep-ends needs numbered layers, found no tensor of one "
            f"(layers.0, blocks.0, h.0); name the layers with --skip"
        )
    weights, kept = _select(checkpoint, resolved, policy, problems)
    problems += [
        f"--skip and --only must name layers of the model, found {pattern!r}, which matches none; "
        f"correct the name, or drop it"
        for pattern in policy.unused_patterns
    ]
    ragged = apply_ragged(
        {name: weight.module for name, weight in weights.items()},
        resolved,
        [one.module for one in kept if one.linear],
        checkpoint.config,
    )
    problems += ragged.problems
    kept += _skip_ragged(weights, ragged.skipped)
    for name, scheme in ragged.schemes.items():
        weights[name] = replace(weights[name], module=replace(weights[name].module, scheme=scheme))
    weights = _stored(weights, resolved, calibration, problems)
    kv = None
    if asked.kv_scales is not None:
        kv = plan_kv(asked.kv_scales, checkpoint, resolved.layout, calibration, problems)
    warnings = [*_warnings(resolved, calibration, weights)]
    found = _verdicts(weights, kept, resolved, checkpoint)
    problems += _contents_problems(checkpoint, resolved, weights, kept, kv, found)
    return Plan(
        checkpoint,
        resolved,
        weights,
        tuple(kept),
        tuple(dict.fromkeys(problems)),
        tuple(warnings),
        found,
        calibration,
        kv,
    )


def _source_problems(checkpoint: Checkpoint) -> list[str]:
    problems = []
    if checkpoint.config is None:
        problems.append(
            f"{checkpoint.folder}: a model needs {CONFIG} beside its weights, found none; put the "
            f"model's configuration there"
        )
    elif quantization_block(checkpoint.config, _metadata(checkpoint)) is not None:
        problems.append(
            f"{checkpoint.folder / CONFIG}: the source must be in high precision, found a "
            f"quantization_config in it or beside it; restore it first with fp8dispatch unpack, or "
            f"use fp8dispatch convert"
        )
    else:
        problems += [
            f"{checkpoint.folder / tensor.file}: tensor {tensor.name!r} must be in high precision, "
            f"found {tensor.dtype}; restore the checkpoint first with fp8dispatch unpack"
            for tensor in checkpoint.tensors.values()
            if looks_quantized(tensor)
        ]
    return problems


def _metadata(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The JSON files beside a configuration that say how a checkpoint is quantised."""
    files = dict(checkpoint.other_files())
    return {name: read_object(files[name]) for name in METADATA_FILES if name in files}


def _select(
    checkpoint: Checkpoint, resolved: Resolved, policy: LayerPolicy, problems: list[str]
) -> tuple[dict[str, Weight], list[Kept]]:
    """Which tensors are quantised, and why the others are not."""
    weights: dict[str, Weight] = {}
    kept: list[Kept] = []
    for tensor in checkpoint.tensors.values():
        if is_fused(tensor):
            reason = policy.skips(tensor.name.removesuffix(SUFFIX)) or policy.skips(tensor.name)
            if reason is None:
                try:
                    parts = split(tensor, policy.types, checkpoint.config)
                except CheckpointError as error:
                    problems.append(str(error))
                    parts = {}
                reason = "fused experts"
                for name, source in parts.items():
                    verdict = policy.judge(f"{name}{SUFFIX}", tensor.dtype, source.shape)
                    if verdict.reason is None:
                        module = PackedModule(name, source.shape, resolved.scheme)
                        weights[name] = Weight(module, source, tensor)
                    else:
                        reason = verdict.reason
                done = [name for name in parts if name in weights]
                if done and len(done) < len(parts):
                    problems.append(
                        f"{tensor.file}: tensor {tensor.name!r} must be quantised whole or not at "
                        f"all, found experts that --skip or --only leave out; name "
                        f"'{tensor.name}' itself"
                    )
                if done:
                    continue
            kept.append(Kept(tensor, reason, linear=True))
            continue
        verdict = policy.judge(tensor.name, tensor.dtype, tensor.shape)
        if verdict.reason is not None:
            kept.append(Kept(tensor, verdict.reason, verdict.linear))
            continue
        name = tensor.name.removesuffix(SUFFIX)
        module = PackedModule(name, (tensor.shape[0], tensor.shape[1]), resolved.scheme)
        weights[name] = Weight(module, WeightSource(tensor), tensor)
    return weights, kept


def _skip_ragged(weights: dict[str, Weight], skipped: Mapping[str, str]) -> list[Kept]:
    """Take ragged weights out again; of a fused tensor, all that came from it."""
    origins = {weights[name].origin.name: reason for name, reason in skipped.items()}
    kept: dict[str, Kept] = {}
    for name in list(weights):
        origin = weights[name].origin
        if origin.name in origins:
            del weights[name]
            kept[origin.name] = Kept(origin, origins[origin.name], linear=True)
    return list(kept.values())


def _stored(
    weights: Mapping[str, Weight],
    resolved: Resolved,
    calibration: Calibration | None,
    problems: list[str],
) -> dict[str, Weight]:
    """The weights with the tensors that will hold them, and their activation scales."""
    stored = {}
    for name, weight in weights.items():
        module = weight.module
        refusals = resolved.layout.refuse(module.scheme, module.shape)
        problems += [f"{_place(weight)}: {refusal}" for refusal in refusals]
        tensors = () if refusals else resolved.layout.tensors(name, module.scheme, module.shape)
        scale = None
        if module.scheme.activations is Activations.STATIC:
            scale = _activation_scale(weight, calibration, problems)
        history = () if calibration is None else calibration.amax_history.get(name, ())
        module = replace(module, tensors=tensors, amax_history=history)
        stored[name] = replace(weight, module=module, activation_scale=scale)
    return stored


def _activation_scale(
    weight: Weight, calibration: Calibration | None, problems: list[str]
) -> float | None:
    """The scale of a layer's input: the largest of the layers that it is fused with."""
    name = weight.module.name
    if calibration is None:
        problems.append(
            "static activations need calibrated scales, found no calibration; run fp8dispatch "
            "calibrate and pass its file with --calibration, or use the recipe channel"
        )
        return None
    scales = calibration.activation_scales
    found = [scales[one] for one in (*fused_siblings(name), name) if one in scales]
    if name not in scales:
        problems.append(
            f"{_place(weight)}: a static activation scale is needed, found none in the "
            f"calibration; calibrate this model, or leave the layer out with --skip {name}"
        )
        return None
    return max(found)


def _verdicts(
    weights: Mapping[str, Weight], kept: list[Kept], resolved: Resolved, checkpoint: Checkpoint
) -> tuple[Verdict, ...]:
    contents = contents_of(weights, kept)
    return verdicts(
        resolved.layout.name,
        contents.modules,
        contents.skipped,
        TARGETS,
        resolved.asked.tp,
        checkpoint.config,
    )


def _contents_problems(
    checkpoint: Checkpoint,
    resolved: Resolved,
    weights: Mapping[str, Weight],
    kept: list[Kept],
    kv: KVPlan | None,
    found: tuple[Verdict, ...],
) -> list[str]:
    """What stands against the result as a whole."""
    problems = []
    if not weights:
        problems.append(
            f"{checkpoint.folder}: at least one weight must be quantised, found none among "
            f"{len(checkpoint.tensors)} tensors; see the reasons, and --skip and --only"
        )
    problems += resolved.layout.refuse_contents(contents_of(weights, kept, kv))
    problems += _collisions(checkpoint, weights, kept, kv)
    if resolved.asked.target is not None:
        problems += [
            f"{_place(weights[verdict.module])}: it must load in {verdict.target}, found that "
            f"{verdict.reason}; use --skip {verdict.module}, another --recipe or --format"
            for verdict in found
            if verdict.target == resolved.asked.target and not verdict.loads
        ]
    return problems


def _collisions(
    checkpoint: Checkpoint, weights: Mapping[str, Weight], kept: list[Kept], kv: KVPlan | None
) -> list[str]:
    """Tensors of the result that would have one name."""
    names = {one.tensor.name: one.tensor.file for one in kept}
    wanted = [
        (tensor.name, weight.origin.file, f"quantising {weight.module.name}")
        for weight in weights.values()
        for tensor in weight.module.tensors
    ]
    if kv is not None:
        wanted += [(one.stored.name, one.file, "the KV cache's scales") for one in kv.tensors]
    problems = []
    for name, file, cause in wanted:
        if name in names:
            problems.append(
                f"{checkpoint.folder / names[name]}: the name {name!r} is needed for {cause}, "
                f"found a tensor of that name; rename it, or leave the layer out with --skip"
            )
        names[name] = file
    return problems


def _warnings(
    resolved: Resolved, calibration: Calibration | None, weights: Mapping[str, Weight]
) -> list[str]:
    warnings = [resolved.layout.warning] if resolved.layout.warning else []
    if any(weight.origin.name != f"{name}{SUFFIX}" for name, weight in weights.items()):
        warnings.append(
            "fused experts are written as one weight for each expert; no loader but fp8dispatch "
            "was tried with these names"
        )
    if calibration is not None:
        watched = [
            name for name, ratio in calibration.saturation.items() if ratio > 64 and name in weights
        ]
        static = resolved.scheme.activations is Activations.STATIC
        if watched and static:
            warnings.append(
                f"{len(watched)} layers have inputs whose largest value is more than 64 times the "
                f"99.9th percentile ({', '.join(watched[:3])}): a static scale harms them; use the "
                f"recipe channel, or --skip them"
            )
    return warnings


def _place(weight: Weight) -> str:
    n, k = weight.module.shape
    return f"{weight.origin.file}: {weight.module.name}.weight [{n}, {k}]"
