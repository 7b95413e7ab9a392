"""What kind of failure an exception is: out of memory, a lost context, or the backend's own."""

from __future__ import annotations

from typing import Literal

_OUT_OF_MEMORY = (
    "out of memory",
    "cublas_status_alloc_failed",
    "cudaerrormemoryallocation",
    "cuda_error_out_of_memory",
    "hiperroroutofmemory",
)
# What CUDA says of errors that stay with the context, as text of the runtime and as its codes.
_STICKY_CODES = frozenset({214, 700, 702, 710, 714, 715, 716, 717, 718, 719, 720})
_STICKY = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction was encountered",
    "invalid program counter",
    "hardware stack error",
    "operation not supported on global/shared address space",
    "uncorrectable ecc error",
    "launch timed out and was terminated",
    "cublas_status_execution_failed",
    "cudaerrorillegaladdress",
    "cudaerrorlaunchfailure",
    "cudaerrorassert",
    "cuda_error_illegal_address",
    "cuda_error_launch_failed",
    "cuda_error_assert",
    "cuda_error_misaligned_address",
    "hiperrorillegaladdress",
    "hiperrorlaunchfailure",
)


def is_out_of_memory(error: BaseException) -> bool:
    """The error, or what it was raised from, says that memory of device or host ran out."""
    return any(
        isinstance(link, MemoryError)
        or any(kind.__name__ == "OutOfMemoryError" for kind in type(link).__mro__)
        or _says(link, _OUT_OF_MEMORY)
        for link in _chain(error)
    )


def is_sticky_cuda_error(error: BaseException) -> bool:
    """The error leaves the CUDA context unusable: every later call of the process fails."""
    return any(
        getattr(link, "error_code", None) in _STICKY_CODES or _says(link, _STICKY)
        for link in _chain(error)
    )


def describe_error(error: BaseException) -> str:
    """Kind and first line of an error, for a sentence."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"


def verdict_of_error(error: Exception) -> tuple[Literal["wrong", "untested"], str]:
    """What an exception in the canary says of the backend."""
    said = describe_error(error)
    if is_out_of_memory(error):
        return "untested", f"memory ran out, {said}"
    if isinstance(error, Warning):
        return "untested", f"a warning was made an error, {said}"
    if is_sticky_cuda_error(error):
        return "wrong", f"it lost the CUDA context, {said}"
    return "wrong", f"it raised {said}"


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__
    return links


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(word in text for word in words)
