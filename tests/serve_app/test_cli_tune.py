"""`zimage-turbo tune` measures, tells all of it in a table, and shows and forgets what it has remembered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from serve_app import cli_tune
from serve_app.cli import app
from zimage_engine import tuning


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", *arguments])


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """The quickest there is, in a cache of its own and without a compiler, which would take half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PATH", str(tmp_path_factory.mktemp("no-programs")))
        patch.delenv("CXX", raising=False)
        model = ("--model", str(tiny_model), "--device", "cpu", "--threads", "1")
        yield (*model, "--size", "64x64", "--steps", "2", "--repeat", "2")


def test_what_is_measured_is_remembered_shown_and_forgotten(small: tuple[str, ...]) -> None:
    assert run("--show").stdout.startswith("nothing is remembered; `zimage-turbo tune`")
    ran = run(*small, "--size", "96x64", "--json")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert told["remembered"] is True and told["wishes"]["repeat"] == 2
    assert [(size["width"], size["height"]) for size in told["sizes"]] == [(64, 64), (96, 64)]
    (note,) = json.loads(run("--show", "--json").stdout)
    for size in told["sizes"]:
        kept = note["sizes"][str(size["bucket"])]
        assert kept["levers"] == size["levers"] and kept["measured"] == {**size, "at": kept["measured"]["at"]}
    shown = run("--show").stdout
    assert "z-image-turbo, bfloat16" in shown and "1 thread, torch" in shown
    assert "64x64, 2 pictures each way, measured on 20" in shown and "\n96x64" in shown
    assert "attention by cuDNN" in shown and "it is for cuda, and this is cpu" in shown
    assert run("--forget").stdout == "forgot what was measured of 1 model\n"
    assert run("--forget").stdout == "nothing was remembered\n"
    assert json.loads(run("--show", "--json").stdout) == []


def test_what_was_found_is_told_in_a_table(small: tuple[str, ...]) -> None:
    ran = run(*small)
    assert ran.exit_code == 0, ran.output
    assert "channels-last VAE" in ran.stdout and "taken" in ran.stdout
    assert "compiled blocks (compiling needs a C++ compiler" in ran.stdout
    assert "\nremembered: the next start draws " in ran.stdout


def test_where_nothing_can_be_kept_it_is_said(
    small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zimage-turbo").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ran = run(*small)
    assert ran.exit_code == 0, ran.output
    assert "it cannot be remembered" in ran.stderr and "remembered" not in ran.stdout


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--show", "--forget"), 2, "--show tells what --forget forgets; choose one of them"),
        (("--size", "big"), 2, "--size must be width x height in pixels"),
        (("--size", "1000x1000"), 2, "the width of --size must be from 32 to 128 pixels"),
        (("--steps", "0"), 2, "--steps must be"),
        (("--dtype", "int3"), 2, "--dtype: input should be 'auto', 'bfloat16'"),
        (("--model", "/nowhere"), 1, "there is nothing at '/nowhere'"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_sentence(
    small: tuple[str, ...], options: tuple[str, ...], code: int, sentence: str
) -> None:
    ran = run(*small[:6], *options)
    assert (ran.exit_code, ran.stdout) == (code, ""), ran.output
    assert ran.stderr.startswith("zimage-turbo: ") and sentence in ran.stderr


def trial(lever: str, **found: Any) -> dict[str, Any]:
    spread = {"median": 1.0, "lower_quartile": 0.9, "upper_quartile": 1.125, "count": 5}
    tried = {"without": spread, "seconds": spread, "speedup": spread, "mean_difference": 0.25}
    return {
        "lever": lever,
        "taken": True,
        "because": "it is",
        "prepare_seconds": 0.0,
        **(tried if found.get("seconds", spread) else {}),
        **found,
    }


def test_a_row_for_each_lever_that_was_tried_and_the_others_by_their_reason() -> None:
    size = {
        "width": 512,
        "height": 256,
        "levers": ["compiled", "of_another_version"],
        "speedup": {"median": 2.0, "lower_quartile": 1.9, "upper_quartile": 2.5, "count": 5},
        "mean_difference": 0.5,
        "trials": [
            trial("attention_cudnn", seconds=None, because="no card"),
            trial("attention_flash", taken=False, because="it is not clearly quicker here"),
            trial("compiled", prepare_seconds=30.4),
            trial("cuda_graphs", seconds=None, because="no card"),
        ],
    }
    assert list(cli_tune._size_lines(size)) == [
        "",
        "512x256, 5 pictures each way",
        "",
        "                               without     with        times as fast  differs",
        "  attention by FlashAttention  1.000 s  1.000 s  1.00 (0.90 to 1.12)     0.25"
        "  not taken: it is not clearly quicker here",
        "  compiled blocks              1.000 s  1.000 s  1.00 (0.90 to 1.12)     0.25"
        "  taken, ready after 30 s",
        "  left out: attention by cuDNN, compiled blocks in CUDA graphs (no card)",
        "",
        "  compiled blocks, of_another_version: 2.00 (1.90 to 2.50) times as fast as the plain path; "
        "pictures differ by 0.50 of 255 levels",
    ]


def test_its_defaults_are_those_of_the_engine() -> None:
    assert tuning.TuneWishes(cli_tune.REPEAT, cli_tune.TOLERANCE) == tuning.TuneWishes()
