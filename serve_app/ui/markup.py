"""The small pieces of HTML that the page fills in as things happen: pure functions from facts to text.

Everything that came from a person or a model is escaped here, and nowhere else.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING

from serve_app.ui.texts import Language, notice_sentence, say
from zimage_engine.types import (
    DeviceStatus,
    GenerationReport,
    ModelDescription,
    Notice,
    StepProgress,
)

if TYPE_CHECKING:
    from serve_app.ui.drawing import Waiting

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


def badge_of_defaults(description: ModelDescription) -> str:
    return _badge(
        badge_text(description.default_steps, description.default_guidance_scale, description.dtype)
    )


def badge_of_report(report: GenerationReport) -> str:
    return _badge(badge_text(report.num_inference_steps, report.guidance_scale, report.dtype))


def status_line(status: DeviceStatus, model: str) -> str:
    """The device, with the model's name, the device's own and the plan's reason on hovering."""
    hint = escape(" · ".join(part for part in (model, status.name, status.plan_because) if part))
    return f'<span class="status ready" title="{hint}">{escape(status_text(status))}</span>'


def status_loading(language: Language) -> str:
    return f'<span class="status loading">{say("model_loading", language)}</span>'


def status_unknown(language: Language) -> str:
    return f'<span class="status unknown">{say("device_unknown", language)}</span>'


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


def progress_step(progress: StepProgress, language: Language) -> str:
    """The bar after a step: the first half of the steps sets the outline, the second the detail."""
    step, steps = progress.step, progress.steps
    if step >= steps:
        return progress_bar(say("finishing", language), 1.0)
    half = "outline" if step <= steps / 2 else "detail"
    return progress_bar(say(half, language, step=step, steps=steps), step / steps)


def loading_box(language: Language) -> str:
    return _box("calm", say("model_loading", language), [say("model_loading_hint", language)])


def refusal_box(sentences: Iterable[str], theirs: bool, language: Language) -> str:
    """Why there is no picture; `theirs`: the person can mend it."""
    title = say("please_change" if theirs else "try_again", language)
    return _box("change" if theirs else "trouble", title, sentences)


def notices_box(notices: Iterable[Notice], language: Language) -> str:
    """What is good to know about a picture that was drawn; "" where there is nothing."""
    sentences = [notice_sentence(notice, language) for notice in notices]
    return _box("calm", say("notice", language), sentences) if sentences else ""


def facts(report: GenerationReport, language: Language) -> str:
    """Seed, size and seconds of the picture, and the LoRAs that were in force."""
    rows = {
        "used_seed": str(report.pictures[0].seed),
        "used_size": f"{report.width} × {report.height}",
        "used_time": say("seconds", language, seconds=report.seconds),
    }
    if report.loras:
        rows["used_loras"] = ", ".join(f"{lora.name} × {lora.weight:g}" for lora in report.loras)
    cells = (
        f'<div><dt>{say(key, language)}</dt><dd class="{key}">{escape(value)}</dd></div>'
        for key, value in rows.items()
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def enhancement(report: GenerationReport, language: Language) -> str:
    """What the enhancer put in and kept out, and behind a fold the whole prompts that were drawn."""
    added = report.enhancement
    parts = [
        _phrases(key, phrases, language)
        for key, phrases in (("added", added.added), ("added_negative", added.added_negative))
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
    return f'<section class="{key}"><h3>{say(key, language)}</h3><ul>{items}</ul></section>'


def _box(kind: str, title: str, sentences: Iterable[str]) -> str:
    paragraphs = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    role = "status" if kind == "calm" else "alert"
    return f'<div class="box {kind}" role="{role}"><strong>{escape(title)}</strong>{paragraphs}</div>'
