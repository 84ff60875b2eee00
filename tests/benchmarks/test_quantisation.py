"""The table of quantised ways is whole, and their pictures stay near those of plain matrices; no times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import quantisation
from tests.zimage_engine.memory.quantised_words import HAS_INT8
from zimage_engine.memory.residency import QUANTISATIONS

#: Mean distance of the demo model's pictures in 255 levels, about four times what was found.
BOUND = 1.5
FEW = ("--device", "cpu", "--prompts", "2", "--steps", "1")


def test_every_way_has_its_bytes_its_speed_and_its_distance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [name for name, row in QUANTISATIONS.items() if HAS_INT8 or not row.needs_int8]
    written = tmp_path / "quantisation.json"
    quantisation.main([*FEW, "--ways", ",".join(names), "--json", str(written)])
    plain, wide, *rows = json.loads(written.read_text())["ways"]
    assert (plain["way"], wide["way"]) == ("bfloat16", "float32 arithmetic")
    assert plain["distance"]["largest"] == 0.0
    assert [row["way"] for row in rows] == names
    for row in rows:
        assert row["denoiser_bytes"] < 0.7 * plain["denoiser_bytes"]
        for ratio in (row["picture_speedup"], row["denoise_speedup"]):
            assert 0 < ratio["lower_quartile"] <= ratio["median"] <= ratio["upper_quartile"]
            assert ratio["count"] == 2
        assert 0 < row["distance"]["mean"] <= row["distance"]["largest"] < BOUND
        assert row["distance"]["pictures"] == 2
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 2 + len(names) + 1
    assert all(line.startswith(name) for name, line in zip(names, printed[3:], strict=False))


def test_a_part_is_quantised_alone_and_taken_back() -> None:
    names = ("attention and feed-forward of all blocks", "  without the last block", "final layer")
    asked = quantisation.Asked(device="cpu", prompts=1, steps=1)
    whole, part, final = quantisation.parts(
        asked, "fp8", lambda _: None, {name: quantisation.PARTS[name] for name in names}
    )
    assert [row.part for row in (whole, part, final)] == list(names)
    assert (whole.layers - part.layers, final.layers) == (7, 1)
    assert whole.saved_bytes > part.saved_bytes > final.saved_bytes > 0
    assert all(0 < row.distance.mean < BOUND for row in (whole, part, final))


def test_the_synthetic_model_is_compared_with_itself() -> None:
    asked = quantisation.Asked(
        synthetic="zimage-turbo", tiny=True, device="cpu", size=(64, 64), steps=1, prompts=1
    )
    plain, other = quantisation.ways(asked, ("int8",), lambda _: None)
    assert other.denoiser_bytes < plain.denoiser_bytes
    assert other.distance.mean < 30.0


def test_another_word_is_a_sentence() -> None:
    with pytest.raises(SystemExit, match=r"--ways must be of float8, int8, fp8, .*, got int4"):
        quantisation.main(["--ways", "int8,int4"])
