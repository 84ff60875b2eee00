from __future__ import annotations

from dataclasses import replace

import pytest

from zimage_engine.errors import InvalidRequest, InvalidSize
from zimage_engine.sampling.plan import MAX_PROMPT_CHARACTERS, MAX_SEED, resolve
from zimage_engine.types import EnhancedPrompt, GenerationRequest, ModelDescription

MODEL = ModelDescription(
    id="tiny",
    family="z-image-turbo",
    device="cpu",
    dtype="bfloat16",
    native_width=256,
    native_height=256,
    size_multiple=32,
    default_steps=8,
    default_guidance_scale=1.8,
    token_limit=500,
    max_side=1024,
)
ASKED = GenerationRequest(prompt="a red circle")


def test_what_is_not_said_is_the_models_default() -> None:
    plan = resolve(ASKED, MODEL)
    assert (plan.prompt, plan.negative_prompt) == ("a red circle", "")
    assert (plan.width_px, plan.height_px) == (256, 256)
    assert (plan.steps, plan.guidance_scale) == (8, 1.8)
    assert plan.pipeline_guidance == pytest.approx(0.8)
    assert len(plan.seeds) == 1
    assert plan.warnings == ()


def test_what_is_said_is_kept() -> None:
    request = GenerationRequest("  a cat\n", " dogs ", 512, 320, 10, 2, 41, 3)
    plan = resolve(request, MODEL)
    assert (plan.prompt, plan.negative_prompt) == ("a cat", "dogs")
    assert (plan.width_px, plan.height_px) == (512, 320)
    assert (plan.steps, plan.guidance_scale, plan.pipeline_guidance) == (10, 2.0, 1.0)
    assert plan.seeds == (41, 42, 43)


def test_a_random_seed_leaves_room_and_differs() -> None:
    seeds = [resolve(replace(ASKED, n=10), MODEL).seeds for _ in range(20)]
    assert all(drawn[0] >= 0 and drawn[-1] <= MAX_SEED and len(drawn) == 10 for drawn in seeds)
    assert len({drawn[0] for drawn in seeds}) > 1


@pytest.mark.parametrize("asked", [0, 0.0, 0.5, 1, 1.0])
def test_guidance_off_is_a_choice_without_warning(asked: float) -> None:
    plan = resolve(replace(ASKED, guidance_scale=asked), MODEL)
    assert (plan.guidance_scale, plan.pipeline_guidance, plan.warnings) == (1.0, 0.0, ())


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps_outside_range", "only blobs"),
        ({"num_inference_steps": 13}, "num_inference_steps_outside_range", "blurred and desaturated"),
        ({"guidance_scale": 1.4}, "guidance_scale_outside_range", "grey and weak"),
        ({"guidance_scale": 2.6}, "guidance_scale_outside_range", "torn edges"),
        ({"width": 512, "height": 512}, "size_outside_range", "size 512x512 is far from the 256x256"),
        ({"width": 96, "height": 256}, "size_outside_range", "things may be repeated"),
    ],
)
def test_values_outside_the_good_ranges_are_drawn_with_a_warning(changes, code: str, words: str) -> None:
    (notice,) = resolve(replace(ASKED, **changes), MODEL).warnings
    assert notice.code == code
    assert words in notice.message


@pytest.mark.parametrize(
    "changes",
    [
        {"num_inference_steps": 4},
        {"num_inference_steps": 12},
        {"guidance_scale": 1.5},
        {"guidance_scale": 2.5},
        {"width": 320, "height": 320},
        {"width": 288, "height": 192},
    ],
)
def test_the_ends_of_the_good_ranges_are_good(changes) -> None:
    assert resolve(replace(ASKED, **changes), MODEL).warnings == ()


def test_two_values_outside_are_two_warnings() -> None:
    plan = resolve(replace(ASKED, num_inference_steps=2, guidance_scale=9), MODEL)
    assert [notice.code for notice in plan.warnings] == [
        "num_inference_steps_outside_range",
        "guidance_scale_outside_range",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 250}, "width must be a multiple of 32, got 250; nearest are 224 and 256"),
        ({"height": 1000}, "height must be a multiple of 32, got 1000; nearest are 992 and 1024"),
        ({"width": 1023}, "width must be a multiple of 32, got 1023; nearest are 992 and 1024"),
        ({"width": 33}, "width must be a multiple of 32, got 33; nearest are 32 and 64"),
        ({"width": 31}, "width must be from 32 to 1024 pixels for this model, got 31"),
        ({"width": 0}, "width must be from 32 to 1024 pixels for this model, got 0"),
        ({"height": -32}, "height must be from 32 to 1024 pixels for this model, got -32"),
        ({"height": 1025}, "height must be from 32 to 1024 pixels for this model, got 1025"),
        ({"height": 10**30}, "height must be from 32 to 1024 pixels for this model, got a huge number"),
        ({"width": 256.0}, "width must be a whole number of pixels, got 256.0"),
        ({"width": "256"}, "width must be a whole number of pixels, got the text '256'"),
        ({"width": True}, "width must be a whole number of pixels, got True"),
    ],
)
def test_a_size_off_the_grid_is_refused_with_the_nearest(changes, message: str) -> None:
    with pytest.raises(InvalidSize) as raised:
        resolve(replace(ASKED, **changes), MODEL)
    assert str(raised.value) == message
    assert raised.value.parameter == next(iter(changes))


def test_the_largest_side_is_on_the_grid_too() -> None:
    with pytest.raises(InvalidSize, match="from 32 to 992 pixels"):
        resolve(replace(ASKED, width=1024), replace(MODEL, max_side=1000))


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n\t　"}, "prompt is empty"),
        ({"prompt": None}, "prompt must be text, got nothing"),
        ({"prompt": 7}, "prompt must be text, got 7"),
        ({"prompt": ["a cat"]}, "prompt must be text, got a list"),
        ({"prompt": b"a cat"}, "prompt must be text, got a bytes"),
        ({"prompt": "a \ud83d cat"}, "half a surrogate pair at character 3"),
        ({"prompt": "a" * (MAX_PROMPT_CHARACTERS + 1)}, "at most 32000 characters, got 32001"),
        ({"negative_prompt": 1.5}, "negative_prompt must be text, got 1.5"),
        ({"negative_prompt": "a" * (MAX_PROMPT_CHARACTERS + 1)}, "at most 32000 characters"),
        ({"n": 0}, "n must be from 1 to 10, got 0"),
        ({"n": 11}, "n must be from 1 to 10, got 11"),
        ({"n": None}, "n must be a whole number from 1 to 10, got nothing"),
        ({"n": "2"}, "n must be a whole number from 1 to 10, got the text '2'"),
        ({"n": True}, "n must be a whole number from 1 to 10, got True"),
        ({"num_inference_steps": 0}, "num_inference_steps must be from 1 to 100, got 0"),
        ({"num_inference_steps": 101}, "num_inference_steps must be from 1 to 100, got 101"),
        ({"num_inference_steps": 8.0}, "num_inference_steps must be a whole number from 1 to 100, got 8.0"),
        ({"guidance_scale": -0.1}, "guidance_scale must be from 0 to 20 (1 or 0 is off), got -0.1"),
        ({"guidance_scale": 20.5}, "guidance_scale must be from 0 to 20 (1 or 0 is off), got 20.5"),
        ({"guidance_scale": NAN}, "guidance_scale must be from 0 to 20 (1 or 0 is off), got nan"),
        ({"guidance_scale": INFINITY}, "guidance_scale must be from 0 to 20 (1 or 0 is off), got inf"),
        ({"guidance_scale": 10**400}, "got a huge number"),
        ({"guidance_scale": "1.8"}, "guidance_scale must be a number, got the text '1.8'"),
        ({"guidance_scale": False}, "guidance_scale must be a number, got False"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ({"seed": MAX_SEED + 1}, "seed must be from 0 to 4294967295, got 4294967296"),
        ({"seed": 1.0}, "seed must be a whole number"),
        ({"seed": MAX_SEED, "n": 2}, "for n 2 it can be at most 4294967294, got 4294967295"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_name(changes, message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        resolve(replace(ASKED, **changes), MODEL)
    assert message in str(raised.value)
    assert raised.value.parameter == next(iter(changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 0},
        {"seed": MAX_SEED},
        {"seed": MAX_SEED - 9, "n": 10},
        {"n": 10},
        {"num_inference_steps": 1},
        {"num_inference_steps": 100},
        {"guidance_scale": 20},
        {"width": 32, "height": 1024},
        {"prompt": "a" * MAX_PROMPT_CHARACTERS},
        {"prompt": "白色背景上的红色圆形 🟥"},
        {"negative_prompt": ""},
    ],
)
def test_the_ends_of_what_is_allowed_are_allowed(changes) -> None:
    resolve(replace(ASKED, **changes), MODEL)


def test_the_enhancers_words_replace_the_prompts_alone() -> None:
    plan = resolve(replace(ASKED, seed=5), MODEL)
    changed = plan.with_prompts(EnhancedPrompt("a red circle, sharp", "blurry", ("sharp",)))
    assert changed == replace(plan, prompt="a red circle, sharp", negative_prompt="blurry")
