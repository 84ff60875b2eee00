"""The small pieces of HTML that the page fills in as things happen: pure functions from facts to text.

Everything that came from a person or a model is escaped here, and nowhere else.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve_app.ui.texts import MESSAGES, Language, notice_sentence, say
from zimage_engine.types import (
    DeviceStatus,
    GenerationReport,
    GuardTrip,
    Notice,
    PictureReport,
)

if TYPE_CHECKING:
    from serve_app.ui.drawing import Stepped, Waiting
    from serve_app.worker_reply import Preview

#: Graphics cards are sold by "12 GB" and hold 12 * 2**30 bytes.
_BYTES_PER_GB = 2**30


def badge_text(steps: int, guidance_scale: float, dtype: str) -> str:
    """The golden ranges at a glance: `Steps: 8 | CFG: 1.8 | bfloat16`."""
    return f"Steps: {steps} | CFG: {guidance_scale:.1f} | {dtype.removeprefix('torch.')}"


def status_text(status: DeviceStatus) -> str:
    """The device in one line: `GPU: CUDA OK | VRAM: 5.2/12.0 GB`, `MPS` or `CPU`; then the plan, if any."""
    kind = status.device.partition(":")[0]
    parts = [f"GPU: {kind.upper()} OK" if kind == "cuda" else kind.upper()]
    if kind == "cuda" and status.used_bytes is not None and status.total_bytes is not None:
        used, total = status.used_bytes / _BYTES_PER_GB, status.total_bytes / _BYTES_PER_GB
        parts.append(f"VRAM: {used:.1f}/{total:.1f} GB")
    if status.plan is not None:
        parts.append(status.plan)
    return " | ".join(parts)


def status_hint(status: DeviceStatus, model: str) -> str:
    """The model's name, the device's own and the plan's reason, for whoever hovers over the line."""
    return " · ".join(part for part in (model, status.name, status.plan_because) if part)


def progress_bar(text: str, share_done: float) -> str:
    """A bar with its text; `share_done` is from 0 to 1."""
    percent = round(100 * share_done)
    return (
        f'<div class="progress" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent}" aria-label="{escape(text)}"><p>{escape(text)}</p>'
        f'<div class="track"><div class="fill" style="width:{percent}%"></div></div></div>'
    )


def progress_waiting(key: str, language: Language) -> str:
    """The bar before the first step; `key` says what is being waited for."""
    return progress_bar(say(key, language), 0.0)


def progress_queued(place: Waiting, language: Language) -> str:
    """The bar of one who waits for others."""
    key = "queued" if place.seconds is None else "queued_for"
    return progress_bar(say(key, language, position=place.position, seconds=place.seconds), 0.0)


def progress_step(moment: Stepped, language: Language) -> str:
    """The bar after a step: the first half of the steps sets the outline, the second the detail."""
    step, steps = moment.progress.step, moment.progress.steps
    if step >= steps:
        return progress_bar(say("finishing", language), 1.0)
    text = say("outline" if step <= steps / 2 else "detail", language, step=step, steps=steps)
    if moment.seconds_left is not None:
        text = say("time_left", language, text=text, seconds=max(1, math.ceil(moment.seconds_left)))
    return progress_bar(text, step / steps)


def forming(preview: Preview) -> str:
    """What the picture looks like so far. No words: the bar tells how far it is."""
    data = base64.b64encode(preview.file).decode("ascii")
    return (
        f'<img class="forming" alt="" decoding="sync" width="{preview.width}" height="{preview.height}" '
        f'src="data:image/jpeg;base64,{data}">'
    )


def stopped_line(language: Language) -> str:
    """In place of the bar, for a while: the style sheet lets it go."""
    return f'<p class="stopped" role="status">{escape(say("stopped", language))}</p>'


def refusal_box(sentences: Iterable[str], theirs: bool, language: Language) -> str:
    """Why there is no picture; `theirs`: the person can mend it."""
    title = say("please_change" if theirs else "try_again", language)
    return _box("change" if theirs else "trouble", title, sentences)


def notices_box(notices: Iterable[Notice], language: Language, trace: Sequence[str] = ()) -> str:
    """What is good to know about a picture that was drawn; "" where there is nothing.

    `trace` are the sentences of `guard_trace`, shown behind a fold.
    """
    sentences = [notice_sentence(notice, language) for notice in notices]
    if not sentences and not trace:
        return ""
    rows = "".join(f"<li>{escape(sentence)}</li>" for sentence in trace)
    fold = f"<details><summary>{say('guard_title', language)}</summary><ul>{rows}</ul></details>"
    return _box("calm", say("notice", language), sentences, fold if trace else "")


def guard_trace(pictures: Sequence[PictureReport], language: Language) -> list[str]:
    """What the guard found and tried, a sentence a finding; of several pictures with its number."""
    told = []
    for number, picture in enumerate(pictures, start=1):
        for trip in picture.guard.trips:
            sentence = _trip(trip, language)
            if len(pictures) > 1:
                sentence = say("guard_picture", language, number=number, trip=sentence)
            told.append(sentence[:1].upper() + sentence[1:])
    return told


#: A finding of another name, such as a code of the look at the finished picture, is told as `guard_wrong`.
_FINDINGS = {"nan": "guard_nan", "inf": "guard_inf", "out of range": "guard_large"}


def _trip(trip: GuardTrip, language: Language) -> str:
    attempts = [
        say(f"guard_{attempt.outcome}", language, rung=_guard_word(attempt.rung, language))
        for attempt in trip.attempts
        if attempt.outcome != "skipped"
    ]
    stage = "finished" if trip.stage == "picture" else trip.stage
    sentence = say(
        "guard_trip",
        language,
        stage=_guard_word(stage, language),
        finding=say(_FINDINGS.get(trip.finding, "guard_wrong"), language),
        attempts=("、" if language == "zh" else ", ").join(attempts),
    )
    return sentence if trip.step is None else say("guard_step", language, step=trip.step, trip=sentence)


def _guard_word(code: str, language: Language) -> str:
    return _word("guard", code, language)


def _word(kind: str, code: str, language: Language) -> str:
    """The words for a code, such as a stage's; of one that is new here its own name."""
    return say(f"{kind}_{code}", language) if f"{kind}_{code}" in MESSAGES else code.replace("_", " ")


@dataclass(frozen=True, slots=True)
class SeveralPicture:
    """One of several pictures: where the browser finds its file, and its seed."""

    address: str
    seed: int


def several_pictures(pictures: Sequence[SeveralPicture], prompt: str, language: Language) -> str:
    """The pictures of one drawing side by side, each with its seed, to be shown large or saved on its own."""
    figures = "".join(
        f'<figure><button type="button" class="larger" title="{say("larger", language)}">'
        f'<img src="{escape(each.address)}" alt="{escape(prompt)}" loading="eager"></button>'
        f'<figcaption><span class="seed-of">{say("used_seed", language)} <b>{each.seed}</b></span>'
        f'<button type="button" class="use-seed" data-seed="{each.seed}">{say("use_seed", language)}</button>'
        f'<a href="{escape(each.address)}" download="zimage-{each.seed}.png">'
        f"{say('download_one', language)}</a></figcaption></figure>"
        for each in pictures
    )
    return f'<div class="pictures" data-count="{len(pictures)}">{figures}</div>'


def facts(report: GenerationReport, language: Language, told: Sequence[Mapping[str, Any]] = ()) -> str:
    """Seed, size and seconds of the picture, the LoRAs that were in force, and what made it quicker.

    `told` is for the page's scripts: for each picture its id in the history and its parameters.
    """
    rows = {
        "used_seed": ", ".join(str(made.seed) for made in report.pictures),
        "used_size": f"{report.width} × {report.height}",
        "used_time": say("seconds", language, seconds=report.seconds),
    }
    if report.loras:
        rows["used_loras"] = ", ".join(f"{lora.name} × {lora.weight:g}" for lora in report.loras)
    if report.accelerated_by:
        levers = (_word("lever", name, language) for name in report.accelerated_by)
        rows["used_levers"] = ("、" if language == "zh" else ", ").join(levers)
    cells = (
        f'<div><dt>{say(key, language)}</dt><dd class="{key}">{escape(value)}</dd></div>'
        for key, value in rows.items()
    )
    drawn = f' data-drawn="{escape(json.dumps(told, ensure_ascii=False))}"' if told else ""
    return f'<dl class="facts"{drawn}>{"".join(cells)}</dl>'


def enhancement(report: GenerationReport, language: Language) -> str:
    """What the enhancer put in and kept out, and behind a fold the whole prompts that were drawn."""
    added = report.enhancement
    is_rewritten = added.rewrite is not None and added.rewrite.outcome == "used"
    parts = [
        _phrases(key, phrases, language)
        for key, phrases in (
            ("rewritten", (report.prompt,) if is_rewritten else ()),
            ("added", added.added),
            ("added_negative", added.added_negative),
        )
        if phrases
    ] or [f'<p class="as-written">{say("nothing_added", language)}</p>']
    wholes = (("drawn_prompt", report.prompt), ("drawn_negative", report.negative_prompt))
    parts += [
        f"<details><summary>{say(key, language)}</summary><p>{escape(text)}</p></details>"
        for key, text in wholes
        if text
    ]
    return f'<div class="enhancement">{"".join(parts)}</div>'


def escape(text: str) -> str:
    """Text made safe as HTML content or attribute, and as the value of a Gradio template."""
    return html.escape(text).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def _badge(text: str) -> str:
    return f'<span class="badge">{escape(text)}</span>'


def _phrases(key: str, phrases: Iterable[str], language: Language) -> str:
    items = "".join(f"<li>{escape(phrase)}</li>" for phrase in phrases)
    return f'<section class="{key}"><h2>{say(key, language)}</h2><ul>{items}</ul></section>'


def _box(kind: str, title: str, sentences: Iterable[str], more: str = "") -> str:
    paragraphs = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    role = "status" if kind == "calm" else "alert"
    return f'<div class="box {kind}" role="{role}"><strong>{escape(title)}</strong>{paragraphs}{more}</div>'
