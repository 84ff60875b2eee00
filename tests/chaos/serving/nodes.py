"""Two Ray nodes on this machine with a worker on each; one node is lost under load, and another one joins."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from serve_app.keys import DRAW, READ, add_key
from tests.chaos.serving.faults import TITLES, replicas
from tests.chaos.serving.ledger import Kill, Ledger
from tests.chaos.serving.load import (
    OVERLOAD,
    PLACES,
    Result,
    Target,
    account,
    account_of_kills,
    callers,
    capacity,
    traffic,
)
from tests.chaos.serving.pictures import THREADS, Drawing
from tests.ports import free_ports

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 128 * 2**20
JOIN_SECONDS = 90.0


@dataclass(frozen=True)
class TwoNodes:
    """The cluster, its second node, and the server on both."""

    cluster: Cluster
    second: Any
    target: Target

    def processes_of_second(self) -> list[psutil.Process]:
        raylets = [psutil.Process(each.process.pid) for each in self.second.all_processes["raylet"]]
        return [each for raylet in raylets for each in (raylet, *raylet.children(recursive=True))]

    def lose_second(self) -> None:
        """kill -9 of everything on it, at once."""
        for process in self.processes_of_second():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


@contextmanager
def two_nodes(drawings: tuple[Drawing, ...]) -> Iterator[TwoNodes]:
    """Each node has one CPU and so one worker."""
    # Ray lets its workers yield to everything else on the machine; here somebody waits for them.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from serve_app.app import build
    from serve_app.settings import load_settings

    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="zit-") as folder:
        # Where Ray notes the cluster that others of this user would connect to: not for this one.
        (Path(folder) / "ray").mkdir()
        os.environ["RAY_TMPDIR"] = folder
        file = Path(folder) / "keys"
        keys = {name: add_key(file, name, [DRAW, READ]) for name in ("key-1", "key-2", "key-3")}
        settings = load_settings(
            port=port,
            num_replicas=2,
            worker_cpus=1,
            cpu_threads=THREADS,
            device="cpu",
            ui=False,
            max_queued_requests=PLACES,
            api_keys_file=file,
        )
        node = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            second = cluster.add_node(**node)
            ray.init(address=cluster.address, namespace="serve", logging_level="ERROR", log_to_driver=False)
            quiet = {"log_level": "ERROR", "enable_access_log": False}
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": settings.host, "port": port},
                logging_config=quiet,
            )
            serve.run(build(settings), name="default", logging_config=quiet)
            target = Target(settings.url, keys, drawings, lambda: psutil.Process().children(recursive=True))
            yield TwoNodes(cluster, second, target)
        finally:
            ours = psutil.Process().children(recursive=True)
            ray.shutdown()
            cluster.shutdown()
            _, alive = psutil.wait_procs(ours, timeout=5)
            for process in alive:
                process.kill()
            psutil.wait_procs(alive, timeout=5)


async def lose_a_node(nodes: TwoNodes, seconds: float, seed: int) -> Result:
    """Twice the capacity of both; after a third of the time one node is lost, and later another one joins."""
    found, ledger, chance = Result("A node is lost under load"), Ledger(), random.Random(seed)
    there = {what: len(replicas(nodes.processes_of_second, what)) for what in TITLES}
    found.must(there["worker"] == 1, f"the second node has {there['worker']} workers, expected one")
    rate = await capacity(nodes.target, min(8.0, seconds / 4))
    async with callers(nodes.target, ledger, chance) as asking:
        sending = asyncio.create_task(
            traffic(asking, nodes.target.drawings, OVERLOAD * rate, seconds, chance, insistent=True)
        )
        await asyncio.sleep(seconds / 3)
        lost_at = time.monotonic()
        ledger.kills.append(Kill("node", lost_at))
        await asyncio.to_thread(nodes.lose_second)
        await asyncio.sleep(seconds / 3)
        joined_at = time.monotonic()
        # In this thread, which the signals of a node must be set from; the clients stand still meanwhile.
        nodes.cluster.add_node(wait=False, num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
        back = await _until(lambda: len(replicas(nodes.target.processes, "worker")) == 2, JOIN_SECONDS)
        back_after = time.monotonic() - joined_at
        await sending
    ledger.judge(ledger.killed_just_before)
    account(found, ledger, seconds, rate)
    account_of_kills(found, ledger)
    answered_at = sorted(entry.ended_at for entry in ledger.answered_pictures())
    gaps = [(later - earlier, earlier) for earlier, later in itertools.pairwise(answered_at)]
    found.figures |= {
        "on the lost node": there,
        "longest time without a picture before and after": [
            max((gap for gap, at in gaps if at < lost_at - 1), default=0.0),
            max((gap for gap, at in gaps if at >= lost_at - 1), default=0.0),
        ],
        "seconds from a new node to its worker's process": back_after,
    }
    found.must(back, f"no second worker came up on the new node within {JOIN_SECONDS:g} s")
    return found


async def _until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(holds):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.5)
    return True
