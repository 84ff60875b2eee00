"""What is measured: held-out prompts, honest rates, and a table that counts right and wrong."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from PIL import Image

from zimage_engine.demo.evaluate import (
    QUESTIONS,
    HeldOutPrompt,
    Rate,
    contact_sheet,
    evaluate,
    held_out_prompts,
)
from zimage_engine.demo.pictures import draw, is_held_out

PROMPTS = held_out_prompts(singles=8, pairs=4, seed=5)


def artist(wrong: set[str]) -> object:
    """Draws what each prompt means, but for the prompts in `wrong` the picture of another one."""
    specs = {prompt.prompt: prompt.spec for prompt in PROMPTS}
    in_order = list(specs)

    def generate(prompts: Sequence[str], guidance: float, seeds: Sequence[int]) -> list[Image.Image]:
        meant = [
            in_order[(in_order.index(prompt) + 1) % len(in_order)] if prompt in wrong else prompt
            for prompt in prompts
        ]
        return [draw(specs[prompt], random.Random(seed)) for prompt, seed in zip(meant, seeds, strict=True)]

    return generate


def test_prompts_are_held_out_balanced_and_never_asked_twice() -> None:
    prompts = held_out_prompts(singles=240, pairs=120, seed=0)
    assert all(is_held_out(prompt.spec) for prompt in prompts)
    assert len({prompt.spec for prompt in prompts}) == 360
    assert Counter((prompt.kind, prompt.language) for prompt in prompts) == {
        ("single", "en"): 120,
        ("single", "zh"): 120,
        ("pair", "en"): 60,
        ("pair", "zh"): 60,
    }
    assert all((len(prompt.spec.things) == 2) == (prompt.kind == "pair") for prompt in prompts)
    assert all(prompt.prompt.isascii() == (prompt.language == "en") for prompt in prompts)


def test_prompts_say_the_ground_even_where_it_is_white() -> None:
    colours = {"white": ("white", "白色"), "black": ("black", "黑色"), "red": ("red", "红色")}
    for prompt in held_out_prompts(singles=240, pairs=120, seed=1):
        words = colours.get(prompt.spec.background, ())
        assert not words or any(word in prompt.prompt.lower() for word in words), prompt


def test_fewer_prompts_of_a_seed_are_the_first_of_more() -> None:
    many = held_out_prompts(singles=20, pairs=10, seed=3)
    few = held_out_prompts(singles=6, pairs=4, seed=3)
    assert few == [*many[:6], *many[20:24]]
    assert held_out_prompts(singles=6, pairs=4, seed=4) != few


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_right_pictures_count_right_and_wrong_ones_wrong(batch: int) -> None:
    wrong = {PROMPTS[0].prompt, PROMPTS[3].prompt, PROMPTS[9].prompt}
    table = evaluate(artist(wrong), PROMPTS, guidances=(1.8, 1.0), batch=batch)  # type: ignore[arg-type]
    rates = {question.name: table.rate(question, 1.8) for question in QUESTIONS}
    assert rates["single_all"] == Rate(6, 8)
    assert rates["pair_all"] == Rate(3, 4)
    assert [trial.seed for trial in table.trials] == [*range(12)] * 2
    english, chinese = (table.rate(QUESTIONS[2], 1.8, language) for language in ("en", "zh"))
    assert english.of == chinese.of == 4 and english.right + chinese.right == 6


def test_the_table_and_the_figures_tell_the_same() -> None:
    table = evaluate(artist({PROMPTS[0].prompt}), PROMPTS, guidances=(1.8,))  # type: ignore[arg-type]
    assert table.figures()["rates"]["single_all"]["1.8"]["all"] == {"right": 7, "of": 8}
    lines = table.to_markdown().splitlines()
    assert len(lines) == 2 + len(QUESTIONS)
    assert "| one thing: all of it right | 1.8 | 87.5% (7 of 8) | 52.9% to 97.8% | 75.0% | 100.0% |" in lines


@pytest.mark.parametrize(
    ("rate", "low", "high"),
    [
        (Rate(0, 10), 0.0, 0.2775),
        (Rate(10, 10), 0.7225, 1.0),
        (Rate(50, 100), 0.4038, 0.5962),
        (Rate(0, 0), 0, 1),
    ],
)
def test_intervals_are_wilsons(rate: Rate, low: float, high: float) -> None:
    assert rate.interval == pytest.approx((low, high), abs=1e-4)


def test_the_sheet_frames_right_pictures_green_and_wrong_ones_red() -> None:
    prompts: list[HeldOutPrompt] = PROMPTS[:2]
    trials = evaluate(artist({prompts[1].prompt}), prompts, guidances=(1.8,)).trials  # type: ignore[arg-type]
    assert [trial.verdict.all_ok for trial in trials] == [True, False]
    sheet = contact_sheet(trials, columns=2)
    right, wrong = sheet.getpixel((3, 3)), sheet.getpixel((sheet.width // 2 + 3, 3))
    assert isinstance(right, tuple) and isinstance(wrong, tuple)
    assert right[1] > right[0] and wrong[0] > wrong[1]
