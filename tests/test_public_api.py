"""The public surface: its names, their signatures and words, and what importing them costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

import fp8dispatch

NAMES = [
    "Accuracy",
    "AmbiguousRecipeError",
    "Assessment",
    "BackendUnavailableError",
    "CalibrationError",
    "CalibrationStats",
    "Calibrator",
    "CheckpointError",
    "ConfigurationError",
    "ConversionReport",
    "DTypeError",
    "Decision",
    "DelayedScaling",
    "DeviceError",
    "ExpertActivation",
    "FP8BlockQuantLinear",
    "FP8DispatchError",
    "FP8Experts",
    "FP8Format",
    "FP8Linear",
    "FbgemmFp8Linear_matmul",
    "FrozenWeightError",
    "Granularity",
    "InvalidInputError",
    "KVCacheQuantizer",
    "KVScales",
    "LinearProblem",
    "NumericalOverflowError",
    "PackOptions",
    "QuantizedActivation",
    "Recipe",
    "Refusal",
    "ScaleValueError",
    "ShapeError",
    "Standing",
    "TuningReport",
    "UnknownBackendError",
    "UnsupportedTransformError",
    "WarmedLayer",
    "__version__",
    "act_quant",
    "activation_scales",
    "convert",
    "convert_model",
    "dequantize",
    "dequantize_experts",
    "explain",
    "explain_experts",
    "fbgemm_fp8_linear",
    "fp8_act_quant",
    "fp8_block_quant_linear",
    "fp8_experts_batched",
    "fp8_experts_grouped",
    "fp8_linear",
    "fp8_linear_quantized",
    "inspect",
    "invalidate",
    "kv_cache_scales",
    "load",
    "pack_checkpoint",
    "pack_to_fp8_e4m3",
    "plan_checkpoint",
    "quantize",
    "quantize_experts",
    "reload_environment",
    "rms_norm_linear",
    "rms_norm_quantize",
    "set_backend",
    "silu_mul_linear",
    "silu_mul_quantize",
    "stats",
    "tune",
    "unpack",
    "use_backend",
    "verify",
    "w8a8_block_fp8_matmul",
    "w8a8_block_fp8_matmul_batched",
    "w8a8_block_fp8_matmul_grouped",
    "w8a8_block_fp8_matmul_triton",
    "warmup",
    "weight_dequant",
]

# Name -> its parameters as the issue and the seeds write them; "=" where there is a default,
# "*" before what is keyword-only.
SIGNATURES = {
    "fp8_linear": "X weight weight_scale bias=None * block_size=None activation_scale=None "
    "out_dtype=None backend=None",
    "fp8_linear_quantized": "X weight weight_scale bias=None * block_size=None "
    "out_dtype=torch.bfloat16 backend=None",
    "act_quant": "x block_size=128",
    "fp8_act_quant": "x block_size=128",
    "weight_dequant": "x s dtype=torch.bfloat16 block_size=None",
    "w8a8_block_fp8_matmul_triton": "A B As Bs block_size output_dtype=torch.float32",
    "w8a8_block_fp8_matmul_batched": "A B Bs expert_ids block_size",
    "w8a8_block_fp8_matmul_grouped": "A B Bs offsets tokens_per_expert block_size",
    "quantize_experts": "tensor recipe=block 128x128 * block_size=None dtype=torch.float8_e4m3fn "
    "scale_dtype=torch.float32",
    "dequantize_experts": "data scale * block_size=None dtype=torch.bfloat16",
    "w8a8_block_fp8_matmul": "A B As Bs block_size output_dtype=torch.float32",
    "fp8_block_quant_linear": "X weight weight_scale",
    "fbgemm_fp8_linear": "X weight weight_scale bias=None",
    "FP8BlockQuantLinear.apply": "X weight weight_scale",
    "FbgemmFp8Linear_matmul.apply": "x weight weight_scale bias=None",
    "quantize": "tensor recipe=block 128x128 * block_size=None dtype=torch.float8_e4m3fn "
    "scale_dtype=torch.float32 nonfinite=raise",
    "dequantize": "data scale * block_size=None dtype=torch.bfloat16",
    "convert_model": "model recipe=block 128x128 * skip=('lm_head',) block_size=None "
    "dtype=torch.float8_e4m3fn scale_dtype=torch.float32 activation_scales=None backend=None",
    "activation_scales": "stats method=None * percentile=None dtype=torch.float8_e4m3fn "
    "allow_incomplete=False",
    "kv_cache_scales": "stats * per_head=False dtype=torch.float8_e4m3fn",
    "QuantizedActivation": "data scale",
    "invalidate": "*tensors",
    "pack_to_fp8_e4m3": "x group=64",
    "reload_environment": "",
}

HEAVY = (
    "torch",
    "triton",
    "numpy",
    "pydantic",
    "pynvml",
    "transformers",
    "safetensors",
    "rich",
    "packaging",
    "fp8dispatch.linear",
)


def public(name: str) -> Any:
    """A public object; "Class.method" is a method of one."""
    found = fp8dispatch
    for part in name.split("."):
        found = getattr(found, part)
    return found


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, without the variables that this process has or got."""
    ours = ("FP8DISPATCH_", "TRITON_INTERPRET")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**clean, **environment},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_all_is_exact_and_sorted() -> None:
    assert fp8dispatch.__all__ == NAMES
    assert sorted(NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves_to_its_own(name: str) -> None:
    found = getattr(fp8dispatch, name)

    if name != "__version__":
        assert found.__name__ == name
        assert found.__module__.startswith("fp8dispatch.")
    assert vars(fp8dispatch)[name] is found, "resolved once, then an ordinary attribute"


def test_dir_lists_every_name_before_it_is_loaded() -> None:
    assert set(NAMES) <= set(dir(fp8dispatch))
    listed = run("import fp8dispatch; print(*dir(fp8dispatch))").split()
    assert set(NAMES) <= set(listed)
    assert listed == sorted(listed)


def test_what_type_checkers_see_is_what_is_loaded() -> None:
    tree = ast.parse(inspect.getsource(fp8dispatch))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    pairs = {
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = fp8dispatch._HOMES.items()
    assert pairs == {(f"fp8dispatch.{home}", name) for home, names in homes for name in names}
    assert {name for _, name in pairs} | {"__version__"} == set(NAMES)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fp8dispatch' has no attribute 'fp8_lineer'"):
        _ = fp8dispatch.fp8_lineer
    assert not hasattr(fp8dispatch, "_nothing")
    with pytest.raises(ImportError):
        exec("from fp8dispatch import fp8_lineer")


def test_version_is_the_one_that_the_package_is_built_with() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", fp8dispatch.__version__)
    assert f'__version__ = "{fp8dispatch.__version__}"' in inspect.getsource(fp8dispatch)


@pytest.mark.parametrize("touch", ["", "; fp8dispatch.__version__; dir(fp8dispatch)"])
def test_import_loads_nothing_heavy(touch: str) -> None:
    loaded = run(f"import sys, fp8dispatch{touch}; print(*sys.modules)").split()

    assert "fp8dispatch" in loaded
    assert not set(HEAVY) & set(loaded)


def test_first_touch_loads_torch_and_no_kernel() -> None:
    loaded = run("import sys, fp8dispatch; fp8dispatch.fp8_linear; print(*sys.modules)").split()

    assert {"torch", "fp8dispatch.linear"} <= set(loaded)
    assert not {"triton", "transformers", "fp8dispatch.backends.triton"} & set(loaded)


def test_errors_are_there_without_torch() -> None:
    loaded = run("import sys; from fp8dispatch import ShapeError, Recipe; print(*sys.modules)")

    assert "torch" not in loaded.split()


CALL = """
    import sys, torch, fp8dispatch
    weight, scale = fp8dispatch.quantize(torch.randn(8, 16))
    x = torch.randn(2, 16, requires_grad=True)
    out = fp8dispatch.fp8_linear(x, weight, scale)
    out.sum().backward()
    assert out.shape == (2, 8) and x.grad is not None
"""


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_first_call_on_the_cpu_imports_no_triton_and_starts_no_cuda(interpret: str) -> None:
    code = CALL + "    print('triton' in sys.modules, torch.cuda.is_initialized())"

    assert run(code, TRITON_INTERPRET=interpret) == "False False"


def test_import_reads_no_environment_and_a_call_writes_none() -> None:
    assert run("from fp8dispatch import fp8_linear", FP8DISPATCH_BACKEND="nonsense") == ""

    before, after = "import os; before = dict(os.environ)", "print(dict(os.environ) == before)"
    assert run("\n".join([before, textwrap.dedent(CALL), after])) == "True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("first", ["fp8dispatch.__version__", "fp8dispatch.fp8_linear", "call()"])
def test_works_after_fork(first: str) -> None:
    """In the child of a process that has imported, touched or called it, as data loaders fork."""
    code = f"""
    import os, warnings, fp8dispatch
    warnings.simplefilter("ignore")  # of fork beside torch's threads, on newer Pythons

    def call():
        import torch
        torch.set_num_threads(1)
        weight, scale = fp8dispatch.quantize(torch.ones(8, 16))
        return fp8dispatch.fp8_linear(torch.ones(2, 16), weight, scale).sum().item()

    {first}
    child = os.fork()
    if child == 0:
        os._exit(0 if abs(call() - 256) < 1 else 3)
    print(os.waitpid(child, 0)[1], abs(call() - 256) < 1)
    """
    assert run(code) == "0 True"


def test_names_stay_after_every_module_is_imported() -> None:
    """`fp8dispatch.quantize` is the function, not a submodule that an import puts in its place."""
    code = """
    import importlib, pkgutil, types, fp8dispatch
    assert callable(fp8dispatch.quantize)
    for module in pkgutil.walk_packages(fp8dispatch.__path__, "fp8dispatch."):
        if "__main__" not in module.name and not module.name.startswith("fp8dispatch.kernels."):
            importlib.import_module(module.name)
    names = [name for name in fp8dispatch.__all__ if name != "__version__"]
    print([n for n in names if isinstance(getattr(fp8dispatch, n), types.ModuleType)])
    """
    assert run(code) == "[]"
    submodules = {module.name for module in pkgutil.iter_modules(fp8dispatch.__path__)}
    assert not submodules & set(NAMES)


@pytest.mark.parametrize(
    "package",
    [
        "backends",
        "backends.compute",
        "calibrate",
        "integrations",
        "kernels",
        "offset8",
        "probes",
        "quantization",
        "tuning",
    ],
)
def test_each_folder_says_what_belongs_there(package: str) -> None:
    module = importlib.import_module(f"fp8dispatch.{package}")

    assert len(inspect.getdoc(module) or "") > 80


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_kept_to_the_letter(name: str) -> None:
    words: list[str] = []
    for parameter in inspect.signature(public(name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        words.append(f"{star}{parameter.name}{default}")

    assert " ".join(words) == SIGNATURES[name]


FUNCTIONS = [n for n in NAMES if n[0].islower()] + [
    "QuantizedActivation.from_tensor",
    "Recipe.parse",
]
METHODS = ["FP8Linear.from_linear", "FP8Linear.from_tensors", "FP8Linear.forward"]


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_functions_are_annotated_and_described(name: str) -> None:
    function = public(name)
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)

    assert text.split("\n")[0].endswith("."), "the first line is a sentence"
    assert signature.return_annotation is not signature.empty
    for parameter in signature.parameters.values():
        assert parameter.name == "self" or parameter.annotation is not parameter.empty


def undescribed(name: str) -> list[str]:
    """The parameters that a docstring names neither in a list, ``a, b: ...``, nor in `quotes`."""
    text = inspect.getdoc(public(name)) or ""
    pattern = r"^ +(?:\w+, )*{0}(?:, \w+)*: |`{0}`|`{0}=`"
    names = inspect.signature(public(name)).parameters
    return [n for n in names if not re.search(pattern.format(n), text, re.MULTILINE)]


# Other projects' names for our functions, which point to those; and `explain`, which takes what
# `fp8_linear` takes and says so.
ALIASES = ["fp8_block_quant_linear", "fbgemm_fp8_linear", "explain"]
# Parameters that a docstring does not name yet.


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described(name: str) -> None:
    if name in ALIASES:
        assert "`fp8_linear`" in (inspect.getdoc(public(name)) or "")
    else:
        assert undescribed(name) == []


@pytest.mark.parametrize(
    "name", ["fp8_linear", "fp8_linear_quantized", "quantize", "convert_model"]
)
def test_result_and_errors_are_described(name: str) -> None:
    text = inspect.getdoc(public(name)) or ""

    assert re.search(r"\n\nReturns:\n +\S", text)
    assert re.search(r"\n\nRaises:\n +(\w+Error|The errors of)", text)


@pytest.mark.parametrize("name", [n for n in NAMES if n[0].isupper()])
def test_classes_are_described(name: str) -> None:
    cls = public(name)
    text = inspect.getdoc(cls) or ""

    assert re.match(r"\S.*[.)]$", text.split("\n")[0]), text
    for field in (one.name for one in fields(cls)) if is_dataclass(cls) else ():
        assert re.search(rf"^ +(\w+, )*{field}(, \w+)*: ", text, re.MULTILINE), field
