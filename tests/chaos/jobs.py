"""Jobs while the worker, the ingress and the whole application are killed with -9 at random moments.

    python -m tests.chaos.jobs [--count 500] [--kills 24] [--seed 0] [--pause 4]
                               [--postgresql | --url postgresql://...]

A real server with the embedded model draws, with jobs in SQLite; `--postgresql` starts a PostgreSQL of its
own for the time, `--url` names an empty database that is there. The jobs come in portions, and in the midst
of each, after at most `--pause` seconds, one of the three is killed: each of them as often. Where it was the
application, with its supervisor, it is started again on the same data, as a service manager would. Each job
is sent under an Idempotency-Key of its own until it is accepted, has a webhook, and one in five is followed
by its events, with Last-Event-ID after each connection that broke.

Wrong is: a job that is not done, two jobs for one key, a job that nobody sent, an event or an end that comes
twice or is missing when it is asked for again, an end that no webhook tells or that two of different ids do,
a picture whose pixels are not those of an engine of this process, and a process that is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.chaos.postgresql import postgresql
from tests.chaos.serving.faults import replicas
from tests.chaos.serving.pictures import THREADS, Drawing, digest_of_file, drawn, random_drawings
from tests.running_server import RunningServer, running_server

JOBS = "/v1/images/jobs"
#: What is killed.
KINDS = ("worker", "ingress", "application")
AT_ONCE = 8
ONE_IN_FOLLOWED = 5
#: As Ray's daemons name it.
RAYS_FOLDER = re.compile(r"--temp[-_]dir[= ](\S+/zit-[^/\s]+)")
#: By this its processes are known that have lost their parents.
OURS = "ZIMAGE_DATA_DIR"
#: All of it, with what a busy machine takes to start a server: for each kill and for each job.
LONGEST_SECONDS = (400.0, 90.0, 3.0)
#: A webhook whose receiver failed is sent again after 5 and 30 s, one whose sender died after 60 s.
TOLD_SECONDS = 240.0
#: A worker or an ingress that is to be killed may be on its way back from the last time.
BACK_SECONDS = 120.0
#: Between two tries of whatever failed because something was killed.
AGAIN_SECONDS = 0.3
LAST_EVENTS = ("job.done", "job.failed", "job.cancelled")


@dataclass
class Seen:
    """What the outside saw. `ends` has the webhook ids that told of each job's end."""

    ids: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    ends: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    events: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    sent_again: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    connections_broken: int = 0
    files_of_nobody: int = 0
    wrong: list[str] = field(default_factory=list)


class Application:
    """The server, which is started again where it was killed; its address is another one then."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        data = str(folder / "data")
        self._mark = f"{OURS}={data}".encode()
        self.results = folder / "data" / "results"
        self._environment = environment | {OURS: data}
        self._context: Any = None
        #: The servers' own, which one that is killed leaves behind.
        self._folders: set[str] = set()
        self.server: RunningServer | None = None
        self.base_url = ""

    def start(self) -> None:
        self._context = running_server(environment=self._environment)
        self.server = self._context.__enter__()
        self.base_url = self.server.base_url
        told = (" ".join(process.cmdline()) for process in self.server.processes())
        self._folders |= {found for line in told for found in RAYS_FOLDER.findall(line)}

    def kill(self) -> None:
        """Every process of it at once, the launcher first so that it starts nothing anew."""
        assert self.server is not None
        for process in self.server.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        # One that came up between the look and the kill.
        while left := self.left_behind():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        self.server.process.wait()
        self.stop()

    def stop(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        self._folders.clear()

    def left_behind(self) -> list[psutil.Process]:
        """The processes that live and were started with our folder; not those that have a title by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                environment = Path(f"/proc/{process.pid}/environ").read_bytes()
                if self._mark in environment.split(b"\0") and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


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


@dataclass
class Caller:
    """A program that sends jobs, and does not give up."""

    client: httpx.AsyncClient
    application: Application
    seen: Seen
    webhook: str
    run: str

    async def asked(self, method: str, path: str, **more: Any) -> httpx.Response:
        """The answer of whoever lives; asked again while nobody answers or the server has none for us."""
        while True:
            try:
                answer = await self.client.request(method, self.application.base_url + path, **more)
            except httpx.HTTPError:
                self.seen.connections_broken += 1
            else:
                if answer.status_code < 500 and answer.status_code != 429:
                    return answer
            await asyncio.sleep(AGAIN_SECONDS)

    async def submit(self, number: int, drawing: Drawing) -> str:
        """The id of the job; empty where it was refused."""
        body = drawing.fields() | {"webhook": {"url": self.webhook}}
        headers = {"Idempotency-Key": f"{self.run}-{number}"}
        answer = await self.asked("POST", JOBS, json=body, headers=headers)
        if answer.status_code != 202:
            self.seen.wrong.append(
                f"job {number} was answered with {answer.status_code}: {answer.text[:200]}"
            )
            return ""
        id = str(answer.json()["id"])
        self.seen.ids[number].add(id)
        return id

    async def follow(self, id: str) -> None:
        """The events of one job until it has ended, however often the connection breaks."""
        told: list[tuple[int, str]] = []
        while not told or told[-1][1] not in LAST_EVENTS:
            try:
                await self._read_on(id, told)
            except (httpx.HTTPError, OSError):
                self.seen.connections_broken += 1
                await asyncio.sleep(AGAIN_SECONDS)
        self.seen.events[id] = told

    async def _read_on(self, id: str, told: list[tuple[int, str]]) -> None:
        last = {"Last-Event-ID": str(told[-1][0])} if told else {}
        url = f"{self.application.base_url}{JOBS}/{id}/events"
        async with self.client.stream("GET", url, headers=last) as answer:
            answer.raise_for_status()
            number = type = ""
            async for line in answer.aiter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    number = value
                elif name == "event":
                    type = value
                elif name == "data":
                    told.append((int(number), type))

    async def events_after(self, id: str, number: int) -> list[tuple[int, str]]:
        answer = await self.asked("GET", f"{JOBS}/{id}/events", headers={"Last-Event-ID": str(number)})
        lines = answer.text.splitlines()
        numbers = [int(line[4:]) for line in lines if line.startswith("id: ")]
        return list(zip(numbers, (line[7:] for line in lines if line.startswith("event: ")), strict=True))

    async def one(self, number: int, drawing: Drawing, places: asyncio.Semaphore) -> str:
        """The job of a drawing, accepted, and followed where its number says so."""
        async with places:
            id = await self.submit(number, drawing)
            # A client that never got the answer sends it again: it must be the same job.
            if number % 7 == 0:
                await self.submit(number, drawing)
        if id and number % ONE_IN_FOLLOWED == 0:
            await self.follow(id)
        return id

    async def until_all_ended(self) -> None:
        while True:
            left = 0
            for status in ("queued", "running"):
                answer = await self.asked("GET", JOBS, params={"status": status})
                left += len(answer.json()["data"])
            if not left:
                return
            await asyncio.sleep(AGAIN_SECONDS)

    async def all_ids(self) -> list[str]:
        """Every job that the server tells of."""
        found: list[str] = []
        params: dict[str, Any] = {"limit": 100}
        while True:
            page = (await self.asked("GET", JOBS, params=params)).json()
            found += [each["id"] for each in page["data"]]
            if not page["has_more"]:
                return found
            params["after"] = page["last_id"]


def planned(kills: int, chance: random.Random) -> list[str]:
    """What is killed and in which order: each kind as often, but for a rest."""
    kinds = list(itertools.islice(itertools.cycle(KINDS), kills))
    chance.shuffle(kinds)
    return kinds


async def kill_one(application: Application, what: str, chance: random.Random, seen: Seen) -> None:
    """Kill it, and start again what nobody else does."""
    if what == "application":
        await asyncio.to_thread(application.kill)
        seen.kills[what] += 1
        await asyncio.to_thread(application.start)
        return
    assert application.server is not None
    deadline = time.monotonic() + BACK_SECONDS
    while time.monotonic() < deadline:
        alive = await asyncio.to_thread(replicas, application.server.processes, what)
        if alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(alive).kill()
                seen.kills[what] += 1
                return
        await asyncio.sleep(AGAIN_SECONDS)
    seen.wrong.append(f"no {what} came up within {BACK_SECONDS:g} s")


async def draw_and_kill(
    caller: Caller, drawings: Sequence[Drawing], kinds: Sequence[str], chance: random.Random, pause: float
) -> list[str]:
    """The ids of the jobs, which come in portions with something killed in the midst of each but the last."""
    places = asyncio.Semaphore(AT_ONCE)
    portions = len(kinds) + 1
    sending: list[asyncio.Task[str]] = []
    async with asyncio.TaskGroup() as group:
        for portion in range(portions):
            for number in range(*(len(drawings) * edge // portions for edge in (portion, portion + 1))):
                sending.append(group.create_task(caller.one(number, drawings[number], places)))
            if portion < len(kinds):
                await asyncio.sleep(chance.uniform(0.0, pause))
                await kill_one(caller.application, kinds[portion], chance, caller.seen)
    return [each.result() for each in sending]


async def check_picture(caller: Caller, drawing: Drawing, id: str) -> bool:
    """Whether the job is done with the right picture."""
    job = (await caller.asked("GET", f"{JOBS}/{id}")).json()
    if job.get("status") != "done":
        caller.seen.wrong.append(f"job {id} is {json.dumps(job)[:300]}")
        return False
    (picture,) = job["result"]["data"]
    if picture["seed"] != drawing.seed or digest_of_file(picture["b64_json"]) != drawing.digest:
        caller.seen.wrong.append(f"job {id} has another picture than its seed {drawing.seed}")
        return False
    return True


async def check_events(caller: Caller, id: str, told: list[tuple[int, str]], chance: random.Random) -> None:
    """Whether they came once each and in order, and are the same whenever they are asked for again."""
    numbers, types = [number for number, _ in told], [type for _, type in told]
    ends = [type for type in types if type in LAST_EVENTS]
    if sorted(set(numbers)) != numbers or types[0] != "job.queued" or ends != ["job.done"]:
        caller.seen.wrong.append(f"the events of {id} came as {told}")
    place = chance.randrange(len(told))
    for number, expected in ((0, told), (numbers[place], told[place + 1 :])):
        if await caller.events_after(id, number) != expected:
            caller.seen.wrong.append(
                f"the events of {id} after {number} are others when they are asked again"
            )


async def check_all(
    caller: Caller, drawings: Sequence[Drawing], ids: Sequence[str], chance: random.Random
) -> int:
    """How many jobs have the right picture; what is wrong is noted."""
    seen, right = caller.seen, 0
    for drawing, id in zip(drawings, ids, strict=True):
        right += bool(id) and await check_picture(caller, drawing, id)
    for id, told in seen.events.items():
        await check_events(caller, id, told, chance)
    for number, found in seen.ids.items():
        if len(found) != 1:
            seen.wrong.append(f"request {number} became the jobs {sorted(found)}")
    if sorted(await caller.all_ids()) != sorted(ids):
        seen.wrong.append("the server's list of jobs is not the list of those it accepted")
    kept = sum(1 for file in caller.application.results.iterdir() if file.suffix == ".png")
    seen.files_of_nobody = kept - right
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TOLD_SECONDS):
            while len(seen.ends) < len(ids):
                await asyncio.sleep(AGAIN_SECONDS)
    for id in ids:
        if len(seen.ends[id]) != 1:
            seen.wrong.append(f"the end of {id} was told by {len(seen.ends[id])} webhooks")
    return right


async def chaos(count: int, kills: int, seed: int, url: str | None, pause: float) -> tuple[int, Seen]:
    """The number of jobs that are done as they should be, and what was seen."""
    chance, seen = random.Random(seed), Seen()
    drawings = await asyncio.to_thread(drawn, list(random_drawings(count, chance)))
    kinds = planned(kills, chance)
    right = 0
    with tempfile.TemporaryDirectory(prefix="zj-", ignore_cleanup_errors=True) as folder:
        application = Application(
            Path(folder),
            {
                "ZIMAGE_DEVICE": "cpu",
                "ZIMAGE_CPU_THREADS": str(THREADS),
                "ZIMAGE_WEBHOOK_PRIVATE_ADDRESSES": "true",
                "ZIMAGE_UI": "false",
                **({} if url is None else {"ZIMAGE_JOBS_URL": url}),
            },
        )
        try:
            async with (
                asyncio.timeout(_longest(count, kills)),
                receiver(seen) as webhook,
                httpx.AsyncClient(timeout=30, trust_env=False) as client,
            ):
                await asyncio.to_thread(application.start)
                caller = Caller(client, application, seen, webhook, f"{seed}-{time.time_ns()}")
                ids = await draw_and_kill(caller, drawings, kinds, chance, pause)
                await caller.until_all_ended()
                right = await check_all(caller, drawings, ids, chance)
        except TimeoutError:
            seen.wrong.append(f"it was not over after {_longest(count, kills):g} s")
        finally:
            await asyncio.to_thread(application.stop)
            left = application.left_behind()
            if left:
                seen.wrong.append(f"processes were left behind: {[process.name() for process in left]}")
                await asyncio.to_thread(psutil.wait_procs, left, 10)
                for process in application.left_behind():
                    process.kill()
    return right, seen


def _longest(count: int, kills: int) -> float:
    start, a_kill, a_job = LONGEST_SECONDS
    return start + a_kill * kills + a_job * count


def main() -> int:
    """0 where nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="jobs")
    parser.add_argument(
        "--kills", type=int, default=None, help="in all; left out: one for 20 jobs, 6 at least"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pause", type=float, default=4.0, help="seconds from a portion to its kill, at most"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="an empty PostgreSQL database; left out: SQLite")
    where.add_argument("--postgresql", action="store_true", help="on a PostgreSQL of its own")
    options = parser.parse_args()
    kills = max(6, options.count // 20) if options.kills is None else options.kills
    began = time.monotonic()
    with postgresql() if options.postgresql else contextlib.nullcontext(options.url) as url:
        right, seen = asyncio.run(chaos(options.count, kills, options.seed, url, options.pause))
    say = sys.stdout.write
    say(
        f"{options.count} jobs, {right} done with the right picture, "
        f"kills {dict(sorted(seen.kills.items()))}, "
        f"{len(seen.events)} followed, {sum(map(len, seen.events.values()))} events, "
        f"{len(seen.ends)} ends told, {seen.sent_again} of them again, "
        f"{seen.connections_broken} connections broken, {seen.files_of_nobody} files of nobody, "
        f"{len(seen.wrong)} wrong, {time.monotonic() - began:.0f} s\n"
    )
    for each in seen.wrong[:20]:
        say(f"wrong: {each}\n")
    return 1 if seen.wrong or right != options.count else 0


if __name__ == "__main__":
    sys.exit(main())
