"""Checks of single arguments: kind, layout, dtype, device, size. Each raises one sentence."""

from __future__ import annotations

from numbers import Integral

import torch
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fp8dispatch.errors import DeviceError, DTypeError, ShapeError, UnsupportedTransformError
from fp8dispatch.formats import ACTIVATION_DTYPES, FLOAT8_DTYPES, SCALE_DTYPES, dtype_name

VMAP_REFUSED = (
    "fp8_linear does not run under torch.func.vmap, nor do its gradients in batches; X takes any "
    "leading shape, so pass the batch as a leading dimension"
)


def is_traced(first: torch.Tensor, second: torch.Tensor) -> bool:
    """A compiler records the call, or tensors without values stand in for real ones.

    The call must then be one of the operators of `fp8dispatch.ops`.
    """
    # `type`, not `isinstance`: every eager call asks, and the metaclass of Parameter is slow.
    return is_compiling() or type(first) is FakeTensor or type(second) is FakeTensor


def check_dense(name: str, tensor: object) -> None:
    """A plain, dense tensor whose memory a kernel can read.

    Raises:
        DTypeError: not a tensor, sparse, nested, quantized or distributed.
    """
    if not isinstance(tensor, torch.Tensor):
        raise DTypeError(f"{name} must be a torch.Tensor, found {type(tensor).__name__}")
    if tensor.is_nested:
        raise DTypeError(f"{name} must be one dense tensor, found a nested one; pad or split it")
    if tensor.layout is not torch.strided:
        raise DTypeError(
            f"{name} must be dense (torch.strided), found {tensor.layout}; pass {name}.to_dense()"
        )
    if tensor.is_quantized:
        raise DTypeError(
            f"{name} must be a plain tensor, found a quantized one ({tensor.dtype}); pass "
            f"{name}.dequantize()"
        )
    if hasattr(tensor, "to_local"):
        raise DTypeError(
            f"{name} must be a local tensor, found {type(tensor).__name__}; pass {name}.to_local()"
        )


def check_dtype(
    name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...], remedy: str
) -> None:
    """A tensor of one of the allowed dtypes; `remedy` ends the sentence otherwise.

    Raises:
        DTypeError: another dtype.
    """
    if tensor.dtype not in allowed:
        raise DTypeError(
            f"{name} must be {'one of ' if len(allowed) > 1 else ''}{names_of(allowed)}, found "
            f"{dtype_name(tensor.dtype)}; {remedy}"
        )


def check_device(name: str, tensor: torch.Tensor, reference: torch.Tensor) -> None:
    """Both tensors on one device.

    Raises:
        DeviceError: two devices.
    """
    if tensor.device != reference.device:
        raise DeviceError(
            f"{name} must be on the weight's device {reference.device}, found {tensor.device}; "
            f"move it with .to()"
        )


def check_choice(name: str, value: object, allowed: tuple[torch.dtype, ...]) -> None:
    """A dtype out of the allowed ones.

    Raises:
        DTypeError: another dtype, or no dtype at all.
    """
    if value not in allowed:
        raise DTypeError(f"{name} must be one of torch.{names_of(allowed)}, found {value!r}")


def check_size(name: str, value: object) -> None:
    """A positive integer.

    Raises:
        DTypeError: not an integer.
        ShapeError: below 1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise DTypeError(f"{name} must be a positive integer, found {value!r}")
    if int(value) < 1:
        raise ShapeError(f"{name} must be a positive integer, found {value}")


def check_activations(name: str, x: torch.Tensor) -> None:
    """Activations [..., K] of a float dtype, K at least 1.

    Raises:
        DTypeError, ShapeError: what is wrong.
    """
    check_dense(name, x)
    remedy = f"convert it with {name}.to(torch.bfloat16)"
    if x.dtype in FLOAT8_DTYPES:
        remedy = "FP8 activations go to fp8_linear_quantized, with their scales"
    check_dtype(name, x, ACTIVATION_DTYPES, remedy)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(
            f"{name} must be [..., K] with at least one column, found {list(x.shape)}; "
            f"give every row the weight's K values"
        )


def check_bias(bias: torch.Tensor | None, n: int, weight: torch.Tensor) -> None:
    """A bias [N] of a float dtype on the weight's device, or None.

    Raises:
        DTypeError, ShapeError, DeviceError: what is wrong.
    """
    if bias is None:
        return
    check_dense("bias", bias)
    check_dtype("bias", bias, ACTIVATION_DTYPES, "convert it with bias.to(torch.float32)")
    if tuple(bias.shape) != (n,):
        raise ShapeError(
            f"bias must be [{n}], one value per row of the weight, found {list(bias.shape)}"
        )
    check_device("bias", bias, weight)


def check_activation_scale(
    scale: torch.Tensor | None, weight: torch.Tensor, name: str = "activation_scale"
) -> None:
    """A static activation scale of one element on the weight's device, or None.

    Raises:
        DTypeError, ShapeError, DeviceError: what is wrong.
    """
    if scale is None:
        return
    check_dense(name, scale)
    check_dtype(name, scale, SCALE_DTYPES, f"convert it with {name}.to(torch.float32)")
    if scale.numel() != 1:
        raise ShapeError(
            f"{name} must have one element for all activations, found {list(scale.shape)}; leave "
            f"it out for scales computed per token"
        )
    check_device(name, scale, weight)


def check_out_dtype(out_dtype: object) -> None:
    """One of the three output dtypes, or None.

    Raises:
        DTypeError: anything else.
    """
    if out_dtype is not None:
        check_choice("out_dtype", out_dtype, ACTIVATION_DTYPES)


def check_transforms(*tensors: torch.Tensor | None) -> None:
    """Refuse torch.func.vmap, forward-mode and higher-order differentiation of any argument.

    vmap would batch tensors that kernels cannot see into, forward mode would differentiate the
    rounding to FP8, and the gradient is not differentiable itself. Not for calls that `is_traced`:
    the operators of `fp8dispatch.ops` refuse the same by themselves.

    Raises:
        UnsupportedTransformError: either is active on one of the tensors.
    """
    forward_mode = forward_ad._current_level >= 0
    if not forward_mode and peek_interpreter_stack() is None:
        return
    transforms = torch._C._functorch.get_interpreter_stack()
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            continue
        unwrapped(tensor)
        if forward_mode and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise UnsupportedTransformError(
                "fp8_linear does not run in forward-mode differentiation (torch.func.jvp, dual "
                "tensors); use reverse mode: backward() or torch.func.grad"
            )
    if transforms is not None and len(transforms) > 1:
        raise UnsupportedTransformError(
            f"fp8_linear runs under a single torch.func.grad, found {len(transforms)} transforms "
            f"inside each other; its gradient has no gradient"
        )


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside the wrappers that torch.func.grad puts around it.

    Raises:
        UnsupportedTransformError: one of the wrappers is a batch of torch.func.vmap.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            raise UnsupportedTransformError(VMAP_REFUSED)
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    """``"bfloat16, float16, float32"``."""
    return ", ".join(dtype_name(dtype) for dtype in dtypes)
