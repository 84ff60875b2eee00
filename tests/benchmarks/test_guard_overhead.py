"""The benchmark of the guard runs at tiny size, and a transient fault costs one call of the denoiser."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from tests.benchmarks import guard_overhead
from zimage_engine import Engine
from zimage_engine.memory.snapshot import device_clock
from zimage_engine.sampling.pipeline import DrawnPicture, GuardedPipeline


def test_the_benchmark_still_runs() -> None:
    size = ["--pairs", "2", "--real-pairs", "2", "--layers", "1", "--heads", "1", "--side", "64"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.guard_overhead", *size],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for row in ("draw", "generate", "real", "retry"):
        assert re.search(rf"^{row} +[\d.]+ms +[\d.]+ms +[\d.]+  [\d.]+ to [\d.]+$", done.stdout, re.M), (
            done.stdout
        )
    assert "retry: 8 calls of the denoiser undisturbed, 9 with one fault at step 4" in done.stdout


@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_transient_fault_costs_one_more_call_and_no_other_picture(step: int) -> None:
    engine = Engine.load(device="cpu", exact=True)
    plan = guard_overhead.plan_for(guard_overhead.DEMO_SIDE_PX, guard_overhead.DEMO_STEPS, 1.8)
    guarded = GuardedPipeline(engine.pipeline, guard_overhead.FAMILY, device_clock("cpu"))
    embeddings = guarded.encode(plan, max_tokens=512)
    stock, ours = guard_overhead.both_ways(engine.pipeline, plan, embeddings)
    fault = guard_overhead.OneFault()
    engine.pipeline.transformer.register_forward_hook(fault)

    fault.at = step
    drawn = ours()

    assert isinstance(drawn, DrawnPicture)
    assert fault.calls == guard_overhead.DEMO_STEPS + 1
    assert [trip.recovered_by for trip in drawn.trace.trips] == ["same_inputs"]
    assert drawn.image.tobytes() == stock().images[0].tobytes()  # type: ignore[attr-defined]


def test_pairs_take_turns_and_keep_their_times_apart() -> None:
    order: list[str] = []

    def taking(seconds: float, name: str) -> None:
        order.append(name)
        time.sleep(seconds)

    pairs = guard_overhead.measure_pairs(lambda: taking(0.01, "stock"), lambda: taking(0.05, "ours"), 4)

    assert order[2:] == ["ours", "stock", "stock", "ours"] * 2
    assert pairs.ratio > 2
    assert pairs.ours_seconds > pairs.stock_seconds
