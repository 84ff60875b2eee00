"""Jobs over HTTP, drawn by a real worker in this process."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from serve_app.jobs import desk
from serve_app.jobs.store import JobStore, Limits, NewJob
from serve_app.metrics import JOB_STATUSES, ServerMetrics
from serve_app.service import ImageService
from tests.serve_app.jobs.conftest import SMALL

JOBS = "/v1/images/jobs"


async def ended(client: httpx.AsyncClient, id: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            answer = await client.get(f"{JOBS}/{id}")
            if answer.status_code != 200 or answer.json()["status"] in ("done", "failed", "cancelled"):
                return answer.json()
            await asyncio.sleep(0.05)


def events_in(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return found


async def test_a_job_is_drawn_and_has_the_picture_of_its_seed(jobs_client: httpx.AsyncClient) -> None:
    accepted = await jobs_client.post(JOBS, json=SMALL | {"seed": 7})
    assert accepted.status_code == 202
    job = accepted.json()
    assert accepted.headers["location"] == f"{JOBS}/{job['id']}"
    assert (job["status"], job["position"], job["result"]) == ("queued", 1, None)
    done = await ended(jobs_client, job["id"])
    plain = (await jobs_client.post("/v1/images/generations", json=SMALL | {"seed": 7})).json()
    assert done["status"] == "done", done
    assert done["result"]["data"][0]["b64_json"] == plain["data"][0]["b64_json"]
    listed = (await jobs_client.get(JOBS)).json()
    assert [(each["id"], each["result"]) for each in listed["data"]] == [(job["id"], None)]


async def test_respond_async_is_the_same(jobs_client: httpx.AsyncClient) -> None:
    answer = await jobs_client.post(
        "/v1/images/generations", json=SMALL | {"response_format": "url"}, headers={"Prefer": "respond-async"}
    )
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async")
    done = await ended(jobs_client, answer.json()["id"])
    picture = await jobs_client.get(done["result"]["data"][0]["url"])
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (SMALL | {"stream": True}, 400, "invalid_value"),
        (SMALL | {"size": "9000x64"}, 400, "invalid_value"),
        (SMALL | {"model": "another"}, 404, "model_not_found"),
        (SMALL | {"webhook": "https://example.org"}, 400, "invalid_value"),
        (SMALL | {"webhook": {"url": "ftp://example.org"}}, 400, "invalid_value"),
        (SMALL | {"webhook": {"url": "https://a:b@example.org"}}, 400, "invalid_value"),
        (
            SMALL | {"webhook": {"url": "https://example.org", "secret": "whsec_c2hvcnQ="}},
            400,
            "invalid_value",
        ),
        (SMALL | {"webhook": {"url": "https://example.org", "to": 1}}, 400, "invalid_value"),
    ],
)
async def test_what_cannot_be_drawn_is_no_job(
    jobs_client: httpx.AsyncClient, body: dict[str, Any], status: int, code: str
) -> None:
    answer = await jobs_client.post(JOBS, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert (await jobs_client.get(JOBS)).json()["data"] == []


async def test_the_list_has_pages_and_a_filter(jobs_client: httpx.AsyncClient) -> None:
    ids = [(await jobs_client.post(JOBS, json=SMALL)).json()["id"] for _ in range(3)]
    first = (await jobs_client.get(JOBS, params={"limit": 2})).json()
    second = (await jobs_client.get(JOBS, params={"limit": 2, "after": first["last_id"]})).json()
    assert [each["id"] for each in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
    for id in ids:
        await ended(jobs_client, id)
    for status, count in (("done", 3), ("failed", 0)):
        page = (await jobs_client.get(JOBS, params={"status": status})).json()
        assert (len(page["data"]), page["last_id"] is None) == (count, count == 0)
    for params in ({"limit": "0"}, {"limit": "x"}, {"status": "odd"}):
        assert (await jobs_client.get(JOBS, params=params)).status_code == 400, params
    assert (await jobs_client.get(JOBS, params={"after": "job-none"})).status_code == 404


async def test_events_come_once_each_and_again_from_any_of_them(jobs_client: httpx.AsyncClient) -> None:
    id = (await jobs_client.post(JOBS, json=SMALL)).json()["id"]
    live = events_in((await jobs_client.get(f"{JOBS}/{id}/events")).text)
    types = [type for _, type, _ in live]
    assert (types[:2], types[-1]) == (["job.queued", "job.running"], "job.done")
    assert types.count("job.done") == 1
    for position, (number, _, _) in enumerate(live):
        again = await jobs_client.get(f"{JOBS}/{id}/events", headers={"Last-Event-ID": str(number)})
        assert events_in(again.text) == live[position + 1 :]
        assert again.status_code == (204 if position == len(live) - 1 else 200)
    wrong = await jobs_client.get(f"{JOBS}/{id}/events", headers={"Last-Event-ID": "x"})
    assert wrong.status_code == 400


async def test_a_job_that_is_drawn_is_cancelled_within_a_step(jobs_client: httpx.AsyncClient) -> None:
    body = SMALL | {"num_inference_steps": 100, "size": "128x128", "n": 10}
    id = (await jobs_client.post(JOBS, json=body)).json()["id"]
    async with asyncio.timeout(60):
        while not (job := (await jobs_client.get(f"{JOBS}/{id}")).json())["step"]:
            await asyncio.sleep(0.05)
    assert (job["status"], job["of"]) == ("running", 1000)
    answer = await jobs_client.delete(f"{JOBS}/{id}")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    # The only worker is free again long before the thousand steps are over.
    async with asyncio.timeout(20):
        assert (await jobs_client.post("/v1/images/generations", json=SMALL)).status_code == 200
    assert (await jobs_client.delete(f"{JOBS}/{id}")).json()["status"] == "cancelled"
    assert (await jobs_client.get(f"{JOBS}/{id}")).json()["status"] == "cancelled"


async def test_twenty_same_requests_under_one_key_are_drawn_once(
    jobs_client: httpx.AsyncClient, jobs_service: ImageService
) -> None:
    headers = {"Idempotency-Key": "8e03978e-40d5-43e8-bc93-6894a57f9324"}
    answers = await asyncio.gather(
        *(jobs_client.post("/v1/images/generations", json=SMALL, headers=headers) for _ in range(20))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 19
    assert pictures_drawn(jobs_service._metrics) == 1
    other = await jobs_client.post("/v1/images/generations", json=SMALL | {"seed": 1}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    # What stands behind a plain answer is no job of the caller's.
    assert (await jobs_client.get(JOBS)).json()["data"] == []


async def test_a_key_makes_one_job_and_a_stream_takes_none(jobs_client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "one"}
    first, second = [(await jobs_client.post(JOBS, json=SMALL, headers=headers)).json() for _ in range(2)]
    assert first["id"] == second["id"]
    for wrong in ({"Idempotency-Key": ""}, {"Idempotency-Key": "x" * 256}):
        assert (await jobs_client.post(JOBS, json=SMALL, headers=wrong)).status_code == 400
    streamed = await jobs_client.post(
        "/v1/images/generations", json=SMALL | {"stream": True}, headers={"Idempotency-Key": "two"}
    )
    assert (streamed.status_code, streamed.json()["error"]["param"]) == (400, "stream")


async def test_a_result_that_has_expired_is_gone_and_its_job_remembered(
    jobs_client: httpx.AsyncClient, jobs_app: Any, store: JobStore
) -> None:
    id = (await jobs_client.post(JOBS, json=SMALL)).json()["id"]
    await ended(jobs_client, id)
    job = store.get(id)
    assert job is not None and job.result is not None
    await jobs_app.state.results.remove(json.loads(job.result)["data"][0]["url"])
    gone = await jobs_client.get(f"{JOBS}/{id}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "result_expired")
    assert (await jobs_client.get(JOBS)).json()["data"][0]["status"] == "done"


async def test_what_is_not_there_is_404(jobs_client: httpx.AsyncClient) -> None:
    for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
        answer = await jobs_client.request(method, f"{JOBS}/job-of-nobody{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")


def pictures_drawn(metrics: ServerMetrics) -> float:
    _, text = metrics.named_text()
    lines = [line for line in text.splitlines() if line.startswith("zimage_pictures_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def picture_file(color: str, size: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), color).save(file, "PNG")
    return file.getvalue()


def mask_file(size: int = 64) -> bytes:
    """The upper half is drawn anew."""
    mask = Image.new("RGBA", (size, size), "black")
    mask.paste((0, 0, 0, 0), (0, 0, size, size // 2))
    file = io.BytesIO()
    mask.save(file, "PNG")
    return file.getvalue()


TEXTS = {"num_inference_steps": "4", "strength": "0.6", "seed": "5", "size": "64x64"}
#: What is drawn from a picture: the address, its texts, and its files.
FROM_PICTURES = [
    ("/v1/images/edits", TEXTS | {"prompt": "a blue square"}, {"image": picture_file("red")}),
    (
        "/v1/images/edits",
        TEXTS | {"prompt": "a blue square", "n": "2", "output_format": "webp"},
        {"image": picture_file("red"), "mask": mask_file()},
    ),
    ("/v1/images/variations", TEXTS, {"image": picture_file("green")}),
]


@pytest.mark.parametrize(("path", "texts", "files"), FROM_PICTURES, ids=("edit", "mask", "variation"))
async def test_what_is_drawn_from_a_picture_is_the_same_as_a_job_and_under_a_key(
    jobs_client: httpx.AsyncClient, store: JobStore, path: str, texts: dict[str, str], files: dict[str, bytes]
) -> None:
    sent: dict[str, Any] = {"data": texts, "files": {name: (name, file) for name, file in files.items()}}
    plain = await jobs_client.post(path, **sent)
    assert plain.status_code == 200, plain.text
    pictures = [each["b64_json"] for each in plain.json()["data"]]
    accepted = await jobs_client.post(path, **sent, headers={"Prefer": "respond-async"})
    assert (accepted.status_code, accepted.headers["preference-applied"]) == (202, "respond-async")
    done = await ended(jobs_client, accepted.json()["id"])
    assert [each["b64_json"] for each in done["result"]["data"]] == pictures
    assert store.files_of(done["id"]) == {}, "what it was drawn from is not kept behind its end"
    key = {"Idempotency-Key": "one"}
    first, second = [await jobs_client.post(path, **sent, headers=key) for _ in range(2)]
    assert [each["b64_json"] for each in first.json()["data"]] == pictures
    assert (second.text, second.headers["idempotent-replayed"]) == (first.text, "true")
    other = sent | {"files": sent["files"] | {"image": ("image", picture_file("yellow"))}}
    assert (await jobs_client.post(path, **other, headers=key)).status_code == 422


async def test_a_picture_that_cannot_be_drawn_from_is_no_job(jobs_client: httpx.AsyncClient) -> None:
    texts, asynchronous = TEXTS | {"prompt": "a"}, {"Prefer": "respond-async"}
    for content in (b"no picture", picture_file("red")[:100]):
        answer = await jobs_client.post(
            "/v1/images/edits", data=texts, files={"image": ("a", content)}, headers=asynchronous
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image")
    assert (await jobs_client.get(JOBS)).json()["data"] == []


@pytest.fixture
def counted_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "COUNT_SECONDS", 0.1)


@pytest.mark.usefixtures("counted_often")
async def test_metrics_tell_of_jobs_and_of_webhooks_and_the_log_of_each_job(
    jobs_client: httpx.AsyncClient,
    jobs_service: ImageService,
    store: JobStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "serve_app")
    id = (await jobs_client.post(JOBS, json=SMALL)).json()["id"]
    await ended(jobs_client, id)
    cancelled = store.accept(NewJob("", "", "of nobody here", "{}", 1.0), Limits(10, 10))[0].id
    store.accept(NewJob("", "", "of nobody here", "{}", 1.0), Limits(10, 10))
    store.cancel(cancelled)

    def told(name: str, **labels: str) -> float | None:
        _, text = jobs_service.metrics.named_text()
        found = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return found[0] if found else None

    async with asyncio.timeout(30):
        while told("zimage_jobs", status="cancelled") != 1:
            await asyncio.sleep(0.1)
    statuses = {status: told("zimage_jobs", status=status) for status in JOB_STATUSES}
    assert statuses == {"queued": 1, "running": 0, "done": 1, "failed": 0, "cancelled": 1}
    assert 0 < (told("zimage_jobs_oldest_queued_seconds") or 0) < 30
    lines = [record.getMessage() for record in caplog.records if id in record.getMessage()]
    assert [line.split(f"{id} ")[1].split(",")[0].split(":")[0] for line in lines] == [
        "is accepted",
        "is done",
    ]


REPRODUCE = "/v1/images/reproduce"
#: Bodies of `POST /v1/images/reproduce`, from the picture in base64, its receipt, and the edit's source.
DRAWN_AGAIN: dict[str, Callable[[str, dict[str, Any], str], dict[str, Any]]] = {
    "file": lambda picture, receipt, source: {
        "content": b64decode(picture),
        "headers": {"Content-Type": "image/png"},
    },
    "base64": lambda picture, receipt, source: {"json": {"image": picture}},
    "receipt": lambda picture, receipt, source: {"json": {"receipt": receipt}},
    "a-lora-that-is-no-more": lambda picture, receipt, source: {
        "json": {"receipt": receipt | {"loras": [{"name": "gone", "weight": 1.0}]}}
    },
    "edit": lambda picture, receipt, source: {"json": {"image": picture, "source": source}},
    "receipt-of-an-edit": lambda picture, receipt, source: {"json": {"receipt": receipt, "source": source}},
}


@pytest.mark.parametrize("way", DRAWN_AGAIN)
async def test_a_picture_is_drawn_again_as_a_job_and_under_a_key_as_at_once(
    jobs_client: httpx.AsyncClient, store: JobStore, way: str
) -> None:
    if "edit" in way:
        path, texts, files = FROM_PICTURES[0]
        drawn = await jobs_client.post(path, data=texts | {"receipt": "true"}, files=files)
    else:
        drawn = await jobs_client.post("/v1/images/generations", json=SMALL | {"receipt": True})
    told = drawn.json()["data"][0]
    source = b64encode(FROM_PICTURES[0][2]["image"]).decode()
    sent = DRAWN_AGAIN[way](told["b64_json"], told["receipt"], source)
    named = sent.pop("headers", {})

    async def asked(**headers: str) -> httpx.Response:
        return await jobs_client.post(REPRODUCE, **sent, headers=named | headers)

    plain = await asked()
    assert plain.json()["identical"] is True, plain.text
    assert [each["name"] for each in plain.json()["differences"]] == (["loras"] if "lora" in way else [])
    accepted = await asked(prefer="respond-async")
    assert (accepted.status_code, accepted.headers["preference-applied"]) == (202, "respond-async")
    done = await ended(jobs_client, accepted.json()["id"])
    assert done["result"] == plain.json(), done
    assert store.files_of(done["id"]) == {}
    first, second = [await asked(**{"idempotency-key": "one"}) for _ in range(2)]
    assert first.json() == plain.json()
    assert (second.text, second.headers["idempotent-replayed"]) == (first.text, "true")
    other = {"receipt": told["receipt"] | {"seed": 99}, "source": source}
    again = await jobs_client.post(REPRODUCE, json=other, headers={"Idempotency-Key": "one"})
    assert (again.status_code, again.json()["error"]["code"]) == (422, "idempotency_key_reused")


async def test_what_cannot_be_drawn_again_is_no_job(jobs_client: httpx.AsyncClient) -> None:
    drawn = await jobs_client.post("/v1/images/generations", json=SMALL | {"receipt": True})
    receipt = drawn.json()["data"][0]["receipt"]
    webhook = {"url": "https://example.org/done"}
    for body, headers, param in (
        ({"receipt": {}}, {"Prefer": "respond-async"}, "receipt"),
        ({"image": "bm8gcGljdHVyZQ=="}, {"Idempotency-Key": "one"}, "image"),
        ({"receipt": receipt | {"edit": {"strength": 0.5}}}, {"Prefer": "respond-async"}, "source"),
        ({"receipt": receipt, "webhook": "x"}, {"Prefer": "respond-async"}, "webhook"),
        ({"receipt": receipt, "webhook": webhook}, {"Idempotency-Key": "one"}, "image"),
    ):
        answer = await jobs_client.post(REPRODUCE, json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert (await jobs_client.get(JOBS)).json()["data"] == []


@pytest.mark.parametrize(("path", "texts", "files"), FROM_PICTURES[1:], ids=("mask", "variation"))
async def test_a_form_names_a_webhook_for_its_job_alone(
    jobs_client: httpx.AsyncClient, path: str, texts: dict[str, str], files: dict[str, bytes]
) -> None:
    url = "http://127.0.0.1:9/done"

    async def asked(webhook: str, **headers: str) -> httpx.Response:
        return await jobs_client.post(path, data=texts | {"webhook": webhook}, files=files, headers=headers)

    accepted = await asked(json.dumps({"url": url}), prefer="respond-async")
    assert (accepted.status_code, accepted.json()["webhook"]) == (202, {"url": url}), accepted.text
    await jobs_client.delete(f"{JOBS}/{accepted.json()['id']}")
    for wrong in (url, "[]", "{", json.dumps({"url": "ftp://example.org"})):
        refused = await asked(wrong, prefer="respond-async")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "webhook"), refused.text
    plain = await asked(json.dumps({"url": url}))
    assert (plain.status_code, plain.json()["error"]["code"]) == (400, "unknown_parameter")


async def test_a_prompt_is_enhanced_under_a_key_as_without(jobs_client: httpx.AsyncClient) -> None:
    """Nothing is drawn or kept, so a client that sends a key with every request is not refused."""
    for path in ("enhance", "analyze"):
        answers = [
            await jobs_client.post(f"/v1/prompts/{path}", json={"prompt": "a fox"}, headers=headers)
            for headers in ({}, {"Idempotency-Key": "one"}, {"Idempotency-Key": "one"})
        ]
        assert len({(each.status_code, each.text) for each in answers}) == 1, path
        assert answers[0].status_code == 200
