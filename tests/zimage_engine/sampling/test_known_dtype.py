"""The denoiser's dtype is found once for a drawing, and again by everybody else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zimage_engine import Engine, GenerationRequest
from zimage_engine.sampling.known_dtype import dtype_known


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return Engine.load(tiny_model, device="cpu", dtype="float32")


def test_within_it_nothing_is_searched_and_outside_everything(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, vae = engine.pipeline.transformer, engine.pipeline.vae
    searched: list[torch.nn.Module] = []
    stock = torch.nn.Module.named_modules

    def noted(module: torch.nn.Module, *args: object, **kwargs: object) -> object:
        searched.append(module)
        return stock(module, *args, **kwargs)

    with dtype_known(denoiser):
        monkeypatch.setattr(torch.nn.Module, "named_modules", noted)
        assert denoiser.dtype is torch.float32
        assert denoiser not in searched
        assert vae.dtype is torch.float32
        assert vae in searched
    assert denoiser.dtype is torch.float32
    assert denoiser in searched


def test_what_changes_afterwards_is_seen(engine: Engine) -> None:
    request = GenerationRequest(prompt="a", seed=1, width=64, height=64, num_inference_steps=1)
    engine.generate(request)
    assert engine.pipeline.transformer.dtype is torch.float32
    engine.pipeline.transformer.to(torch.bfloat16)
    assert engine.pipeline.transformer.dtype is torch.bfloat16
    with pytest.raises(RuntimeError, match="a drawing ended"), dtype_known(engine.pipeline.transformer):
        raise RuntimeError("a drawing ended")
    engine.pipeline.transformer.to(torch.float32)
    assert engine.pipeline.transformer.dtype is torch.float32
