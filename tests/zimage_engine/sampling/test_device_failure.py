"""A lost device is known by the driver's words, is tried no more, and is never taken for something else."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zimage_engine import Engine, GenerationRequest
from zimage_engine.errors import DeviceFailed
from zimage_engine.sampling.device_failure import FAILURES, failure_in

ASKED = GenerationRequest("a red circle", seed=1, num_inference_steps=3, guidance_scale=1.0, enhance=False)

#: As torch puts what a call of CUDA's runtime answered.
LAUNCH_FAILURE = (
    "CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure' in "
    "https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below "
    "might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(LAUNCH_FAILURE),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        torch.AcceleratorError("CUDA error: driver shutting down"),
        torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        RuntimeError("CUDA driver error: unknown error"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa )`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
    ids=str,
)
def test_a_lost_device_is_known(error: RuntimeError) -> None:
    assert failure_in(error) is not None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.AcceleratorError("CUDA error: invalid argument"),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("unknown error"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasCreate(handle)`"),
        ValueError("CUDA error: unspecified launch failure"),
    ],
    ids=str,
)
def test_nothing_else_is_taken_for_one(error: Exception) -> None:
    assert failure_in(error) is None


def test_no_row_is_within_another() -> None:
    phrases = [row.phrase for row in FAILURES]
    assert [one for one in phrases for other in phrases if one is not other and one in other] == []


class _Failing:
    """A part of the pipeline that works until its call number `fails_at`, and then never again."""

    def __init__(self, fails_at: int) -> None:
        self._left = fails_at
        self.calls_after = 0

    def __call__(self, *_: Any) -> None:
        self._left -= 1
        if self._left <= 0:
            self.calls_after += 1
            raise torch.AcceleratorError(LAUNCH_FAILURE)


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[Engine]:
    engine = Engine.load(tiny_model, device="cpu", threads=1)
    yield engine


@pytest.mark.parametrize(("part", "fails_at"), [("text_encoder", 1), ("transformer", 1), ("transformer", 3)])
def test_a_part_that_fails_ends_the_drawing_at_once(engine: Engine, part: str, fails_at: int) -> None:
    failing = _Failing(fails_at)
    getattr(engine.pipeline, part).register_forward_pre_hook(failing)
    with pytest.raises(DeviceFailed, match=r"cpu failed: a kernel ended in a fault") as raised:
        engine.generate(ASKED)
    assert failing.calls_after == 1, "nothing is tried against it"
    assert isinstance(raised.value.__cause__, torch.AcceleratorError)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_a_decoder_that_fails_ends_the_drawing_at_once(engine: Engine) -> None:
    failing = _Failing(1)
    engine.pipeline.vae.decoder.register_forward_pre_hook(failing)
    with pytest.raises(DeviceFailed):
        engine.generate(ASKED)
    assert failing.calls_after == 1


def test_a_failure_while_a_bad_value_is_recovered_from_is_no_rung_that_did_not_help(engine: Engine) -> None:
    failing = _Failing(2)

    def bad(module: torch.nn.Module, given: Any, output: Any) -> Any:
        failing()
        return torch.utils._pytree.tree_map(lambda value: value * float("nan"), output)

    engine.pipeline.transformer.register_forward_hook(bad)
    with pytest.raises(DeviceFailed):
        engine.generate(ASKED)
    assert failing.calls_after == 1
