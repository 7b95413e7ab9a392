"""The suites by name: module, what it measures, and the seconds that it may take."""

from __future__ import annotations

from typing import NamedTuple


class Suite(NamedTuple):
    """One suite.

    Attributes:
        module: has `points(session)`, and perhaps `summary(rows)`; or `main(path)` for its own way.
        summary: one line of help.
        seconds: its default budget; 0 for one that takes the time it takes.
        where: "gpu" (rehearsed on a CPU), "cpu", or "any".
    """

    module: str
    summary: str
    seconds: float = 0
    where: str = "gpu"


SUITES: dict[str, Suite] = {
    "hopper": Suite("bench.hopper", "our Gluon kernels, each in a watched child first", 300),
    "linear": Suite("bench.linear", "the whole linear, all backends, the automatic choice", 440),
    "gemm": Suite("bench.gemm", "the multiplication alone, M >= 256", 180),
    "decode": Suite("bench.decode", "the multiplication alone, M <= 64, cold and warm", 150),
    "quantise": Suite("bench.quantise", "quantisation against a copy; fused forms", 90),
    "gradient": Suite("bench.gradient", "dX from the FP8 weight against bf16 dY @ W", 90),
    "memory": Suite("bench.memory", "prepared layouts, peak memory forward and backward", 60),
    "compile": Suite("bench.compiled", "torch.compile and graph replay against eager", 100),
    "host": Suite("bench.host", "what a call keeps the host busy for", 120),
    "coldstart": Suite("bench.coldstart", "seconds to the first right result", 180),
    "experts": Suite("bench.experts", "expert matmuls, prefill and decode", 120),
    "experts_layer": Suite("bench.experts_layer", "a layer of experts, both ways", 150),
    "experts_numerics": Suite("bench.experts_numerics", "how right expert matmuls are", 120),
    "numerics": Suite("bench.numerics", "how right every backend is, over the matrix", 500),
    "import": Suite("bench.imports", "seconds and memory of the imports", 60, "any"),
    "calibration": Suite("bench.calibration", "outliers of a real model", 0, "cpu"),
    "kill": Suite("bench.kill", "packing killed at random moments", 0, "cpu"),
    "pack": Suite("bench.pack", "how fast packing is, in how much memory", 0, "cpu"),
    "pipeline": Suite("bench.pipeline", "real checkpoints through the pipeline", 0, "cpu"),
}
TOOLS: dict[str, tuple[str, str]] = {
    "plot": ("bench.plot", "RESULT.json ...: pictures beside each result"),
    "routes": ("bench.routes", "RESULT.json [--write]: routes from a result of `linear`"),
    "figures": ("bench.figures", "check every number of the README against bench/results"),
    "targets": ("bench.targets", "the project's targets, and which are reached"),
    "warm": ("bench.warm", "let DeepGEMM compile what the grids need, on all cores"),
    "sanitize": ("bench.sanitize", "[BACKEND]: each kernel once, under compute-sanitizer"),
}
"""What is no measurement: module with `main(arguments) -> exit code`, and its line of help."""
