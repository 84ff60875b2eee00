"""Where the page keeps what was drawn: containers that the page's scripts fill.

Knows nothing of pictures: `static/gallery.js`, `grid.js` and `drop.js` build what stands in here.
"""

from __future__ import annotations

#: The ids of the containers, from the top to the bottom.
PLACES: tuple[str, ...] = ("share", "grid", "gallery")


def place() -> None:
    """Put the containers into the Blocks that are open."""
    import gradio as gr

    with gr.Column(elem_id="keep", elem_classes="kept"):
        for place in PLACES:
            gr.HTML('<div class="host"></div>', elem_id=place, padding=False, apply_default_css=False)
