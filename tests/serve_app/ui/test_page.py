"""The page's handlers on real Gradio blocks, and how the page is mounted."""

from __future__ import annotations

import asyncio
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from serve_app import openai_schema
from serve_app.history.history import Bounds, History
from serve_app.image_codec import read_parameters
from serve_app.live_settings import at_start
from serve_app.model_list import ModelState
from serve_app.queueing import Place
from serve_app.settings import Settings, load_settings
from serve_app.ui import build_page, mount_page
from serve_app.ui.status import KEPT_SECONDS, PageStatus, status_routes
from tests.serve_app.ui.painting_service import PaintingService
from zimage_engine.types import LoraChoice

PROMPT, NEGATIVE, ENHANCE, REFINE, SIZE, STEPS, GUIDANCE, SEED, MORE, LOCALE = range(10)
CONTROLS = ("a red circle", "", True, True, "256 × 256", 8, 1.8, "", "", "en")


def handler(blocks: Any, name: str) -> Any:
    (function,) = {block_function.fn for block_function in blocks.fns.values() if block_function.name == name}
    return function


def by_id(updates: dict[Any, Any]) -> dict[str, Any]:
    """The values of updates under the components' ids, be they plain updates or components."""
    return {
        component.elem_id: update["value"] if isinstance(update, dict) else update.value
        for component, update in updates.items()
        if component.elem_id
    }


async def drawn(
    service: PaintingService, history: History | None = None, **changes: Any
) -> list[dict[str, Any]]:
    values = [changes.get(str(place), value) for place, value in enumerate(CONTROLS)]
    return [by_id(updates) async for updates in handler(build_page(service, history), "on_draw")(*values)]


def told_to_scripts(facts: str) -> list[dict[str, Any]]:
    (attribute,) = re.findall(r'data-drawn="([^"]*)"', facts)
    told: list[dict[str, Any]] = json.loads(html.unescape(attribute))
    return told


async def test_a_drawing_shows_steps_then_picture_and_facts() -> None:
    service = PaintingService()
    updates = await drawn(service)
    bars = [update["progress"] for update in updates if "progress" in update]
    assert [f"Step {step} of 8" in bar for step, bar in enumerate(bars[1:8], start=1)] == [True] * 7
    assert bars[-1] == ""
    shown = {key: value for update in updates for key, value in update.items()}
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


async def test_scripts_are_told_the_parameters_that_draw_the_picture_again() -> None:
    service = PaintingService()
    more = {"n": 2, "loras": [{"name": "ink", "weight": 0.5}], "model": "disc-painter"}
    changes = {str(NEGATIVE): " blurry ", str(SEED): "7", str(SIZE): "", str(MORE): json.dumps(more)}
    shown = {key: value for update in await drawn(service, **changes) for key, value in update.items()}
    (request,) = service.requests
    assert (request.n, request.model, request.loras) == (2, "disc-painter", (LoraChoice("ink", 0.5),))
    same = {
        "prompt": "a red circle",
        "negative_prompt": "blurry",
        "size": "256x256",
        "num_inference_steps": 8,
        "guidance_scale": 1.8,
        "enhance": True,
        "refine": True,
        "loras": [{"name": "ink", "weight": 0.5}],
        "model": "disc-painter",
    }
    assert told_to_scripts(shown["facts"]) == [
        {"id": None, "parameters": {**same, "seed": 7}},
        {"id": None, "parameters": {**same, "seed": 8}},
    ]
    openai_schema.parse(same)


async def test_several_pictures_stand_together_each_with_its_seed_and_file() -> None:
    service = PaintingService()
    changes = {str(SEED): "41", str(MORE): '{"n": 3}'}
    shown = {key: value for update in await drawn(service, **changes) for key, value in update.items()}
    assert re.findall(r"<b>(\d+)</b>", shown["pictures"]) == ["41", "42", "43"]
    paths = re.findall(r'href="/gradio_api/file=([^"]+)"', shown["pictures"])
    assert [Path(path).read_bytes() for path in paths] == list(service.replies[0].pictures)
    assert all((read_parameters(Path(path).read_bytes()) or "").count("Seed: 4") for path in paths)
    one = {key: value for update in await drawn(service) for key, value in update.items()}
    assert one["pictures"] == ""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ('{"n": 11}', "n must be at most 10"),
        ("[]", "must be a JSON object"),
        ('{"model": 3}', "model must be text"),
    ],
)
async def test_what_no_script_of_the_page_sends_is_refused(more: str, words: str) -> None:
    service = PaintingService()
    shown = {
        key: value for update in await drawn(service, **{str(MORE): more}) for key, value in update.items()
    }
    assert words in shown["message"] and not service.requests


async def test_each_picture_is_kept_in_the_history(tmp_path: Path) -> None:
    bounds = Bounds(pictures=10, size_bytes=2**20, seconds=1e6)
    history = History(f"sqlite:///{tmp_path / 'index.sqlite'}", tmp_path / "pictures", bounds)
    service = PaintingService()
    try:
        changes = {str(SEED): "5", str(MORE): '{"n": 2}'}
        updates = await drawn(service, history, **changes)
        shown = {key: value for update in updates for key, value in update.items()}
        ids = [each["id"] for each in told_to_scripts(shown["facts"])]
        assert [await history.picture("", id) for id in ids] == list(service.replies[0].pictures)
        kept, _ = await history.page("", 10)
        assert {picture.parameters["seed"] for picture in kept} == {5, 6}
    finally:
        await history.close()


def status_of(service: PaintingService) -> dict[str, Any]:
    app = FastAPI()
    app.include_router(status_routes(service))
    answer = TestClient(app).get("/page/status")
    assert answer.headers["cache-control"] == "no-store"
    told: dict[str, Any] = answer.json()
    return told


def test_the_status_tells_the_device_the_queue_and_what_the_model_draws_well() -> None:
    told = status_of(PaintingService(workers=2, drawing=3, waiting=1))
    assert told["device"] == "GPU: CUDA OK | VRAM: 5.2/12.0 GB"
    assert (told["state"], told["workers"], told["drawing"], told["waiting"]) == ("ready", 2, 3, 1)
    model = told["model"]
    assert (model["steps"], model["guidance"], model["dtype"]) == (8, 1.8, "bfloat16")
    assert (model["good_steps"], model["good_guidance"]) == ([4, 12], [1.5, 2.5])
    assert model["sizes"]["1:1"] == model["native"] == [256, 256]
    assert told["models"] == [] and told["default_enhance"] is True


def test_the_status_tells_the_models_of_the_list_and_how_far_they_are() -> None:
    loading = ModelState("sketch", (), "loading", "a", progress=0.4)
    first, second = status_of(PaintingService(others=(loading,)))["models"]
    assert (first["state"], first["model"]["id"]) == ("ready", "disc-painter")
    assert (second["state"], second["progress"], second["model"]) == ("loading", 0.4, None)


def test_defaults_that_change_while_the_server_runs_reach_open_pages() -> None:
    live = at_start(load_settings()).model_copy(update={"default_enhance": False})
    assert status_of(PaintingService(live=live))["default_enhance"] is False


def test_while_the_model_loads_the_status_says_so() -> None:
    told = status_of(PaintingService(loaded=False))
    assert (told["state"], told["progress"]) == ("loading", None)
    assert status_of(PaintingService(loaded=False, loading_part=0.25))["progress"] == 0.25


def test_a_device_that_does_not_answer_is_said_to_be_unknown() -> None:
    told = status_of(PaintingService(status=None))
    assert (told["state"], told["device"]) == ("unknown", None)


async def test_a_service_that_cannot_be_asked_is_unknown_and_workers_are_asked_once_for_all_pages() -> None:
    class Counting(PaintingService):
        asked = 0

        async def device_status(self) -> Any:
            self.asked += 1
            if self.asked > 1:
                raise RuntimeError("secrets")
            return self.status

    service, now = Counting(), [0.0]
    status = PageStatus(service, clock=lambda: now[0])
    answers = await asyncio.gather(*(status.tell() for _ in range(5)))
    assert service.asked == 1 and all(answer["state"] == "ready" for answer in answers)
    now[0] = KEPT_SECONDS
    assert await status.tell() == {"state": "unknown"}


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
