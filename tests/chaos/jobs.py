"""Jobs while the worker, the ingress and the whole application are killed with -9 at random moments.

    python -m tests.chaos.jobs [--count 500] [--seed 0] [--url sqlite|postgresql://...] [--every 12]

A real server with the embedded model draws; where the application was killed it is started again, as a
service manager would. Each job is sent under an Idempotency-Key of its own until it is accepted, has a
webhook, and one in five is followed by its events, with Last-Event-ID after each connection that broke. A
PostgreSQL database should be empty at the start.

Wrong is: a job that is not done, two jobs for one key, an event or an end that comes twice, an end that no
webhook tells or that two of different ids do, and a picture whose pixels are not those of an engine of this
process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.chaos.serving.faults import replicas
from tests.chaos.serving.pictures import THREADS, Drawing, digest_of_file, drawn, random_drawings
from tests.running_server import RunningServer, running_server

JOBS = "/v1/images/jobs"
#: What is killed, and how often beside the others; the application takes longest to come back.
TARGETS = {"worker": 4, "ingress": 4, "application": 2}
AT_ONCE = 8
ONE_IN_FOLLOWED = 5
SETTLE_SECONDS = 600.0
#: Between two tries of whatever failed because something was killed.
AGAIN_SECONDS = 0.5


@dataclass
class Seen:
    """What the outside saw. `ends` has the webhook ids that told of each job's end."""

    ids: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    ends: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    sent_again: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    connections_broken: int = 0
    wrong: list[str] = field(default_factory=list)


class Application:
    """The server, which is started again where it was killed; its address is another one then."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._context: Any = None
        self.server: RunningServer | None = None
        self.base_url = ""

    def start(self) -> None:
        self._context = running_server(environment=self._environment)
        self.server = self._context.__enter__()
        self.base_url = self.server.base_url

    def kill(self) -> None:
        """Every process of it at once, the launcher first so that it starts nothing anew."""
        assert self.server is not None
        for process in self.server.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.server.process.wait()
        self.stop()

    def stop(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)


@asynccontextmanager
async def receiver(seen: Seen) -> AsyncIterator[str]:
    """Somebody else's server, which is told of ends; now and then it fails, and is told again."""
    count = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head)}
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            count += 1
            status = 500 if count % 10 == 0 else 200
            if status == 200:
                told = seen.ends[body["data"]["id"]]
                seen.sent_again += headers["webhook-id"] in told
                told.add(headers["webhook-id"])
                if body["type"] != "job.done":
                    seen.wrong.append(f"a webhook told of {body}")
            writer.write(f"HTTP/1.1 {status} So\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/done"


async def asked(
    client: httpx.AsyncClient, application: Application, seen: Seen, method: str, path: str, **more: Any
) -> httpx.Response:
    """The answer of whoever lives; asked again while nobody answers or the server has none for us."""
    while True:
        try:
            answer = await client.request(method, application.base_url + path, **more)
        except httpx.HTTPError:
            seen.connections_broken += 1
        else:
            if answer.status_code < 500 and answer.status_code != 429:
                return answer
        await asyncio.sleep(AGAIN_SECONDS)


async def submit(
    client: httpx.AsyncClient,
    application: Application,
    seen: Seen,
    number: int,
    drawing: Drawing,
    webhook: str,
    run: str,
) -> str:
    body = drawing.fields() | {"webhook": {"url": webhook}}
    headers = {"Idempotency-Key": f"{run}-{number}"}
    answer = await asked(client, application, seen, "POST", JOBS, json=body, headers=headers)
    if answer.status_code != 202:
        seen.wrong.append(f"job {number} was answered with {answer.status_code}: {answer.text[:200]}")
        return ""
    id = str(answer.json()["id"])
    seen.ids[number].add(id)
    return id


async def follow(client: httpx.AsyncClient, application: Application, seen: Seen, id: str) -> None:
    """The events of one job until it has ended, however often the connection breaks."""
    numbers: list[int] = []
    ends = 0
    while not ends:
        last = {"Last-Event-ID": str(numbers[-1])} if numbers else {}
        try:
            url = f"{application.base_url}{JOBS}/{id}/events"
            async with client.stream("GET", url, headers=last) as answer:
                if answer.status_code == 404:
                    seen.wrong.append(f"job {id} is not known any more")
                    return
                answer.raise_for_status()
                pending: dict[str, str] = {}
                async for line in answer.aiter_lines():
                    name, _, value = line.partition(": ")
                    if name in ("id", "event"):
                        pending[name] = value
                    elif name == "data":
                        numbers.append(int(pending["id"]))
                        ends += pending["event"] in ("job.done", "job.failed", "job.cancelled")
        except (httpx.HTTPError, OSError):
            seen.connections_broken += 1
            await asyncio.sleep(AGAIN_SECONDS)
    if len(set(numbers)) != len(numbers) or numbers != sorted(numbers) or ends != 1:
        seen.wrong.append(f"the events of {id} came as {numbers}, with {ends} ends")
    again = await asked(client, application, seen, "GET", f"{JOBS}/{id}/events")
    if [int(line[4:]) for line in again.text.splitlines() if line.startswith("id: ")] != numbers:
        seen.wrong.append(f"the events of {id} are others when they are asked for again")


async def kill_now_and_then(
    application: Application,
    seen: Seen,
    chance: random.Random,
    every_seconds: float,
    enough: asyncio.Event,
) -> None:
    """Until it is enough; what was killed last is up again then."""
    names = list(TARGETS)
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(enough.wait(), chance.uniform(0.3, 1.7) * every_seconds)
            return
        (what,) = chance.choices(names, list(TARGETS.values()))
        if what == "application":
            await asyncio.to_thread(application.kill)
            seen.kills[what] += 1
            await asyncio.to_thread(application.start)
            continue
        assert application.server is not None
        alive = await asyncio.to_thread(replicas, application.server.processes, what)
        if alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(alive).kill()
                seen.kills[what] += 1


async def check(
    client: httpx.AsyncClient, application: Application, seen: Seen, drawing: Drawing, id: str
) -> bool:
    """Whether the job is done with the right picture."""
    job = (await asked(client, application, seen, "GET", f"{JOBS}/{id}")).json()
    if job.get("status") != "done":
        seen.wrong.append(f"job {id} is {json.dumps(job)[:300]}")
        return False
    (picture,) = job["result"]["data"]
    if picture["seed"] != drawing.seed or digest_of_file(picture["b64_json"]) != drawing.digest:
        seen.wrong.append(f"job {id} has another picture than its seed {drawing.seed}")
        return False
    return True


async def until_all_ended(client: httpx.AsyncClient, application: Application, seen: Seen) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        left = 0
        for status in ("queued", "running"):
            answer = await asked(client, application, seen, "GET", JOBS, params={"status": status})
            left += len(answer.json()["data"])
        if not left:
            return
        await asyncio.sleep(AGAIN_SECONDS)
    seen.wrong.append(f"not all jobs had ended after {SETTLE_SECONDS:g} s")


async def chaos(count: int, seed: int, url: str, every_seconds: float) -> tuple[int, Seen]:
    """The number of jobs that are done as they should be, and what was seen."""
    chance, seen = random.Random(seed), Seen()
    drawings = await asyncio.to_thread(drawn, list(random_drawings(count, chance)))
    run = f"{seed}-{time.time_ns()}"
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "ZIMAGE_DATA_DIR": folder,
            "ZIMAGE_DEVICE": "cpu",
            "ZIMAGE_CPU_THREADS": str(THREADS),
            "ZIMAGE_WEBHOOK_PRIVATE_ADDRESSES": "true",
            "ZIMAGE_UI": "false",
            **({} if url == "sqlite" else {"ZIMAGE_JOBS_URL": url}),
        }
        application = Application(environment)
        await asyncio.to_thread(application.start)
        try:
            async with receiver(seen) as webhook, httpx.AsyncClient(timeout=30) as client:
                enough = asyncio.Event()
                killing = asyncio.create_task(
                    kill_now_and_then(application, seen, chance, every_seconds, enough)
                )
                places = asyncio.Semaphore(AT_ONCE)

                async def one(number: int, drawing: Drawing) -> str:
                    async with places:
                        id = await submit(client, application, seen, number, drawing, webhook, run)
                        # A client that never got the answer sends it again: it must be the same job.
                        if number % 7 == 0:
                            await submit(client, application, seen, number, drawing, webhook, run)
                    if id and number % ONE_IN_FOLLOWED == 0:
                        await follow(client, application, seen, id)
                    return id

                ids = await asyncio.gather(*(one(n, drawing) for n, drawing in enumerate(drawings)))
                await until_all_ended(client, application, seen)
                enough.set()
                await killing
                right = 0
                for drawing, id in zip(drawings, ids, strict=True):
                    right += bool(id) and await check(client, application, seen, drawing, id)
                await until_told(seen, count)
        finally:
            await asyncio.to_thread(application.stop)
    for number, found in seen.ids.items():
        if len(found) != 1:
            seen.wrong.append(f"request {number} became the jobs {sorted(found)}")
    for id in ids:
        if len(seen.ends[id]) != 1:
            seen.wrong.append(f"the end of {id} was told by {len(seen.ends[id])} webhooks")
    return right, seen


async def until_told(seen: Seen, count: int) -> None:
    """Webhooks whose receiver failed, or whose sender died, come again within two minutes."""
    deadline = time.monotonic() + 150
    while len(seen.ends) < count and time.monotonic() < deadline:
        await asyncio.sleep(AGAIN_SECONDS)


def main() -> int:
    """0 where nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", default="sqlite")
    parser.add_argument("--every", type=float, default=12.0, help="seconds between two kills, on average")
    options = parser.parse_args()
    began = time.monotonic()
    right, seen = asyncio.run(chaos(options.count, options.seed, options.url, options.every))
    say = sys.stdout.write
    say(
        f"{options.count} jobs, {right} done with the right picture, kills {dict(seen.kills)}, "
        f"{seen.connections_broken} connections broken, {seen.sent_again} webhooks sent again, "
        f"{len(seen.wrong)} wrong, {time.monotonic() - began:.0f} s\n"
    )
    for each in seen.wrong[:20]:
        say(f"wrong: {each}\n")
    return 1 if seen.wrong or right != options.count else 0


if __name__ == "__main__":
    sys.exit(main())
