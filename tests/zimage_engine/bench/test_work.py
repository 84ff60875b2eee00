"""The arithmetic of a picture is counted as it is, against torch's own counter and against the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from zimage_engine import Engine, GenerationRequest
from zimage_engine.bench.random_model import build_from, narrow_configs, with_layers
from zimage_engine.bench.work import count_work
from zimage_engine.families import ModelFamily, family_named

SIDE_PX = 64
CAPTION_TOKENS = 32


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = build_from(narrow_configs(), "cpu")
    engine = Engine(model.pipeline, model.family, "narrow", "cpu", embedding_cache_bytes=0)
    engine.draws_again = False
    return engine


def draw(engine: Engine, guidance_scale: float, steps: int) -> Callable[[], object]:
    request = GenerationRequest(
        prompt="a red circle",
        seed=1,
        width=SIDE_PX,
        height=SIDE_PX,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        enhance=False,
        refine=False,
    )
    return lambda: engine.generate(request)


def family() -> ModelFamily:
    return family_named("z-image-turbo")


def test_the_denoiser_does_two_operations_for_each_weight_and_token_and_its_attention(engine: Engine) -> None:
    denoiser = engine.pipeline.transformer
    config = denoiser.config
    work = count_work(engine.pipeline, family(), draw(engine, 1.0, 3))
    picture_tokens = (SIDE_PX // 16) ** 2
    picture_tokens += -picture_tokens % 32
    tokens = picture_tokens + CAPTION_TOKENS
    block = sum(each.numel() for each in denoiser.layers[0].attention.parameters() if each.ndim == 2)
    block += sum(each.numel() for each in denoiser.layers[0].feed_forward.parameters())
    attention = 4 * tokens**2 * config["dim"]
    expected = config["n_layers"] * (2 * block * tokens + attention)
    expected += config["n_refiner_layers"] * 2 * block * tokens
    expected += config["n_refiner_layers"] * 4 * (picture_tokens**2 + CAPTION_TOKENS**2) * config["dim"]
    assert work.denoiser_calls == 3
    # Modulation, embedders and the last layer come on top; beside layers so narrow they are 3 %.
    assert 1.0 <= work.denoise_flops / 3 / expected < 1.05


def test_guidance_doubles_the_denoisers_work_and_adds_a_prompt(engine: Engine) -> None:
    off, on = (count_work(engine.pipeline, family(), draw(engine, scale, 1)) for scale in (1.0, 1.8))
    assert on.denoise_flops / off.denoise_flops == pytest.approx(2.0, rel=0.01)
    assert on.encode_flops == 2 * off.encode_flops
    assert on.decode_flops == off.decode_flops
    assert on.denoiser_calls == off.denoiser_calls == 1


def test_torchs_counter_finds_the_same(engine: Engine) -> None:
    work = count_work(engine.pipeline, family(), draw(engine, 1.8, 2))
    # Torch does not know the CPU's own attention kernel: the plain one is made of products that it knows.
    with (
        FlopCounterMode(display=False) as counted,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        draw(engine, 1.8, 2)()
    ours = work.encode_flops + work.denoise_flops + work.decode_flops
    assert ours == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_the_hooks_are_gone_afterwards(engine: Engine) -> None:
    count_work(engine.pipeline, family(), draw(engine, 1.0, 1))
    for module in (engine.pipeline.transformer, engine.pipeline.text_encoder):
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert functional.linear(torch.ones(1, 1), torch.ones(1, 1)).item() == 1.0


def test_layers_are_cut_and_never_added() -> None:
    cut = with_layers(narrow_configs(), 1)
    assert cut["transformer"][1]["n_layers"] == cut["text_encoder"][1]["num_hidden_layers"] == 1
    assert with_layers(narrow_configs(), 99) == narrow_configs()
