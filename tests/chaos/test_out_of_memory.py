"""Memory that runs out spoils no picture, and not the next one."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.out_of_memory import endure


def test_pictures_and_controls_stay_the_same_while_memory_runs_out(tmp_path: Path) -> None:
    tally = endure(count=30, seed=1, folder=tmp_path / "tiny")
    assert not tally.wrong
    assert tally.endings["drawn"] >= 20
    assert {"freed", "leaner"} <= set(tally.recoveries)
    assert len(tally.offloads) >= 2
