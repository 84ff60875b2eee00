"""Measures the demo model on prompts whose combinations were never in training: rates, table, sheet.

    python -m zimage_engine.demo.evaluate --model FOLDER --markdown table.md --sheet sheet.png

The pictures come from the stock diffusers pipeline and are judged by `detector`.
This module knows nothing of training, and needs torch only once pictures are asked for.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from zimage_engine.demo.captions import caption
from zimage_engine.demo.detector import Scene, Verdict, detect, judge_scene
from zimage_engine.demo.pictures import ShapesSpec, is_held_out, random_pair, random_single

log = logging.getLogger(__name__)

STEPS = 8
#: The conventional w: as the server draws by default, and off.
GUIDANCES = (1.8, 1.0)
LANGUAGES = ("en", "zh")

#: Draws one picture for each prompt: `(prompts, guidance w, a seed for each prompt)`.
Generate = Callable[[Sequence[str], float, Sequence[int]], Sequence[Image.Image]]


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt for a combination that training never draws; `kind` is "single" or "pair"."""

    kind: str
    language: str
    prompt: str
    spec: ShapesSpec


@dataclass(frozen=True)
class Trial:
    """One prompt drawn once, what was seen in the picture, and what of it is right."""

    asked: HeldOutPrompt
    guidance: float
    seed: int
    scene: Scene
    verdict: Verdict
    picture: Image.Image = field(repr=False, compare=False)


@dataclass(frozen=True)
class Rate:
    """`right` of `of` trials."""

    right: int
    of: int

    @property
    def share(self) -> float:
        return self.right / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true share lies with 95 % confidence (Wilson's score interval)."""
        if not self.of:
            return 0.0, 1.0
        z = 1.96
        middle = (self.share + z**2 / (2 * self.of)) / (1 + z**2 / self.of)
        half = (
            z
            / (1 + z**2 / self.of)
            * math.sqrt(self.share * (1 - self.share) / self.of + (z / (2 * self.of)) ** 2)
        )
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Question:
    """One row of the table: of which prompts, and what has to be right."""

    name: str
    kind: str
    words: str
    is_right: Callable[[Verdict], bool]


QUESTIONS = (
    Question("single_content", "single", "one thing: colour, shape and ground right", lambda v: v.content_ok),
    Question("single_position", "single", "one thing: position right", lambda v: v.position_ok),
    Question("single_all", "single", "one thing: all of it right", lambda v: v.all_ok),
    Question("pair_content", "pair", "two things: colours, shapes and ground right", lambda v: v.content_ok),
    Question("pair_position", "pair", "two things: relation or positions right", lambda v: v.position_ok),
    Question("pair_all", "pair", "two things: all of it right", lambda v: v.all_ok),
)


@dataclass(frozen=True)
class Table:
    """The trials, and every rate that can be read from them."""

    trials: tuple[Trial, ...]
    steps: int = STEPS

    def rate(self, question: Question, guidance: float, language: str | None = None) -> Rate:
        """How often the answer was right; `language` None: in all of them."""
        verdicts = [
            trial.verdict
            for trial in self.trials
            if trial.asked.kind == question.kind
            and trial.guidance == guidance
            and language in (None, trial.asked.language)
        ]
        return Rate(sum(map(question.is_right, verdicts)), len(verdicts))

    @property
    def guidances(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(trial.guidance for trial in self.trials))

    def to_markdown(self) -> str:
        """One row for each question and guidance, with English and Chinese apart."""
        lines = [
            f"| {self.steps} steps | guidance | right | 95 % interval | English | Chinese |",
            "|---|---|---|---|---|---|",
        ]
        for question in QUESTIONS:
            for guidance in self.guidances:
                rate = self.rate(question, guidance)
                if not rate.of:
                    continue
                low, high = rate.interval
                by_language = " | ".join(
                    f"{self.rate(question, guidance, language).share:.1%}" for language in LANGUAGES
                )
                lines.append(
                    f"| {question.words} | {guidance} | {rate.share:.1%} ({rate.right} of {rate.of}) "
                    f"| {low:.1%} to {high:.1%} | {by_language} |"
                )
        return "\n".join(lines) + "\n"

    def figures(self) -> dict[str, Any]:
        """The rates as plain values for `json.dumps`: question, then guidance, then right and of."""
        return {
            "steps": self.steps,
            "rates": {
                question.name: {
                    str(guidance): {
                        name: {"right": rate.right, "of": rate.of}
                        for name, language in (("all", None), *((name, name) for name in LANGUAGES))
                        for rate in [self.rate(question, guidance, language)]
                    }
                    for guidance in self.guidances
                }
                for question in QUESTIONS
            },
        }


def held_out_prompts(singles: int, pairs: int, seed: int = 0) -> list[HeldOutPrompt]:
    """Prompts with held-out combinations, English and Chinese by turns, no spec asked twice.

    More prompts of the same seed begin with the same ones.
    """
    prompts: list[HeldOutPrompt] = []
    for kind, make, wanted in (("single", random_single, singles), ("pair", random_pair, pairs)):
        rng = random.Random(f"{seed}/{kind}")
        seen: set[ShapesSpec] = set()
        while len(seen) < wanted:
            spec = make(rng)
            if not is_held_out(spec) or spec in seen:
                continue
            language = LANGUAGES[len(seen) % len(LANGUAGES)]
            seen.add(spec)
            prompts.append(HeldOutPrompt(kind, language, caption(spec, rng, language, complete=True), spec))
    return prompts


def evaluate(
    generate: Generate,
    prompts: Sequence[HeldOutPrompt],
    guidances: Iterable[float] = GUIDANCES,
    batch: int = 8,
    first_seed: int = 0,
) -> Table:
    """Draw every prompt at every guidance and judge it; prompt i is drawn from `first_seed + i`."""
    trials: list[Trial] = []
    for guidance in guidances:
        for start in range(0, len(prompts), batch):
            asked = prompts[start : start + batch]
            seeds = range(first_seed + start, first_seed + start + len(asked))
            pictures = generate([prompt.prompt for prompt in asked], guidance, seeds)
            for prompt, seed, picture in zip(asked, seeds, pictures, strict=True):
                scene = detect(picture)
                trials.append(Trial(prompt, guidance, seed, scene, judge_scene(prompt.spec, scene), picture))
            right = sum(trial.verdict.all_ok for trial in trials)
            log.info("guidance %s: %d drawn, %d of them all right", guidance, len(trials), right)
    return Table(tuple(trials))


def stock_pipeline(folder: str | Path, steps: int = STEPS, device: str = "cpu") -> Generate:
    """The model of a folder, loaded and run by diffusers alone, at the model's own size."""
    import torch
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(str(folder), dtype=torch.bfloat16).to(device)
    pipeline.set_progress_bar_config(disable=True)
    side_px = pipeline.vae.config.sample_size

    def generate(prompts: Sequence[str], guidance: float, seeds: Sequence[int]) -> Sequence[Image.Image]:
        pictures: Sequence[Image.Image] = pipeline(
            list(prompts),  # the pipeline writes into the list that it is given
            height=side_px,
            width=side_px,
            num_inference_steps=steps,
            guidance_scale=guidance - 1,  # Z-Image's pipeline counts from 0: pos + g (pos - neg)
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        return pictures

    return generate


# --- the contact sheet --------------------------------------------------------------------------

_CELL_PX, _MARGIN_PX, _LINES_PX = 144, 6, 44
_RIGHT, _WRONG = (30, 140, 60), (200, 30, 30)


def contact_sheet(trials: Sequence[Trial], columns: int = 12) -> Image.Image:
    """All pictures with what was asked and, where something is wrong, what was seen."""
    cell = (_CELL_PX + 2 * _MARGIN_PX, _CELL_PX + 2 * _MARGIN_PX + _LINES_PX)
    rows = math.ceil(len(trials) / columns)
    sheet = Image.new("RGB", (columns * cell[0], max(1, rows) * cell[1]), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=9)
    for index, trial in enumerate(trials):
        left, top = index % columns * cell[0], index // columns * cell[1]
        colour = _RIGHT if trial.verdict.all_ok else _WRONG
        pen.rectangle(
            [left + 1, top + 1, left + cell[0] - 2, top + _CELL_PX + 2 * _MARGIN_PX - 1], fill=colour
        )
        sheet.paste(trial.picture.resize((_CELL_PX, _CELL_PX)), (left + _MARGIN_PX, top + _MARGIN_PX))
        lines = [*_asked_in_words(trial), *([] if trial.verdict.all_ok else [_seen_in_words(trial.scene)])]
        for line, words in enumerate(lines):
            at = (left + 3, top + _CELL_PX + 2 * _MARGIN_PX + line * 10)
            while font.getlength(words) > cell[0] - 6:
                words = words[:-1]
            pen.text(at, words, fill=(40, 40, 40), font=font)
    return sheet


def _asked_in_words(trial: Trial) -> list[str]:
    spec = trial.asked.spec
    things = [f"{thing.size} {thing.colour} {thing.shape} {thing.place or ''}" for thing in spec.things]
    if spec.relation:
        things[1] = f"{spec.relation} {things[1]}"
    things[-1] += f" / {spec.background}"
    return [*things, f"{trial.asked.language} w {trial.guidance} seed {trial.seed}"]


def _seen_in_words(scene: Scene) -> str:
    things = ", ".join(f"{thing.colour} {thing.shape}" for thing in scene.things)
    if len(scene.things) > 2:
        things = f"{len(scene.things)} things"
    return f"! {things or 'nothing'} / {scene.background}"


# --- the command --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("zimage_engine.demo.evaluate", description="Measure the demo model.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model", help="pipeline folder")
    parser.add_argument("--device", default="cpu", help="where to draw, as torch names it")
    parser.add_argument("--singles", type=int, default=240, help="prompts with one thing")
    parser.add_argument("--pairs", type=int, default=120, help="prompts with two things")
    parser.add_argument("--seed", type=int, default=0, help="which prompts; each is drawn from its own seed")
    parser.add_argument("--batch", type=int, default=8, help="prompts drawn together")
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCES, help="w; 1 is off")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--figures", type=Path, help="write the rates as JSON here")
    parser.add_argument("--sheet", type=Path, help="write a PNG of all pictures, right and wrong, here")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prompts = held_out_prompts(asked.singles, asked.pairs, asked.seed)
    table = evaluate(stock_pipeline(asked.model, device=asked.device), prompts, asked.guidance, asked.batch)
    sys.stdout.write(table.to_markdown())
    if asked.markdown:
        asked.markdown.write_text(table.to_markdown(), encoding="utf-8")
    if asked.figures:
        asked.figures.write_text(json.dumps(table.figures(), indent=1) + "\n", encoding="utf-8")
    if asked.sheet:
        contact_sheet(table.trials).save(asked.sheet)


if __name__ == "__main__":
    main()
