"""The page's handlers on real Gradio blocks, and how the page is mounted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from serve_app.image_codec import read_parameters
from serve_app.queueing import Place
from serve_app.settings import Settings
from serve_app.ui import build_page, mount_page
from tests.serve_app.ui.painting_service import PaintingService

PROMPT, NEGATIVE, ENHANCE, REFINE, SIZE, STEPS, GUIDANCE, SEED, LOCALE = range(9)
CONTROLS = ("a red circle", "", True, True, "256x256", 8, 1.8, "", "en")


def handler(blocks: Any, name: str) -> Any:
    (function,) = {block_function.fn for block_function in blocks.fns.values() if block_function.name == name}
    return function


def by_id(updates: dict[Any, Any]) -> dict[str, Any]:
    """Updates under the components' ids; an update that is itself a component under its value."""
    return {
        component.elem_id: getattr(update, "value", update)
        for component, update in updates.items()
        if component.elem_id
    }


async def drawn(service: PaintingService, **changes: Any) -> list[dict[str, Any]]:
    values = [changes.get(str(place), value) for place, value in enumerate(CONTROLS)]
    return [by_id(updates) async for updates in handler(build_page(service), "on_draw")(*values)]


async def test_a_drawing_shows_steps_then_picture_badge_facts_and_status() -> None:
    service = PaintingService()
    updates = await drawn(service)
    bars = [update["progress"] for update in updates if "progress" in update]
    assert [f"Step {step} of 8" in bar for step, bar in enumerate(bars[1:8], start=1)] == [True] * 7
    assert bars[-1] == ""
    shown = {key: value for update in updates for key, value in update.items()}
    assert "Steps: 8 | CFG: 1.8 | bfloat16" in shown["badge"]
    assert "GPU: CUDA OK | VRAM: 5.2/12.0 GB" in shown["status"]
    assert str(service.replies[0].report.pictures[0].seed) in shown["facts"]
    assert "masterpiece" in shown["enhancement"]
    assert shown["message"] == ""


@pytest.mark.parametrize(
    ("seconds", "locale", "words"),
    [
        (12.4, "en", "Number 3 in the queue, about 12 s…"),
        (None, "en", "Number 3 in the queue…"),
        (12.4, "zh-CN", "正在排队：第 3 位，约 12 秒…"),
    ],
)
async def test_who_waits_sees_the_place(seconds: float | None, locale: str, words: str) -> None:
    updates = await drawn(PaintingService(place=Place(3, seconds)), **{str(LOCALE): locale})
    bars = [update["progress"] for update in updates if "progress" in update]
    assert words in bars[1] and bars[-1] == ""


def test_the_page_asks_for_whoever_sent_the_request() -> None:
    """Gradio draws outside of the request: by the key's name where a gate has put it, else by the address."""
    service = PaintingService()
    app = FastAPI()

    @app.middleware("http")
    async def name(request: Request, proceed: Any) -> Any:
        if key := request.headers.get("x-key"):
            request.state.caller = key
        return await proceed(request)

    page = build_page(service)
    (draws,) = [number for number, function in page.fns.items() if function.name == "on_draw"]
    with TestClient(mount_page(app, service, Settings()), client=("10.1.2.3", 50)) as client:
        for session, headers in (("one", {}), ("two", {"x-key": "ann"})):
            asked = {"fn_index": draws, "session_hash": session, "data": list(CONTROLS)}
            assert client.post("/gradio_api/queue/join", json=asked, headers=headers).status_code == 200
            events = client.get("/gradio_api/queue/data", params={"session_hash": session}).text
            assert '"process_completed"' in events, events
    assert service.callers == ["10.1.2.3", "ann"]


async def test_the_picture_and_the_download_are_the_workers_own_bytes() -> None:
    service = PaintingService()
    shown = {
        key: value for update in await drawn(service, **{str(SEED): "77"}) for key, value in update.items()
    }
    for place in ("picture", "download"):
        path = Path(shown[place]["path"] if isinstance(shown[place], dict) else shown[place])
        assert path.name == "zimage-77.png"
        assert path.read_bytes() == service.replies[0].pictures[0]
    parameters = read_parameters(service.replies[0].pictures[0])
    assert parameters is not None and "Seed: 77" in parameters


async def test_a_refusal_is_a_box_and_leaves_no_bar_behind() -> None:
    updates = await drawn(PaintingService(fails_with=RuntimeError("secrets")))
    shown = {key: value for update in updates for key, value in update.items()}
    assert shown["progress"] == ""
    assert 'class="box trouble"' in shown["message"]
    assert "secrets" not in shown["message"]
    assert "picture" not in shown


async def test_a_picture_that_cannot_be_kept_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gradio.processing_utils.save_bytes_to_cache", full)
    shown = {key: value for update in await drawn(PaintingService()) for key, value in update.items()}
    assert shown["progress"] == ""
    assert 'class="box trouble"' in shown["message"]


async def test_the_locale_of_the_browser_words_the_answer() -> None:
    updates = await drawn(PaintingService(), **{str(LOCALE): "zh-CN", str(STEPS): 2})
    shown = {key: value for update in updates for key, value in update.items()}
    assert "种子" in shown["facts"]
    assert "步数不在推荐范围内" in shown["message"]


async def test_while_the_model_loads_the_page_says_so_and_asks_again() -> None:
    refresh = handler(build_page(PaintingService(loaded=False)), "on_refresh")
    updates = await refresh(None, 8, 1.8, "en")
    shown = by_id(updates)
    assert "The model is loading…" in shown["status"]
    assert "The model is loading…" in shown["loading"]
    assert "badge" not in shown
    assert [update.active for update in updates.values() if hasattr(update, "active")] == [True]


async def test_once_the_model_is_there_the_page_offers_its_sizes_and_rests() -> None:
    refresh = handler(build_page(PaintingService()), "on_refresh")
    updates = await refresh(None, 8, 1.8, "en")
    shown = by_id(updates)
    assert shown["loading"] == ""
    assert "Steps: 8 | CFG: 1.8 | bfloat16" in shown["badge"]
    assert shown["size"] == "256x256"
    (sizes,) = [update.choices for update in updates.values() if hasattr(update, "choices")]
    assert sizes[0] == ("256 × 256 (native)", "256x256")
    assert [update.active for update in updates.values() if hasattr(update, "active")] == [False]


async def test_what_a_person_has_set_stays_when_the_model_comes() -> None:
    shown = by_id(await handler(build_page(PaintingService()), "on_refresh")("320x224", 12, 1.0, "en"))
    assert shown["size"] == "320x224"
    assert "steps" not in shown
    assert "guidance" not in shown


async def test_a_device_that_does_not_answer_is_said_to_be_unknown() -> None:
    shown = by_id(await handler(build_page(PaintingService(status=None)), "on_refresh")(None, 8, 1.8, "en"))
    assert "Device: not known" in shown["status"]


@pytest.fixture
def mounted() -> TestClient:
    app = FastAPI()

    @app.get("/healthz")
    def healthz() -> str:
        return "up"

    return TestClient(mount_page(app, PaintingService(), Settings()))


def test_routes_from_before_stay_and_the_page_takes_the_root(mounted: TestClient) -> None:
    assert mounted.get("/healthz").json() == "up"
    page = mounted.get("/")
    assert page.status_code == 200
    assert "<title>" in page.text or "gradio" in page.text


def test_the_page_offers_no_second_api(mounted: TestClient) -> None:
    assert mounted.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_the_page_takes_no_uploads_and_gives_no_files(mounted: TestClient) -> None:
    upload = mounted.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 100)})
    assert upload.status_code == 413
    assert mounted.get(f"/gradio_api/file={Path(__file__).resolve()}").status_code == 403


def test_importing_the_page_imports_neither_gradio_nor_torch_nor_ray() -> None:
    unwanted = ("gradio", "torch", "diffusers", "ray")
    program = f"import sys, serve_app.ui; print([name for name in {unwanted} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
