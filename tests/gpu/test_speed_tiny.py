"""The speed suite runs whole where there is no card, and judges what its reports say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu.speed import TARGETS, main


def test_every_part_and_target_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # compiling takes half a minute, and is tried elsewhere
    monkeypatch.delenv("CXX", raising=False)
    file = tmp_path / "figures" / "speed.json"
    assert main(["--tiny", "--device", "cpu", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert set(told["parts"]) == {"plain", "tuning", "tuned", "guided", "many"}
    assert [row["target"] for row in told["targets"]] == [target.name for target in TARGETS]
    assert all(row["figure"] > 0 for row in told["targets"])
    for row, target in zip(told["targets"], TARGETS, strict=True):
        assert row["met"] == ((row["figure"] <= target.bound) == target.at_most)
    shown = capsys.readouterr().out
    assert "channels_last_vae" in shown and "compiling needs" in shown
    assert all(target.name in shown for target in TARGETS)
