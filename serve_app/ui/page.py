"""The Gradio page: its layout, and which control leads to which handler.

Knows nothing of how pictures are made; it calls `ImageService` as the HTTP routes do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.ui import markup
from serve_app.ui.drawing import (
    Asked,
    Drawn,
    Moment,
    Refused,
    Started,
    Waiting,
    WaitingForModel,
    draw,
    refused,
)
from serve_app.ui.layout import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, TITLE, Board, Controls, lay_out
from serve_app.ui.sizes import sizes_that_fit
from serve_app.ui.texts import Language, language_of, say, translations
from zimage_engine.types import GenerationReport, ModelDescription, StepProgress

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from serve_app.service import ImageService
    from serve_app.settings import Settings

log = logging.getLogger(__name__)

#: Pictures stay fetchable for a day; every hour the older ones are deleted.
PICTURE_CHECK_SECONDS, PICTURE_LIFE_SECONDS = 3600, 86400

_STYLE = Path(__file__).with_name("page.css")
#: Gradio's frontend writes the locale that it chose for the labels here; the server words the rest alike.
_READ_LOCALE = "document.documentElement.lang"
#: On a phone the picture stands below the button: bring it into view.
_SHOW_PICTURE = "document.getElementById('canvas').scrollIntoView({behavior: 'smooth', block: 'nearest'})"


def mount_page(app: FastAPI, service: ImageService, settings: Settings) -> FastAPI:
    """Put the page at "/" of the app and return the app. Call it last: the page takes every free path."""
    import gradio as gr

    return gr.mount_gradio_app(
        app,
        build_page(service),
        path="/",
        server_name=settings.host,
        server_port=settings.port,
        css_paths=[_STYLE],
        theme=_theme(),
        i18n=gr.I18n(**translations()),
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=1,  # bytes: the page takes no uploads
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
    )


def build_page(service: ImageService) -> gr.Blocks:
    """The page as Gradio blocks, still to be mounted (`mount_page` knows with what)."""
    import gradio as gr

    with gr.Blocks(
        analytics_enabled=False,
        title=TITLE,
        fill_width=True,
        delete_cache=(PICTURE_CHECK_SECONDS, PICTURE_LIFE_SECONDS),
    ) as blocks:
        controls, board = lay_out()
        _connect(blocks, service, controls, board)
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks


def _connect(blocks: gr.Blocks, service: ImageService, controls: Controls, board: Board) -> None:
    import gradio as gr

    async def on_draw(*values: Any) -> AsyncIterator[dict[Any, Any]]:
        asked = _asked(*values)
        language = asked.language
        yield {board.message: ""}
        try:
            async with aclosing(draw(service, asked, *_asked_by())) as moments:
                async for moment in moments:
                    yield await _shown(board, moment, language)
        except Exception as error:  # the picture could not be kept: a full disk
            yield await _shown(board, refused(error, language), language)
        yield {board.status: await _status(service, language)}

    async def on_refresh(
        size: str | None, steps: float, guidance_scale: float, locale: str
    ) -> dict[Any, Any]:
        language = language_of(locale)
        description = await _description(service)
        updates: dict[Any, Any] = {board.status: await _status(service, language)}
        if description is None:
            return updates | {board.loading: markup.loading_box(language), board.timer: gr.Timer(active=True)}
        updates |= {
            board.badge: markup.badge_of_defaults(description),
            board.loading: "",
            board.timer: gr.Timer(active=False),
            controls.size: _size_choices(description, size, language),
        }
        # What a person has moved already stays where they put it.
        if steps == DEFAULT_STEPS:
            updates[controls.steps] = description.default_steps
        if guidance_scale == DEFAULT_GUIDANCE_SCALE:
            updates[controls.guidance_scale] = description.default_guidance_scale
        return updates

    async def on_load() -> Any:
        # It is ticked already; who has taken the tick away since must not find it there again.
        return gr.skip() if service.live.default_enhance else False

    shown = [
        board.progress,
        board.message,
        board.picture,
        board.download,
        board.reuse_seed,
        board.used_seed,
        board.badge,
        board.facts,
        board.enhancement,
        board.status,
    ]
    refreshed = [
        board.status,
        board.badge,
        board.loading,
        board.timer,
        controls.size,
        controls.steps,
        controls.guidance_scale,
    ]
    gr.on(
        [controls.generate.click, controls.prompt.submit],
        on_draw,
        controls.read(),
        shown,
        js=f"(...values) => {{ {_SHOW_PICTURE}; return [...values.slice(0, -1), {_READ_LOCALE}]; }}",
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
    )
    gr.on(
        [blocks.load, board.timer.tick],
        on_refresh,
        [controls.size, controls.steps, controls.guidance_scale, controls.locale],
        refreshed,
        js=f"(...values) => [...values.slice(0, -1), {_READ_LOCALE}]",
        show_progress="hidden",
        api_visibility="private",
    )
    blocks.load(on_load, None, controls.enhance, show_progress="hidden", api_visibility="private")
    board.reuse_seed.click(
        None,
        board.used_seed,
        controls.seed,
        js="(used_seed) => used_seed",
        show_progress="hidden",
        api_visibility="private",
    )


def _asked_by() -> tuple[str, str]:
    """Who pressed the button, and the id of the request that said so.

    Gradio draws outside of that request, and keeps it at hand.
    """
    from gradio.context import LocalContext

    from serve_app.routes.answers import asked_by

    request = LocalContext.request.get(None)
    if request is None:
        return "", ""
    return asked_by(request.request.scope), request.request.headers.get("x-request-id", "")


def _asked(
    prompt: str | None,
    negative_prompt: str | None,
    enhance: bool,
    refine: bool,
    size: str | None,
    steps: float,
    guidance_scale: float,
    seed: str | None,
    locale: str | None,
) -> Asked:
    return Asked(
        prompt=prompt or "",
        negative_prompt=negative_prompt or "",
        enhance=enhance,
        refine=refine,
        size=size or "",
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed or "",
        language=language_of(locale),
    )


async def _shown(board: Board, moment: Moment, language: Language) -> dict[Any, Any]:
    """What changes on the board at a moment of a drawing."""
    match moment:
        case WaitingForModel():
            return {board.progress: markup.progress_waiting("waiting_for_model", language)}
        case Waiting():
            return {board.progress: markup.progress_queued(moment, language)}
        case Started():
            return {board.progress: markup.progress_waiting("starting", language)}
        case StepProgress():
            return {board.progress: markup.progress_step(moment, language)}
        case Refused(sentences, theirs):
            return {board.progress: "", board.message: markup.refusal_box(sentences, theirs, language)}
        case Drawn(png, report):
            return await _picture(board, png, report, language)


async def _picture(board: Board, png: bytes, report: GenerationReport, language: Language) -> dict[Any, Any]:
    import gradio as gr
    from gradio.processing_utils import save_bytes_to_cache

    seed = str(report.pictures[0].seed)
    # The worker's own bytes, so that a download still tells how the picture was drawn.
    path = await asyncio.to_thread(save_bytes_to_cache, png, f"zimage-{seed}.png", board.picture.GRADIO_CACHE)
    notices = (*report.warnings, *report.pictures[0].warnings)
    return {
        board.progress: "",
        board.message: markup.notices_box(notices, language),
        board.picture: gr.Image(value=path, alt_text=report.prompt),
        board.download: gr.DownloadButton(value=path, visible=True),
        board.reuse_seed: gr.Button(visible=True),
        board.used_seed: seed,
        board.badge: markup.badge_of_report(report),
        board.facts: markup.facts(report, language),
        board.enhancement: markup.enhancement(report, language),
    }


async def _description(service: ImageService) -> ModelDescription | None:
    try:
        return await service.description()
    except Exception:
        log.exception("the page could not learn which model is loaded")
        return None


async def _status(service: ImageService, language: Language) -> str:
    """The status line; a page edge, so a device that cannot be asked is said and logged, not raised."""
    try:
        description = await service.description()
        status = await service.device_status() if description else None
    except Exception:
        log.exception("the page could not ask for the device's status")
        return markup.status_unknown(language)
    if description is None:
        return markup.status_loading(language)
    if status is None:
        return markup.status_unknown(language)
    return markup.status_line(status, description.id)


def _size_choices(description: ModelDescription, chosen: str | None, language: Language) -> Any:
    """The dropdown for the model; what was chosen or typed before stays."""
    import gradio as gr

    native, *others = sizes_that_fit(description)
    choices = [(f"{native[0]} × {native[1]} ({say('native', language)})", f"{native[0]}x{native[1]}")]
    choices += [(f"{width} × {height}", f"{width}x{height}") for width, height in others]
    return gr.Dropdown(choices=choices, value=chosen or choices[0][1])


def _theme() -> gr.Theme:
    """Calm neutrals, and the fonts that the reader's own system has for English and Chinese."""
    import gradio as gr

    fonts = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_lg,
        font=fonts,
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )
    # The hue's own choices are too faint to read: these reach a contrast of 4.5 to 1.
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        input_placeholder_color="*neutral_500",
    )
