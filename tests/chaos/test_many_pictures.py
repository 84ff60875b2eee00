"""Whatever befalls a picture, the next one is as from a fresh engine."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.many_pictures import endure


def test_after_each_of_many_disturbed_pictures_the_control_is_bit_identical(tmp_path: Path) -> None:
    tally = endure(count=25, seed=1, folder=tmp_path)

    assert not tally.wrong
    assert tally.pictures == 25
    kinds = {kind for kind, _ in tally.endings}
    assert {"none", "fault"} <= kinds and any("cancel" in kind for kind in kinds)
    assert {ended for _, ended in tally.endings} > {"drawn"}
    assert tally.injected and tally.trips
