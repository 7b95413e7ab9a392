"""Where a packed model will load: Transformers, vLLM, or here; for each module, with the reason.

The rules were read in the sources of Transformers 5.23 and vLLM 0.33, and those for Transformers
on a CPU were run. Where a case was neither read nor run, the verdict is that it does not load.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fp8dispatch.errors import InvalidInputError
from fp8dispatch.pack.layouts.contract import PackedModule
from fp8dispatch.pack.layouts.sharding import Heads, fused_siblings, per_rank, split_of
from fp8dispatch.pack.scheme import Activations, Scheme
from fp8dispatch.recipe import Granularity, ceil_div

TARGETS = ("transformers", "vllm", "here")


@dataclass(frozen=True)
class Verdict:
    """Whether a module of a packed model loads somewhere.

    Attributes:
        target: one of `TARGETS`.
        module: full module name.
        loads: whether it loads and computes the right numbers.
        reason: why not; or what it takes, when it loads under a condition; else empty.
    """

    target: str
    module: str
    loads: bool
    reason: str = ""


def verdicts(
    layout: str,
    modules: Mapping[str, PackedModule],
    skipped: Collection[str],
    targets: Collection[str] = TARGETS,
    tp: int = 1,
    config: Mapping[str, Any] | None = None,
) -> tuple[Verdict, ...]:
    """A verdict for each module and target.

    Args:
        layout: name of the format that is, or would be, written.
        modules: the quantised modules by name.
        skipped: full names of the linear modules that are not quantised.
        targets: some of `TARGETS`.
        tp: ranks of tensor parallelism, for vLLM.
        config: the model's ``config.json``, for the number of KV heads; None where unknown.

    Raises:
        InvalidInputError: an unknown target, or `tp` below 1.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or tp < 1:
        raise InvalidInputError(
            f"targets must be some of {', '.join(TARGETS)} and tp at least 1, found "
            f"{', '.join(unknown) or f'tp={tp}'}"
        )
    skips, heads = set(skipped), Heads.of(config)
    found = []
    for target in targets:
        for name, module in modules.items():
            if target == "transformers":
                problems = list(_transformers(layout, module))
                remark = _transformers_remark(layout, module.scheme)
            elif target == "vllm":
                problems = list(_vllm(layout, module, modules, skips, tp, heads))
                remark = _vllm_remark(layout, module.scheme)
            else:
                problems, remark = [], _here_remark(name)
            found.append(Verdict(target, name, not problems, "; ".join(problems) or remark))
    return tuple(found)


def _transformers(layout: str, module: PackedModule) -> Iterator[str]:
    """What keeps Transformers from loading a module, sentence by sentence."""
    n, k = module.shape
    block = module.scheme.recipe.block_size
    if layout == "native":
        yield "Transformers does not know the native format"
    elif layout == "modelopt":
        yield "Transformers does not know modelopt and takes the codes for values, without an error"
    elif layout == "hf" and block is None:
        if not module.tensors or module.tensors[1].name.endswith("weight_scale"):
            yield "Transformers reads per-tensor scales under the name weight_scale_inv only"
    elif layout == "hf" and block is not None:
        # It takes rows // scale_rows for the block's height, whatever the configuration says.
        for dimension, size, wanted in (("N", n, block[0]), ("K", k, block[1])):
            count = ceil_div(size, wanted)
            if size % count:
                yield (
                    f"{dimension} = {size} is no multiple of {wanted}, and Transformers fails on "
                    f"{count} scales for it"
                )
            elif count > 1 and size // count != wanted:
                yield (
                    f"{dimension} = {size} is no multiple of {wanted}, and Transformers reads "
                    f"blocks of {size // count} from {count} scales: wrong numbers without an error"
                )
    elif layout == "compressed-tensors" and block is not None and k % block[1]:
        yield (
            f"K = {k} is no multiple of {block[1]}, and compressed-tensors fails when it groups "
            f"the activations"
        )


def _here_remark(name: str) -> str:
    if ".experts." in name:
        return "becomes part of FP8Experts where the model stacks its experts"
    return ""


def _transformers_remark(layout: str, scheme: Scheme) -> str:
    if layout == "fbgemm":
        return "needs a GPU of compute capability 9.0 and the package fbgemm-gpu-genai"
    if layout == "compressed-tensors" and scheme.e8m0:
        return "needs dtype=torch.bfloat16 on a CPU"
    return ""


def _vllm(
    layout: str,
    module: PackedModule,
    modules: Mapping[str, PackedModule],
    skipped: set[str],
    tp: int,
    heads: Heads | None,
) -> Iterator[str]:
    """What keeps vLLM from loading a module, sentence by sentence."""
    scheme = module.scheme
    if layout == "native":
        yield "vLLM does not know the native format"
        return
    if scheme.dtype != "float8_e4m3fn":
        yield f"vLLM reads float8_e4m3fn weights, found {scheme.dtype}"
    if layout == "compressed-tensors" and scheme.group_size is not None and not scheme.e8m0:
        yield f"vLLM has no FP8 weights in groups of {scheme.group_size}: tensor, channel or block"
    if (
        layout == "compressed-tensors"
        and scheme.activations is Activations.NONE
        and (scheme.recipe.granularity is Granularity.BLOCK)
    ):
        yield "vLLM takes weight-only FP8 per tensor or channel, found blocks"
    if (
        layout == "hf"
        and scheme.recipe.block_size is None
        and (module.tensors and module.tensors[1].name.endswith("weight_scale_inv"))
    ):
        yield "vLLM reads per-tensor scales under the name weight_scale only"
    yield from _fusion(module, modules, skipped)
    part = per_rank(module.name, module.shape, tp, heads)
    if part is None:
        n, k = module.shape
        how = split_of(module.name)
        yield f"[{n}, {k}] cannot be split evenly over {tp} ranks ({how} parallel)"
        return
    block = scheme.recipe.block_size
    if block is None:
        return
    yield from _block_edges(module, part, block, modules, tp)


def _fusion(
    module: PackedModule, modules: Mapping[str, PackedModule], skipped: set[str]
) -> Iterator[str]:
    """Layers that vLLM multiplies as one must all be quantised, and alike."""
    siblings = fused_siblings(module.name)
    left = [name for name in siblings if name in skipped and name not in modules]
    if left:
        yield f"vLLM fuses it with {', '.join(left)}, which is not quantised: quantise all or none"
    other = {
        str(modules[name].scheme)
        for name in siblings
        if name in modules and modules[name].scheme != module.scheme
    }
    if other:
        yield f"vLLM fuses it with a layer of another scheme ({', '.join(sorted(other))})"


def _block_edges(
    module: PackedModule,
    part: tuple[int, int],
    block: tuple[int, int],
    modules: Mapping[str, PackedModule],
    tp: int,
) -> Iterator[str]:
    """A rank's part must consist of whole blocks wherever the weight is cut or joined."""
    n, k = part
    ranks = f" on each of {tp} ranks" if tp > 1 else ""
    if k % block[1]:
        yield f"K = {k}{ranks} is no multiple of {block[1]}, and vLLM groups activations by that"
    siblings = [name for name in fused_siblings(module.name) if name in modules]
    last = not siblings or siblings[-1] == module.name
    cut = tp > 1 and split_of(module.name) == "column"
    expert = ".experts." in module.name
    if n % block[0] and (cut or expert or not last):
        why = "experts need whole blocks" if expert else "it is cut or joined there"
        yield f"N = {n}{ranks} is no multiple of {block[0]}, and {why}"


def _vllm_remark(layout: str, scheme: Scheme) -> str:
    if layout == "fbgemm":
        return "needs --allow-deprecated-quantization"
    if scheme.group_size is not None and scheme.e8m0:
        return "needs a vLLM that reads MXFP8"
    if layout == "modelopt" and scheme.recipe.granularity is Granularity.ROW:
        return "FP8_PER_CHANNEL_PER_TOKEN was read in ModelOpt's export, not run in vLLM"
    return ""
