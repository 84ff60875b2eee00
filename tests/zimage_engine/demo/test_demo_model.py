"""The model that comes with the program is complete, small, and draws what it was never shown."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import zimage_engine.demo
from zimage_engine.demo.evaluate import QUESTIONS, STEPS, Table, evaluate, held_out_prompts, stock_pipeline
from zimage_engine.demo.pictures import is_held_out

FOLDER = Path(zimage_engine.demo.__file__).parent / "model"
PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
MOST_BYTES = 25_000_000
GUIDANCE = 1.8
SINGLES, PAIRS = 24, 12
#: However poor the measured figures, the sample has to show a model that follows its prompts.
LEAST_SHARE = {"single_content": 0.55, "single_position": 0.55, "pair_content": 0.25}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    import torch
    from diffusers import ZImagePipeline

    return ZImagePipeline.from_pretrained(str(FOLDER), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sample() -> Table:
    prompts = held_out_prompts(SINGLES, PAIRS)
    return evaluate(stock_pipeline(FOLDER), prompts, guidances=(GUIDANCE,), batch=12)


def test_stock_diffusers_loads_every_part_without_our_code(pipeline: Any) -> None:
    classes = {name: type(pipeline.components[name]).__name__ for name in PARTS}
    assert classes == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen3Model",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
    }
    assert pipeline.scheduler.config.shift == 3.0
    # the pipeline computes with both of them, and a shift that is None stops it at the last line
    assert isinstance(pipeline.vae.config.scaling_factor, float)
    assert isinstance(pipeline.vae.config.shift_factor, float)


def test_sizes_are_multiples_of_32_and_256_is_64_tokens(pipeline: Any) -> None:
    (patch,) = pipeline.transformer.config.all_patch_size
    size_multiple = pipeline.vae_scale_factor * patch
    assert size_multiple == 32
    assert pipeline.vae.config.sample_size == 256
    assert (pipeline.vae.config.sample_size // size_multiple) ** 2 == 64


def test_all_weights_are_bfloat16_safetensors_with_nothing_missing() -> None:
    weights = sorted(FOLDER.rglob("*.safetensors"))
    assert {path.parent.name for path in weights} == {"text_encoder", "transformer", "vae"}
    for path in weights:
        with safe_open(path, "pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
            assert kinds == {"BF16"}, path
    assert not [path for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in FOLDER.rglob(ending)]
    assert not list(FOLDER.rglob("*.py")), "the folder must need no code of its own"


def test_the_folder_is_small_enough_to_come_with_the_program() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= MOST_BYTES


@pytest.mark.parametrize("prompt", ["red circle, white background", "白色背景上的红色圆形", ""])
def test_a_prompt_within_the_limit_is_not_cut(pipeline: Any, prompt: str) -> None:
    embedding = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0]
    assert 0 < len(embedding) < 32
    assert embedding.isfinite().all()


@pytest.mark.parametrize(("width", "height"), [(256, 256), (320, 192)])
def test_a_picture_has_the_size_that_was_asked(pipeline: Any, width: int, height: int) -> None:
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "red circle", height=height, width=width, num_inference_steps=2, guidance_scale=0.0
    ).images[0]
    assert isinstance(image, Image.Image) and image.size == (width, height)


def test_training_draws_nothing_that_is_held_out() -> None:
    from zimage_engine.demo.train_denoiser import training_spec

    rng = random.Random(0)
    specs = [training_spec(rng) for _ in range(4000)]
    assert not [spec for spec in specs if is_held_out(spec)]
    assert all(is_held_out(prompt.spec) for prompt in held_out_prompts(100, 50))


def least_right(measured: dict[str, int], of: int, floor: float) -> float:
    """The measured share less three standard errors: a sample of `of` hardly falls under it by chance.

    For the error the share is drawn a little towards a half, so that a perfect one has an error too.
    """
    share = measured["right"] / measured["of"]
    careful = (measured["right"] + 2) / (measured["of"] + 4)
    error = math.sqrt(careful * (1 - careful) * (1 / of + 1 / measured["of"]))
    return max(floor, share - 3 * error)


@pytest.mark.parametrize(
    ("measured", "of", "floor", "expected"),
    [
        ({"right": 228, "of": 240}, 24, 0.5, 0.801),  # 0.95 less 3 x 0.0496
        ({"right": 240, "of": 240}, 24, 0.5, 0.943),  # a perfect score leaves room for one miss
        ({"right": 120, "of": 240}, 24, 0.5, 0.5),  # the floor holds
    ],
)
def test_the_bar_leaves_room_for_chance(
    measured: dict[str, int], of: int, floor: float, expected: float
) -> None:
    assert least_right(measured, of, floor) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("name", LEAST_SHARE)
def test_held_out_prompts_are_drawn_right(sample: Table, name: str) -> None:
    figures = json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))
    assert figures["steps"] == STEPS
    question = next(question for question in QUESTIONS if question.name == name)
    rate = sample.rate(question, GUIDANCE)
    bar = least_right(figures["rates"][name][str(GUIDANCE)]["all"], rate.of, LEAST_SHARE[name])
    assert rate.share >= bar, [
        (trial.asked.prompt, trial.seed, trial.scene)
        for trial in sample.trials
        if not question.is_right(trial.verdict)
    ]


def test_the_figures_are_of_enough_prompts_and_both_languages() -> None:
    figures = json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))
    for name, least in (("single_content", 200), ("pair_content", 100)):
        for by_language in figures["rates"][name].values():
            assert by_language["all"]["of"] >= least
            assert by_language["en"]["of"] == by_language["zh"]["of"]


def test_one_seed_draws_one_picture_whatever_is_drawn_beside_it() -> None:
    generate = stock_pipeline(FOLDER, steps=2)
    alone, again = (np.asarray(generate(["red circle"], GUIDANCE, [7])[0], dtype=int) for _ in range(2))
    beside = np.asarray(generate(["red circle", "blue star"], GUIDANCE, [7, 8])[0], dtype=int)
    other = np.asarray(generate(["red circle"], GUIDANCE, [8])[0], dtype=int)
    assert (alone == again).all()
    # bfloat16 products of another batch size round differently, which is not another picture
    assert np.abs(alone - beside).mean() < 3
    assert not (alone == other).all()
