"""The shapes that are timed: six weights of an earlier comparison, and twenty of real models.

Sizes of the models are those of their ``config.json``: a projection [N, K] has N outputs. "fused"
means that projections which read the same input are one weight, as inference engines hold them;
"1/8" is the share of one GPU of eight under tensor parallelism.
"""

from __future__ import annotations

from typing import NamedTuple


class Weight(NamedTuple):
    """One weight [N, K]: what it is, and whose."""

    n: int
    k: int
    name: str
    source: str


_LLAMA_8B = "meta-llama/Meta-Llama-3-8B: hidden 4096, inner 14336, 32 heads, 8 for keys"
_LLAMA_70B = "meta-llama/Meta-Llama-3-70B: hidden 8192, inner 28672, 64 heads, 8 for keys"
_QWEN_8B = "Qwen/Qwen3-8B: hidden 4096, inner 12288"
_QWEN_32B = "Qwen/Qwen3-32B: hidden 5120, inner 25600, 64 heads of 128, 8 for keys"
_DEEPSEEK = (
    "deepseek-ai/DeepSeek-V3: hidden 7168, inner 18432, of an expert 2048, q_lora_rank 1536, "
    "kv_lora_rank 512, 128 heads of 128 and 64 rotary"
)
_GPT_OSS = "openai/gpt-oss-20b: hidden 2880, 64 heads of 64, 8 for keys"
GRID = (
    Weight(7168, 2048, "DeepSeek-V3 shared expert, down", _DEEPSEEK),
    Weight(4096, 7168, "DeepSeek-V3 shared expert, gate and up fused", _DEEPSEEK),
    Weight(24576, 1536, "DeepSeek-V3 q_b", _DEEPSEEK),
    Weight(7168, 16384, "DeepSeek-V3 o", _DEEPSEEK),
    Weight(8192, 8192, "Llama-3 70B o", _LLAMA_70B),
    Weight(57344, 8192, "Llama-3 70B gate and up fused", _LLAMA_70B),
)
GRID_ROWS = (1, 16, 64, 256, 1024, 4096, 8192)

MODELS = (
    Weight(6144, 4096, "Llama-3 8B q, k, v fused", _LLAMA_8B),
    Weight(4096, 4096, "Llama-3 8B o", _LLAMA_8B),
    Weight(28672, 4096, "Llama-3 8B gate and up fused", _LLAMA_8B),
    Weight(4096, 14336, "Llama-3 8B down", _LLAMA_8B),
    Weight(10240, 8192, "Llama-3 70B q, k, v fused", _LLAMA_70B),
    Weight(8192, 28672, "Llama-3 70B down", _LLAMA_70B),
    Weight(1280, 8192, "Llama-3 70B q, k, v fused, 1/8", _LLAMA_70B),
    Weight(8192, 3584, "Llama-3 70B down, 1/8", _LLAMA_70B),
    Weight(24576, 4096, "Qwen3-8B gate and up fused", _QWEN_8B),
    Weight(4096, 12288, "Qwen3-8B down", _QWEN_8B),
    Weight(10240, 5120, "Qwen3-32B q, k, v fused", _QWEN_32B),
    Weight(5120, 8192, "Qwen3-32B o", _QWEN_32B),
    Weight(5120, 25600, "Qwen3-32B down", _QWEN_32B),
    Weight(1536, 7168, "DeepSeek-V3 q_a", _DEEPSEEK),
    Weight(576, 7168, "DeepSeek-V3 kv_a (N ragged by 128)", _DEEPSEEK),
    Weight(2112, 7168, "DeepSeek-V3 q_a and kv_a fused (N ragged by 128)", _DEEPSEEK),
    Weight(32768, 512, "DeepSeek-V3 kv_b", _DEEPSEEK),
    Weight(7168, 18432, "DeepSeek-V3 dense down", _DEEPSEEK),
    Weight(5120, 2880, "gpt-oss-20b q, k, v fused (K ragged by 128)", _GPT_OSS),
    Weight(2880, 4096, "gpt-oss-20b o (N ragged by 128)", _GPT_OSS),
)
MODEL_ROWS = (16, 256, 4096)

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
DECODE = (*GRID[:4], GRID[5])
"""The five weights of the decode targets."""

TINY = (
    Weight(128, 128, "rehearsal", "no model"),
    Weight(72, 144, "rehearsal, ragged", "no model"),
)
TINY_ROWS = (1, 130)
Point = tuple[int, Weight]


def points(grid: str, at_least: int = 1, at_most: int = 1 << 30) -> list[Point]:
    """(M, weight) of a grid ("grid", "models", "all" or "tiny") with M within bounds."""
    chosen: list[Point] = []
    if grid in ("grid", "all"):
        chosen += [(m, weight) for weight in GRID for m in GRID_ROWS]
    if grid in ("models", "all"):
        chosen += [(m, weight) for weight in MODELS for m in MODEL_ROWS]
    if grid == "tiny":
        chosen += [(m, weight) for weight in TINY for m in TINY_ROWS]
    return [(m, weight) for m, weight in chosen if at_least <= m <= at_most]
