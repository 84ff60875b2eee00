"""A short form of the whole stack beside the bare pipeline: it runs, is whole and agrees with itself."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from tests.benchmarks.stack_overhead import lines_of, measure
from tests.running_server import RunningServer

pytestmark = pytest.mark.server


def test_a_running_server_and_the_bare_pipeline_draw_the_same_and_all_of_it_is_told(
    launched: RunningServer,
) -> None:
    found = measure(launched, side_px=64, pictures=2, warm_up=1)

    assert found.largest_difference == 0
    assert found.stack.count == found.engine.count == found.pictures == 2
    assert found.stack.median > found.engine.median > 0
    assert found.around_engine_ms.median > found.file_ms > 0
    assert found.request_ms.median > found.around_engine_ms.median
    assert found.idle_cores >= 0
    told = "\n".join(lines_of(found))
    for name in (
        "whole stack / bare",
        "engine / bare",
        "engine over bare",
        "around the engine",
        "idle server",
    ):
        assert name in told
    assert json.loads(json.dumps(asdict(found)))["side_px"] == 64
