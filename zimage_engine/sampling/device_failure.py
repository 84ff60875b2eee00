"""Tells a device that is lost from everything else that torch raises; knows no pipeline and no requests.

    with device_failures_named("cuda:0"):
        ...                       # a RuntimeError of a lost device comes out as DeviceFailed

After one of these the process' context on the device is spoilt: CUDA answers every further call with the same
error until the process ends, so nothing can be tried again in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from zimage_engine.errors import DeviceFailed


@dataclass(frozen=True, slots=True)
class FailureRow:
    """One way for a device to fail: the driver's own words, in torch's message, and what they mean."""

    phrase: str
    meaning: str


#: The strings of CUDA's runtime and driver (cudaGetErrorString) whose documentation says that the process
#: must be ended to go on, and those of a device or driver that is gone. What is not here, such as "out of
#: memory", "invalid argument" or "no kernel image is available", leaves the device as it was or is no better
#: elsewhere.
FAILURES = (
    FailureRow("unspecified launch failure", "a kernel ended in a fault"),
    FailureRow("an illegal memory access was encountered", "a kernel reached for memory that is not its own"),
    FailureRow("an illegal instruction was encountered", "a kernel met an instruction that there is not"),
    FailureRow("misaligned address", "a kernel used an address that is not aligned"),
    FailureRow("invalid program counter", "a kernel ran out of its program"),
    FailureRow(
        "operation not supported on global/shared address space", "a kernel used a wrong kind of memory"
    ),
    FailureRow("hardware stack error", "a kernel's stack was damaged"),
    FailureRow("the launch timed out and was terminated", "a kernel was stopped for taking too long"),
    FailureRow("device-side assert triggered", "a kernel stopped itself"),
    FailureRow("uncorrectable ECC error encountered", "the memory has an error that cannot be corrected"),
    FailureRow(
        "uncorrectable NVLink error", "the link between devices has an error that cannot be corrected"
    ),
    FailureRow("Invalid access of peer GPU memory over nvlink", "the link between devices failed"),
    FailureRow("driver shutting down", "the driver is going away"),
    FailureRow("context is destroyed", "the driver took the process' context away"),
    FailureRow("invalid device context", "the driver took the process' context away"),
    FailureRow("no CUDA-capable device is detected", "the device is no longer there"),
    FailureRow("is/are busy or unavailable", "the device does not take work"),
    FailureRow("system not yet initialized", "the system's link between devices is down"),
    FailureRow("initialization error", "the driver could not be started"),
    FailureRow("unknown error", "the driver does not know what happened"),
    FailureRow("GPU is lost", "the device fell off its bus"),
    # Of the libraries' own documentation (cublasStatus_t, cudnnStatus_t): a kernel could not be run on the
    # device. Their INTERNAL_ERROR is what a lack of memory looks like too, and is not here.
    FailureRow("CUBLAS_STATUS_EXECUTION_FAILED", "a kernel of cuBLAS failed"),
    FailureRow("CUDNN_STATUS_EXECUTION_FAILED", "a kernel of cuDNN failed"),
)

#: How torch begins what a device's library told it; the words above alone could be anybody's.
_BY_A_DEVICE = re.compile(
    r"\b(?:CUDA|HIP)(?: driver)? error\b|\bcuDNN(?: Frontend)? error\b|\bNVML\b|\bGPU is lost\b"
)


def failure_in(error: BaseException) -> FailureRow | None:
    """The row of a lost device's error; None for every other error, an out-of-memory among them."""
    if not isinstance(error, RuntimeError):  # torch.AcceleratorError is one
        return None
    text = str(error)
    if not _BY_A_DEVICE.search(text):
        return None
    return next((row for row in FAILURES if row.phrase in text), None)


def raise_if_failed(error: BaseException) -> None:
    """Raise `error` on where it is a lost device's: nothing that could be tried against it would help."""
    if failure_in(error) is not None:
        raise error


@contextmanager
def device_failures_named(device: str) -> Iterator[None]:
    """What is inside raises DeviceFailed, with a sentence, where `device` is lost."""
    try:
        yield
    except RuntimeError as error:
        row = failure_in(error)
        if row is None:
            raise
        raise DeviceFailed(
            f"{device} failed: {row.meaning} ({row.phrase}); this process can use it no more, so start the "
            "program again, and look at the device where that does not help"
        ) from error
