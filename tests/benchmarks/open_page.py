"""What an open page leaves behind in server and browser: counts and bytes after a day's drawings and looks.

    python -m tests.benchmarks.open_page [--drawings 960] [--stops 96] [--looks 7200] [--pages 300]

The defaults are eight hours of one page: a drawing every 30 seconds, one in ten stopped, and a look at the
server's status every four; then as many pages more are opened, drawn on and closed. The page is the real one
in Chromium, over a service that paints without a model; the server is a process of its own. Each count is
taken after garbage was collected on both sides.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

MODULE = "tests.benchmarks.open_page"
STEP_SECONDS = 0.01
#: Whose objects are counted one by one: what a page could leave behind in the server.
OURS = ("gradio", "serve_app", "starlette", "fastapi", "asyncio")

#: A click is lost for the moment in which Gradio's page still ends the drawing before.
_CLICK = """
  const shown = () => document.querySelector("#progress .progress") !== null;
  const frame = () => new Promise(requestAnimationFrame);
  const clicked = async () => {
    while (!shown()) { document.getElementById("generate").click(); await frame(); await frame(); }
  };
"""
_DRAW = f"""async () => {{{_CLICK}
  const drawn = new Promise((done) => addEventListener("zimage:drawn", done, {{once: true}}));
  await clicked();
  await drawn;
  while (shown()) await frame();
}}"""
_STOP = f"""async () => {{{_CLICK}
  await clicked();
  document.getElementById("stop").click();
  while (shown()) await frame();
}}"""
_LOOK = """async (times) => {
  for (let time = 0; time < times; time += 1) {
    const told = new Promise((done) => addEventListener("zimage:status", done, {once: true}));
    document.dispatchEvent(new Event("visibilitychange"));
    await told;
  }
}"""


@dataclass(frozen=True)
class Left:
    """What there is in the browser (bytes of its heap, nodes, listeners) and in the server at one moment.

    `tables` are the sizes of what Gradio keeps of events and sessions; `objects` are of the modules OURS.
    """

    heap_bytes: int
    nodes: int
    listeners: int
    objects: int
    tasks: int
    rss_bytes: int
    tables: dict[str, int]


def draw(page: Page, times: int) -> None:
    for _ in range(times):
        page.evaluate(_DRAW)


def stop(page: Page, times: int) -> None:
    for _ in range(times):
        page.evaluate(_STOP)


def look(page: Page, times: int) -> None:
    """So many questions how the server is, one after another."""
    page.evaluate(_LOOK, times)


def left(page: Page, url: str) -> Left:
    """Both sides, after their garbage is gone."""
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    for _ in range(3):
        devtools.send("HeapProfiler.collectGarbage")
    told = {each["name"]: each["value"] for each in devtools.send("Performance.getMetrics")["metrics"]}
    devtools.detach()
    server = httpx.get(f"{url}figures", timeout=60).json()
    return Left(
        heap_bytes=int(told["JSHeapUsedSize"]),
        nodes=int(told["Nodes"]),
        listeners=int(told["JSEventListeners"]),
        **server,
    )


@contextmanager
def served() -> Iterator[str]:
    """The address of the page's server, a process of its own."""
    command = [sys.executable, "-m", MODULE, "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def opened(browser: Browser, url: str) -> Page:
    page = browser.new_context(locale="en-US").new_page()
    page.goto(url)
    page.locator("#prompt textarea").fill("a red circle")
    page.locator("#badge .badge").wait_for()
    return page


def main() -> None:
    """Serve, or draw and look and print what is left."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--drawings", type=int, default=960)
    asked.add_argument("--stops", type=int, default=96)
    asked.add_argument("--looks", type=int, default=7200)
    asked.add_argument("--pages", type=int, default=300)
    asked.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = asked.parse_args()
    if chosen.serve:
        asyncio.run(_serve())
        return
    with served() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = opened(browser, url)
        draw(page, 10)
        stop(page, 2)
        look(page, 20)
        _print("at first", left(page, url))
        draw(page, chosen.drawings)
        _print(f"after {chosen.drawings} drawings", left(page, url))
        stop(page, chosen.stops)
        _print(f"after {chosen.stops} that were stopped", left(page, url))
        look(page, chosen.looks)
        _print(f"after {chosen.looks} looks", left(page, url))
        for _ in range(chosen.pages):
            other = opened(browser, url)
            draw(other, 1)
            other.context.close()
        _print(f"after {chosen.pages} more pages", left(page, url))


async def _serve() -> None:
    import uvicorn
    from fastapi import FastAPI
    from starlette.routing import Mount

    from serve_app.gates import add_gates
    from serve_app.settings import Settings
    from serve_app.ui import mount_page
    from tests.serve_app.ui.painting_service import PaintingService

    service = PaintingService(step_seconds=STEP_SECONDS)
    app = FastAPI()
    add_gates(app, Settings())

    @app.get("/figures")
    async def figures() -> dict[str, Any]:
        for told in (service.requests, service.replies, service.callers):
            told.clear()
        gc.collect()
        gradio = next(route.app for route in app.routes if isinstance(route, Mount) and route.path == "")
        return {
            "objects": sum(_counted().values()),
            "tasks": len(asyncio.all_tasks()),
            "rss_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            "tables": _tables(gradio),
        }

    mount_page(app, service, Settings())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    sys.stdout.write(f"http://127.0.0.1:{port}/\n")
    sys.stdout.flush()
    await serving


def _counted() -> Counter[str]:
    kinds = (type(each) for each in gc.get_objects())
    return Counter(
        kind.__name__
        for kind in kinds
        if isinstance(kind.__module__, str) and kind.__module__.startswith(OURS)
    )


def _tables(gradio: Any) -> dict[str, int]:
    blocks = gradio.get_blocks()
    queue = blocks._queue
    return {
        "sessions": len(gradio.state_holder.session_data),
        "components": sum(
            len(each.blocks_config.blocks) for each in gradio.state_holder.session_data.values()
        ),
        "messages": len(queue.pending_messages_per_session),
        "events": len(queue.event_ids_to_events),
        "iterators": len(gradio.iterators) + len(gradio.iterators_to_reset),
        "differences": sum(len(runs) for runs in blocks.pending_diff_streams.values()),
    }


def _print(when: str, found: Left) -> None:
    tables = ", ".join(f"{count} {name}" for name, count in found.tables.items())
    browser = f"{found.heap_bytes / 1e6:.1f} MB, {found.nodes} nodes, {found.listeners} listeners"
    server = f"{found.rss_bytes / 1e6:.0f} MB, {found.objects} objects, {found.tasks} tasks, {tables}"
    sys.stdout.write(f"{when:<28} browser: {browser}; server: {server}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
