"""The components of the page and where they stand: four areas, ask, result, settings and what is kept.

On a wide window ask and settings form one column, the result and what is kept the other; on a phone the
result stands after ask, and what is kept at the end. What must be quick is filled in by the page's own
scripts: a host is the place for it. Knows nothing of what the components do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from serve_app.ui import gallery
from serve_app.ui.texts import EXAMPLES, translations

TITLE = "Z-Image Turbo"
#: What the sliders show before the model has told its own defaults.
DEFAULT_STEPS = 8
DEFAULT_GUIDANCE_SCALE = 1.8
STEPS_RANGE = (1, 20)
GUIDANCE_RANGE = (1.0, 5.0)


@dataclass(frozen=True)
class Controls:
    """What a person sets. `more` and `locale` are filled by the browser with each call.

    `more` is what the page's own scripts hold, as JSON: the number of pictures, LoRAs and the model.
    `fill` is pressed by the scripts to set the controls of `filled` from outside.
    """

    prompt: Any
    negative_prompt: Any
    enhance: Any
    refine: Any
    size: Any
    steps: Any
    guidance_scale: Any
    seed: Any
    generate: Any
    more: Any
    locale: Any
    fill: Any

    def filled(self) -> list[Any]:
        """The controls that scripts may set, in the order that they know (`FILLED` in `controls.js`)."""
        return [
            self.prompt,
            self.negative_prompt,
            self.enhance,
            self.refine,
            self.size,
            self.steps,
            self.guidance_scale,
            self.seed,
        ]

    def read(self) -> list[Any]:
        """The inputs of the drawing handler, in the order of its parameters."""
        return [*self.filled(), self.more, self.locale]


@dataclass(frozen=True)
class Board:
    """What the page shows of a drawing."""

    progress: Any
    forming: Any
    message: Any
    picture: Any
    pictures: Any
    download: Any
    reuse_seed: Any
    facts: Any
    enhancement: Any
    used_seed: Any


def lay_out() -> tuple[Controls, Board]:
    """Place every component inside the Blocks that are open; CSS arranges the areas."""
    import gradio as gr

    i18n = gr.I18n(**translations())
    with gr.Row(elem_id="masthead"):
        gr.HTML(f"<h1>{TITLE}</h1>", elem_id="title")
        host("badge")
        host("connection")
        host("language-switch")
        host("theme-switch")
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
            host("keywords")
            with gr.Row(elem_id="examples"):
                gr.HTML(i18n("examples"), elem_id="examples-title")
                for example in EXAMPLES:
                    _example_button(example, prompt)
            with gr.Row(elem_id="draw"):
                generate = gr.Button(i18n("generate"), variant="primary", elem_id="generate")
                gr.Button(i18n("stop"), elem_id="stop")
        with gr.Column(elem_id="result"):
            host("loading")
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
                pictures = gr.HTML("", elem_id="pictures")
                forming = gr.HTML("", elem_id="forming")
                progress = gr.HTML("", elem_id="progress")
            message = gr.HTML("", elem_id="message")
            facts = gr.HTML("", elem_id="facts")
            with gr.Row(elem_id="actions"):
                download = gr.DownloadButton(i18n("download"), visible=False, size="md", elem_id="download")
                reuse_seed = gr.Button(i18n("reuse_seed"), visible=False, size="md", elem_id="reuse-seed")
            enhancement = gr.HTML("", elem_id="enhancement")
        with gr.Column(elem_id="settings"):
            with gr.Group(elem_classes="words-settings"):
                enhance = gr.Checkbox(
                    True, label=i18n("enhance"), info=i18n("enhance_hint"), container=True, elem_id="enhance"
                )
                host("enhance-preview")
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
            with gr.Group(elem_classes="drawing-settings"):
                host("profile")
                steps = gr.Slider(
                    *STEPS_RANGE, value=DEFAULT_STEPS, step=1, label=i18n("steps"), elem_id="steps"
                )
                host("steps-note")
                guidance_scale = gr.Slider(
                    *GUIDANCE_RANGE,
                    value=DEFAULT_GUIDANCE_SCALE,
                    step=0.1,
                    label=i18n("guidance"),
                    elem_id="guidance",
                )
                host("guidance-note")
            with gr.Group(elem_classes="picture-settings"):
                host("aspect")
                size = gr.Textbox(label=i18n("size"), max_lines=1, elem_id="size")
                host("size-note")
                with gr.Row(elem_id="seed-row"):
                    seed = gr.Textbox(
                        label=i18n("seed"), placeholder=i18n("seed_hint"), max_lines=1, elem_id="seed"
                    )
                    host("seed-tools")
                host("count")
            with gr.Group(elem_classes="model-settings"):
                host("model")
                host("loras")
        gallery.place()
    host("status")
    controls = Controls(
        prompt,
        negative_prompt,
        enhance,
        refine,
        size,
        steps,
        guidance_scale,
        seed,
        generate,
        more=gr.Textbox(visible=False),
        locale=gr.Textbox(visible=False),
        fill=gr.Button(visible="hidden", elem_id="fill"),
    )
    board = Board(
        progress,
        forming,
        message,
        picture,
        pictures,
        download,
        reuse_seed,
        facts,
        enhancement,
        # Not gr.State: for what one ingress then keeps of it, each open page would hold a request for ever.
        used_seed=gr.Textbox(visible="hidden"),
    )
    return controls, board


def host(elem_id: str) -> Any:
    """An empty place of this id that a script of the page fills in; Gradio never changes what is in it."""
    import gradio as gr

    return gr.HTML('<div class="host"></div>', elem_id=elem_id, elem_classes="hosting", padding=False)


def _example_button(example: str, prompt: Any) -> None:
    import gradio as gr

    button = gr.Button(example, size="sm", elem_classes="example")
    button.click(None, None, prompt, js=f"() => {json.dumps(example)}", api_visibility="private")
