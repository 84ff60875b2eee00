"""`zimage-turbo bench` runs whole and tells all; no test looks at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import zimage_engine.bench
from serve_app.cli import app
from zimage_engine.bench import report as reports

SCHEMA = json.loads((Path(zimage_engine.bench.__file__).parent / "report.schema.json").read_text())


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "--device", "cpu", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All reports of one tiny run beside stock diffusers, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    files = ("--json", str(folder / "new" / "all.json"), "--markdown", str(folder / "all.md"))
    ran = run("--tiny", "--compare-stock", "--size", "64x64,96x64", *files)
    assert ran.exit_code == 0, ran.output
    (folder / "terminal.txt").write_text(ran.stdout)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "new" / "all.json").read_text())
    return found


def test_the_report_is_as_documented(report: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(report, SCHEMA)
    assert [(case["width_px"], case["height_px"]) for case in report["cases"]] == [(64, 64), (96, 64)]
    assert report["model"]["parameters"]["denoiser"] > 6e6 and report["model"]["weights"] == "files"
    assert any("no figure means anything" in note for note in report["notes"])


def test_its_figures_agree_with_one_another(report: dict[str, Any]) -> None:
    for case in report["cases"]:
        stages, ratios = case["stages"], case["ratios"]
        assert case["accelerated_by"] == []
        assert set(ratios) == set(reports.RATIOS) - {"acceleration"}
        assert len(stages["steps"]) == case["steps"] == case["work"]["denoiser_calls"] == 2
        for spread in (*stages["steps"], *ratios.values(), *(stages[name] for name in reports.STAGES)):
            assert 0 < spread["lower_quartile"] <= spread["median"] <= spread["upper_quartile"]
        parts = sum(stages[name]["median"] for name in ("encode", "denoise", "decode"))
        # Of two pictures the median is the mean, which adds up.
        assert stages["picture"]["median"] == pytest.approx(parts, rel=1e-6)
        limit = case["limit"]
        assert ratios["denoise_over_limit"]["median"] == pytest.approx(1 / limit["share_reached"])
        assert case["stock"]["pictures"] == {
            "compared": 2,
            "largest_difference": 0,
            "mean_difference": 0.0,
        }
        assert case["guard_trips"] == 0
        assert [row["at_once"] for row in case["at_once"]] == [1, 2]
        for row in case["at_once"]:
            assert row["pictures"] == row["answer_seconds"]["count"] == 2 * row["at_once"]
            assert row["pictures_a_minute"] == pytest.approx(60 * row["pictures"] / row["seconds"])
            assert row["answer_seconds"]["upper_quartile"] <= row["seconds"]
    small, wide = report["cases"]
    assert wide["work"]["decode_flops"] > small["work"]["decode_flops"]


def test_people_are_told_the_same(folder: Path, report: dict[str, Any]) -> None:
    shown, page = ((folder / name).read_text() for name in ("terminal.txt", "all.md"))
    assert max(map(len, shown.splitlines())) <= 110
    for text in (shown, page):
        for title in (*reports.STAGES.values(), *reports.RATIOS):
            assert (title in text) == (title != "acceleration")
        assert "64x64, 2 steps, guidance 1.8" in text and "96x64" in text
        assert "equal in every pixel" in text
        assert report["commit"] is None or f"commit {report['commit'][:10]}" in text
    assert "![seconds by stage, and pictures a minute](all.png)" in page
    with Image.open(folder / "all.png") as picture:
        assert picture.width > 600


def test_random_weights_are_cut_to_size_and_said_to_be() -> None:
    ran = run("--tiny", "--synthetic", "zimage-turbo", "--layers", "1", "--guidance", "1")
    assert ran.exit_code == 0, ran.output
    assert "random z-image-turbo cut to 1 layers" in ran.stdout
    assert "guidance off" in ran.stdout and "guidance_cost" not in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--size", "1000"), "--size must be width x height"),
        (("--size", "100x100"), "must be a multiple of 32, got 100"),
        (("--steps", "0"), "--steps must be from 1 to 100"),
        (("--synthetic", "sdxl"), "--synthetic must be zimage-turbo"),
        (("--layers", "2"), "give --synthetic too"),
        (("--model", "x", "--synthetic", "zimage-turbo"), "leave out --model or --synthetic"),
        (("--json", "."), "is a folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_measured_is_said_before_anything_is(arguments: tuple[str, ...], said: str) -> None:
    ran = run("--tiny", *arguments)
    assert ran.exit_code == 2
    assert said in ran.stderr
