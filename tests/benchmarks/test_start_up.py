from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks import start_up
from tests.benchmarks.big_checkpoints import write_z_image_folder


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux puts files out of its cache when asked")
def test_the_benchmark_of_starting_tells_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_z_image_folder(tmp_path / "model", 5_000_000, "bfloat16")
    in_a_process, calls = start_up._run, []

    def run(how: str, model: Path, device: str, environment: dict[str, str]) -> dict[str, float]:
        """The first in a process of its own, the others without the seconds that its imports take."""
        calls.append(how)
        if len(calls) == 1:
            return in_a_process(how, model, device, environment)
        began = time.time()
        told = start_up._load(how, str(model), device)
        return {"seconds": told.pop("ready_at") - began, **told}

    monkeypatch.setattr(start_up, "_run", run)
    figures = start_up._measured(model, tmp_path / "cache", "cpu", 1, with_launch=False)
    assert calls == ["mapped", "mapped", "ahead", "ahead"]
    runs = figures["runs"]
    assert isinstance(runs, dict)
    assert list(runs) == ["disk", "read ahead", "mapped", "cached"]
    assert all(len(taken) == 1 and taken[0]["seconds"] > 0 for taken in runs.values())
    files = [path for path in model.rglob("*") if path.is_file()]
    assert figures["bytes"] == sum(path.stat().st_size for path in files)
    table = start_up._table(figures).splitlines()
    assert [line.split("  ")[0] for line in table[1:5]] == list(runs)
    assert "imported and loaded" in table[2]
