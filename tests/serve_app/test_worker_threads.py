from __future__ import annotations

from typing import Any

import pytest

from serve_app.settings import load_settings
from serve_app.worker import planned_threads
from zimage_engine.cpu import Cores

CORES = Cores(allowed=16, physical=8, quota=6.0)


@pytest.mark.parametrize(
    ("chosen", "variable", "threads"),
    [
        pytest.param({}, "1", 6, id="Ray's own number, from the CPU that it reserves"),
        pytest.param({}, None, 6, id="no Ray"),
        pytest.param({"worker_cpus": 4.0}, "4", 6, id="Ray's own number, of four reserved"),
        pytest.param({"worker_cpus": 0.5}, "1", 6, id="Ray's own number, of half a CPU"),
        pytest.param({}, "3", 3, id="a person's number"),
        pytest.param({"num_replicas": 2}, "1", 3, id="two share the machine"),
        pytest.param({"num_replicas": 9}, "1", 1, id="more workers than cores"),
        pytest.param({"num_replicas": 2, "cpu_threads": 5}, "1", 5, id="asked for"),
    ],
)
def test_a_worker_computes_with_the_cores_that_it_has(
    chosen: dict[str, Any], variable: str | None, threads: int
) -> None:
    assert planned_threads(load_settings(**chosen), variable, CORES).threads == threads


def test_workers_that_share_a_machine_say_so() -> None:
    told = planned_threads(load_settings(num_replicas=2), "1", CORES).because
    assert "shared by 2 workers; cpu_threads sets another number" in told
