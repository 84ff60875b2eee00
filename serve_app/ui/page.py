"""The Gradio page: its layout, and which control leads to which handler.

Knows nothing of how pictures are made; it calls `ImageService` as the HTTP routes do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.ui import assets, markup
from serve_app.ui.drawing import (
    Asked,
    Drawn,
    Moment,
    Refused,
    Started,
    Stepped,
    Waiting,
    WaitingForModel,
    draw,
    parameters_of,
    refused,
)
from serve_app.ui.layout import TITLE, Board, Controls, lay_out
from serve_app.ui.status import status_routes
from serve_app.ui.stopping import Stops, page_of, stop_routes, until_stopped
from serve_app.ui.texts import language_of, translations
from serve_app.worker_reply import Preview

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from serve_app.history.history import History
    from serve_app.service import ImageService
    from serve_app.settings import Settings

#: Pictures stay fetchable for a day; every hour the older ones are deleted.
PICTURE_CHECK_SECONDS, PICTURE_LIFE_SECONDS = 3600, 86400
#: Of so many pages Gradio keeps what their components show, about 200 kB each; the page needs nothing of it.
SESSIONS = 100

_STYLE = Path(__file__).with_name("page.css")
#: Gradio's frontend writes the locale that it chose for the labels here; the server words the rest alike.
_READ_LOCALE = "document.documentElement.lang"
#: With what the page's own scripts have set a moment ago.
_READ_CONTROLS = "...window.zimageAsked(values.slice(0, -2))"
#: What they hold themselves.
_READ_MORE = "window.zimageMore()"
#: Where the browser finds a file of Gradio's folder.
_FILE = "/gradio_api/file="
#: On a phone the picture stands below the button: bring it into view.
_SHOW_PICTURE = "document.getElementById('canvas').scrollIntoView({behavior: 'smooth', block: 'nearest'})"


def mount_page(
    app: FastAPI, service: ImageService, settings: Settings, history: History | None = None
) -> FastAPI:
    """Put the page at "/" of the app and return the app. Call it last: the page takes every free path.

    What is drawn on the page is kept in `history`; None: nothing is.
    """
    import gradio as gr
    from starlette.routing import Mount

    from serve_app.ui import grids  # imports Ray, which only a running server needs

    app.include_router(status_routes(service))
    app.include_router(assets.router)
    app.include_router(grids.routes(service, history))
    stops = Stops()
    app.include_router(stop_routes(stops))
    app = gr.mount_gradio_app(
        app,
        build_page(service, history, stops),
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
    (gradio,) = (route.app for route in app.routes if isinstance(route, Mount) and route.path == "")
    gradio.add_middleware(assets.PageHead)  # type: ignore[attr-defined]
    return app


def build_page(
    service: ImageService, history: History | None = None, stops: Stops | None = None
) -> gr.Blocks:
    """The page as Gradio blocks, still to be mounted (`mount_page` knows with what).

    What it draws can be ended through `stops`.
    """
    import gradio as gr

    with gr.Blocks(
        analytics_enabled=False,
        title=TITLE,
        fill_width=True,
        delete_cache=(PICTURE_CHECK_SECONDS, PICTURE_LIFE_SECONDS),
    ) as blocks:
        controls, board = lay_out()
        _connect(service, history, controls, board, stops or Stops())
    blocks.state_session_capacity = SESSIONS
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks


def _connect(
    service: ImageService, history: History | None, controls: Controls, board: Board, stops: Stops
) -> None:
    import gradio as gr

    async def on_draw(*values: Any) -> AsyncIterator[dict[Any, Any]]:
        asked = _asked(*values)
        language = asked.language
        yield _updates({board.message: "", board.forming: ""})
        with stops.of(page_of(asked.more)) as stop:
            moment: Moment | None = None
            try:
                drawing = draw(service, asked, *_asked_by())
                async with aclosing(until_stopped(drawing, stop)) as moments:
                    async for moment in moments:
                        yield _updates(await _shown(board, moment, asked, history))
            except Exception as error:  # the picture could not be kept: a full disk
                yield _updates(await _shown(board, refused(error, language), asked, history))
            if stop.is_set() and not isinstance(moment, Drawn | Refused):
                yield _updates({board.progress: markup.stopped_line(language)})

    gr.on(
        [controls.generate.click, controls.prompt.submit],
        on_draw,
        controls.read(),
        [
            board.progress,
            board.forming,
            board.message,
            board.picture,
            board.pictures,
            board.download,
            board.reuse_seed,
            board.used_seed,
            board.facts,
            board.enhancement,
        ],
        js=(
            f"(...values) => {{ {_SHOW_PICTURE}; return [{_READ_CONTROLS}, {_READ_MORE}, {_READ_LOCALE}]; }}"
        ),
        show_progress="hidden",
        trigger_mode="once",
        api_visibility="private",
    )
    controls.fill.click(
        None,
        controls.filled(),
        controls.filled(),
        js="(...values) => window.zimageFilled(values)",
        show_progress="hidden",
        api_visibility="private",
    )
    board.reuse_seed.click(
        None,
        board.used_seed,
        controls.seed,
        js="(used_seed) => used_seed",
        show_progress="hidden",
        api_visibility="private",
    )


def _updates(values: dict[Any, Any]) -> dict[Any, Any]:
    """The same, each plain value as an update of a component.

    For a page of which an output was left out before, Gradio keeps one component more of each plain value:
    some 80 kB a drawing, as long as the server knows the page.
    """
    import gradio as gr

    return {
        component: value if isinstance(value, gr.blocks.Block) else gr.update(value=value)
        for component, value in values.items()
    }


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


def _owner() -> str:
    """Whose the picture is that is being drawn: the name of the key, "" where there are none."""
    from gradio.context import LocalContext

    from serve_app.routes.history import owner_of

    request = LocalContext.request.get(None)
    return "" if request is None else owner_of(request.request.scope)


def _asked(
    prompt: str | None,
    negative_prompt: str | None,
    enhance: bool,
    refine: bool,
    size: str | None,
    steps: float,
    guidance_scale: float,
    seed: str | None,
    more: str | None,
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
        more=more or "",
        language=language_of(locale),
    )


async def _shown(
    board: Board, moment: Moment, asked: Asked, history: History | None = None
) -> dict[Any, Any]:
    """What changes on the board at a moment of a drawing; a finished picture is kept in the history."""
    language = asked.language
    match moment:
        case WaitingForModel():
            return {board.progress: markup.progress_waiting("waiting_for_model", language)}
        case Waiting():
            return {board.progress: markup.progress_queued(moment, language)}
        case Started():
            return {board.progress: markup.progress_waiting("starting", language)}
        case Stepped():
            return {board.progress: markup.progress_step(moment, language)}
        case Preview():
            return {board.forming: markup.forming(moment)}
        case Refused(sentences, theirs):
            return {board.progress: "", board.message: markup.refusal_box(sentences, theirs, language)}
        case Drawn():
            return await _drawn(board, moment, asked, history)


async def _drawn(board: Board, drawn: Drawn, asked: Asked, history: History | None) -> dict[Any, Any]:
    import gradio as gr
    from gradio.processing_utils import save_bytes_to_cache

    report, language = drawn.report, asked.language
    seeds = [made.seed for made in report.pictures]
    # The worker's own bytes, so that a download still tells how the picture was drawn.
    paths = [
        await asyncio.to_thread(save_bytes_to_cache, png, f"zimage-{seed}.png", board.picture.GRADIO_CACHE)
        for png, seed in zip(drawn.pictures, seeds, strict=True)
    ]
    parameters = [parameters_of(asked, report, seed) for seed in seeds]
    ids: list[str | None] = [None] * len(seeds)
    if history is not None:
        owner = _owner()
        kept = zip(drawn.pictures, parameters, strict=True)
        ids = [await history.keep(png, each, owner) for png, each in kept]
    several = [markup.SeveralPicture(f"{_FILE}{path}", seed) for path, seed in zip(paths, seeds, strict=True)]
    told = [{"id": id, "parameters": each} for id, each in zip(ids, parameters, strict=True)]
    warnings = dict.fromkeys(
        (*report.warnings, *(notice for made in report.pictures for notice in made.warnings))
    )
    return {
        board.progress: "",
        board.message: markup.notices_box(warnings, language, markup.guard_trace(report.pictures, language)),
        board.picture: gr.Image(value=paths[0], alt_text=report.prompt),
        board.pictures: markup.several_pictures(several, report.prompt, language) if len(paths) > 1 else "",
        # Of several each has its own beside it.
        board.download: gr.DownloadButton(value=paths[0], visible=len(paths) == 1),
        board.reuse_seed: gr.Button(visible=len(paths) == 1),
        board.used_seed: str(seeds[0]),
        board.facts: markup.facts(report, language, told),
        board.enhancement: markup.enhancement(report, language),
    }


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
        button_primary_background_fill_hover_dark="*primary_800",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
