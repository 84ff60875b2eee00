"""The components of the page and where they stand: three areas, ask, result and settings.

On a wide window ask and settings form one column beside the result; on a phone the result stands
between them. Knows nothing of what the components do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from serve_app.ui.texts import EXAMPLES, translations

TITLE = "Z-Image Turbo"
#: What the sliders show before the model has told its own defaults.
DEFAULT_STEPS = 8
DEFAULT_GUIDANCE_SCALE = 1.8
STEPS_RANGE = (1, 20)
GUIDANCE_RANGE = (1.0, 5.0)
#: How often a page asks whether the model has come, until it has.
LOADING_REFRESH_SECONDS = 2.0


@dataclass(frozen=True)
class Controls:
    """What a person sets. `locale` is filled by the browser with each call."""

    prompt: Any
    negative_prompt: Any
    enhance: Any
    refine: Any
    size: Any
    steps: Any
    guidance_scale: Any
    seed: Any
    generate: Any
    locale: Any

    def read(self) -> list[Any]:
        """The inputs of the drawing handler, in the order of its parameters."""
        return [
            self.prompt,
            self.negative_prompt,
            self.enhance,
            self.refine,
            self.size,
            self.steps,
            self.guidance_scale,
            self.seed,
            self.locale,
        ]


@dataclass(frozen=True)
class Board:
    """What the page shows."""

    status: Any
    badge: Any
    progress: Any
    loading: Any
    message: Any
    picture: Any
    download: Any
    reuse_seed: Any
    facts: Any
    enhancement: Any
    used_seed: Any
    timer: Any


def lay_out() -> tuple[Controls, Board]:
    """Place every component inside the Blocks that are open; CSS arranges the three areas."""
    import gradio as gr

    i18n = gr.I18n(**translations())
    with gr.Row(elem_id="masthead"):
        gr.HTML(f"<h1>{TITLE}</h1>", elem_id="title")
        badge = gr.HTML("", elem_id="badge")
        status = gr.HTML("", elem_id="status")
    with gr.Row(elem_id="board"):
        with gr.Column(elem_id="ask"):
            prompt = gr.Textbox(
                label=i18n("prompt"),
                placeholder=i18n("prompt_hint"),
                lines=3,
                max_lines=10,
                autofocus=True,
                elem_id="prompt",
            )
            with gr.Row(elem_id="examples"):
                gr.HTML(i18n("examples"), elem_id="examples-title")
                for example in EXAMPLES:
                    _example_button(example, prompt)
            generate = gr.Button(i18n("generate"), variant="primary", elem_id="generate")
        with gr.Column(elem_id="result"):
            loading = gr.HTML("", elem_id="loading")
            message = gr.HTML("", elem_id="message")
            with gr.Column(elem_id="canvas"):
                picture = gr.Image(
                    label=i18n("picture"),
                    show_label=False,
                    format="png",
                    type="filepath",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="picture",
                )
                progress = gr.HTML("", elem_id="progress")
            facts = gr.HTML("", elem_id="facts")
            with gr.Row(elem_id="actions"):
                download = gr.DownloadButton(i18n("download"), visible=False, size="md", elem_id="download")
                reuse_seed = gr.Button(i18n("reuse_seed"), visible=False, size="md", elem_id="reuse-seed")
            enhancement = gr.HTML("", elem_id="enhancement")
        with gr.Column(elem_id="settings"), gr.Group():
            enhance = gr.Checkbox(
                True, label=i18n("enhance"), info=i18n("enhance_hint"), container=True, elem_id="enhance"
            )
            refine = gr.Checkbox(
                True, label=i18n("refine"), info=i18n("refine_hint"), container=True, elem_id="refine"
            )
            negative_prompt = gr.Textbox(
                label=i18n("negative"),
                placeholder=i18n("negative_hint"),
                lines=1,
                max_lines=4,
                elem_id="negative",
            )
            with gr.Row(elem_id="size-and-seed"):
                size = gr.Dropdown(
                    choices=[],
                    value=None,
                    label=i18n("size"),
                    info=i18n("size_hint"),
                    allow_custom_value=True,
                    elem_id="size",
                )
                seed = gr.Textbox(label=i18n("seed"), info=i18n("seed_hint"), max_lines=1, elem_id="seed")
            steps = gr.Slider(
                *STEPS_RANGE,
                value=DEFAULT_STEPS,
                step=1,
                label=i18n("steps"),
                info=i18n("steps_hint"),
                elem_id="steps",
            )
            guidance_scale = gr.Slider(
                *GUIDANCE_RANGE,
                value=DEFAULT_GUIDANCE_SCALE,
                step=0.1,
                label=i18n("guidance"),
                info=i18n("guidance_hint"),
                elem_id="guidance",
            )
    locale = gr.Textbox(visible=False)
    controls = Controls(
        prompt, negative_prompt, enhance, refine, size, steps, guidance_scale, seed, generate, locale
    )
    board = Board(
        status,
        badge,
        progress,
        loading,
        message,
        picture,
        download,
        reuse_seed,
        facts,
        enhancement,
        # Not gr.State: for what one ingress then keeps of it, each open page would hold a request for ever.
        used_seed=gr.Textbox(visible="hidden"),
        timer=gr.Timer(LOADING_REFRESH_SECONDS),
    )
    return controls, board


def _example_button(example: str, prompt: Any) -> None:
    import gradio as gr

    button = gr.Button(example, size="sm", elem_classes="example")
    button.click(None, None, prompt, js=f"() => {json.dumps(example)}", api_visibility="private")
