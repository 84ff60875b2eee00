"""The quick walk meets what torch's own meets, and answers for a dtype only what diffusers would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import modeling_utils

from zimage_engine import Engine
from zimage_engine.sampling.known_dtype import dtype_known, dtype_of
from zimage_engine.sampling.module_walk import modules_within, plain_dtype, tensors_within


@pytest.fixture
def parts(tiny_model: Path) -> dict[str, Any]:
    pipeline = Engine.load(tiny_model, device="cpu", dtype="float32").pipeline
    return {name: getattr(pipeline, name) for name in ("transformer", "vae", "text_encoder")}


def test_it_meets_the_same_modules_and_tensors(parts: dict[str, Any]) -> None:
    for part in parts.values():
        part.register_module("nothing_here", None)
        assert set(modules_within(part)) == set(part.modules())
        assert {id(tensor) for tensor in tensors_within(part)} == {
            id(tensor) for tensor in (*part.parameters(), *part.buffers())
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_finds_the_dtype_that_diffusers_finds(parts: dict[str, Any], dtype: torch.dtype) -> None:
    for part in (parts["transformer"], parts["vae"]):
        part.to(dtype)
        assert plain_dtype(part) is modeling_utils.get_parameter_dtype(part) is dtype


def test_where_more_than_the_first_parameter_decides_diffusers_is_asked(parts: dict[str, Any]) -> None:
    vae = parts["vae"]
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert plain_dtype(vae) is None
    with dtype_known(parts["transformer"]):
        assert dtype_of(vae) is vae.dtype is torch.bfloat16

    transformer = parts["transformer"]
    first = next(name for name, _ in transformer.named_parameters())
    transformer.to(torch.float32)
    transformer._keep_in_fp32_modules = [first]
    next(transformer.parameters()).data = next(transformer.parameters()).data.to(torch.float64)
    assert plain_dtype(transformer) is None
    assert dtype_of(transformer) is torch.float32

    assert plain_dtype(torch.nn.ReLU()) is None
    counts = torch.nn.Module()
    counts.count = torch.nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)
    assert plain_dtype(counts) is None
