"""`zimage-turbo plan` for published models and for a folder, as a person and as a program read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from serve_app.cli import app
from serve_app.cli_plan import parse_memory
from tests.zimage_engine.memory.residencies import WRITERS
from zimage_engine.errors import InvalidRequest


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def facts(*arguments: str) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json").stdout)


def test_the_table_marks_one_way_and_says_why_in_a_line() -> None:
    shown = run("--model", "zimage-turbo", "--vram", "12GiB", "--size", "1024x1024")
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == "zimage-turbo, 1024x1024, guidance on"
    assert "transformer 12.31 GB, text_encoder 8.04 GB, vae 0.17 GB" in lines[1]
    marked = [line for line in lines if line.startswith("*")]
    assert len(marked) == 1 and marked[0].startswith("* stream: 21 of 30 blocks resident")
    assert lines[-1].startswith("chosen: stream: 21 of 30 blocks resident: needs 10.75 GiB of the 11.00 GiB")
    for way in ("all resident", "model", "stream", "sequential", "disk"):
        assert any(line[2:].startswith(way) for line in lines), way


def test_as_json_it_gives_the_peak_of_every_way() -> None:
    told = facts("--model", "zimage-turbo", "--vram", "12GiB", "--size", "1024x1024")
    assert told["fits"] and told["chosen"]["residency"] == "stream"
    assert told["resident_peak_bytes"] > told["model_peak_bytes"] > told["chosen_peak_bytes"]
    assert told["chosen_peak_bytes"] > told["stream_peak_bytes"] > told["sequential_peak_bytes"]
    assert told["chosen_peak_bytes"] <= told["budget_bytes"] < told["vram_bytes"] == 12 * 2**30
    assert told["stream_peak_bytes"] <= 5.2 * 2**30
    assert told["weights_bytes"]["transformer"] == pytest.approx(12.31e9, rel=0.001)
    assert all(0 < row["relative_speed"] <= 1 for row in told["options"])


def test_what_does_not_fit_ends_with_the_size_that_does() -> None:
    question = ("--model", "z-image-turbo", "--vram", "3GiB", "--size", "2048x2048")
    shown = run(*question)
    assert shown.exit_code == 1
    assert "the largest size of this shape that fits is 1" in shown.stdout.splitlines()[-1]
    told = facts(*question)
    assert not told["fits"] and told["chosen"] is None
    width, height = told["largest_size"]
    assert facts(*question[:4], "--size", f"{width}x{height}")["fits"]
    assert not facts(*question[:4], "--size", f"{width + 16}x{height + 16}")["fits"]


def test_options_reach_the_plan() -> None:
    model = ("--model", "zimage-turbo", "--vram", "24GiB")
    assert facts(*model)["chosen"]["residency"] == "none"
    assert facts(*model, "--offload", "sequential")["chosen"]["residency"] == "sequential"
    assert facts(*model, "--float8")["chosen_peak_bytes"] < 0.8 * facts(*model)["chosen_peak_bytes"]
    for word in ("int8", "fp8", "int8-dynamic", "fp8-dynamic"):
        quantised = facts(*model, "--quantize", word)
        assert quantised["quantize"] == quantised["chosen"]["quantize"] == word
        assert quantised["chosen_peak_bytes"] < 0.8 * facts(*model)["chosen_peak_bytes"]
        assert f"matrices in {word}" in quantised["message"] and "pictures differ" in quantised["message"]
    assert facts(*model, "--guidance", "1")["guided"] is False
    assert (
        facts("--model", "zimage-turbo", "--vram", "8GiB", "--host", "2GiB")["chosen"]["residency"] == "disk"
    )


@pytest.mark.parametrize("kind", ["z-image", "sdxl", "pixart"])
def test_a_folder_is_planned_from_its_headers(kind: str, tmp_path: Path) -> None:
    folder = WRITERS[kind](tmp_path / "model")
    told = facts("--model", str(folder), "--vram", "2GiB", "--size", "64x64")
    assert told["fits"] and told["chosen"]["residency"] == "none"
    assert str(folder) in told["source"] and 0 < sum(told["weights_bytes"].values()) < 50e6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--vram", "12 apples"), "--vram must be a size such as 12GiB, 8G or 512MiB, got '12 apples'"),
        (("--vram", "0GiB"), "--vram must be more than nothing"),
        (("--vram", "8G", "--size", "1000x1000"), "--size takes multiples of 16 up to 2048"),
        (("--vram", "8G", "--size", "big"), "--size must be width x height in pixels"),
        (
            ("--vram", "8G", "--quantize", "int4"),
            "quantize must be one of int8, fp8, int8-dynamic, fp8-dynamic, got 'int4'",
        ),
        (("--vram", "8G", "--quantize", "int8", "--float8"), "choose one of them"),
        (("--vram", "8G", "--quantize", "int8", "--offload", "sequential"), "choose none, model, stream"),
        (("--vram", "8G", "--offload", "everything"), "--offload must be one of auto, none, model, stream"),
        (("--vram", "8G", "--host", "-1G"), "--host must be a size such as"),
    ],
)
def test_a_wrong_value_is_refused_in_a_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    refused = run("--model", "zimage-turbo", *arguments)
    assert refused.exit_code == 2
    assert sentence in refused.stderr and "Traceback" not in refused.output


def test_a_path_where_nothing_is_says_so(tmp_path: Path) -> None:
    refused = run("--model", str(tmp_path / "nothing"), "--vram", "8G")
    assert refused.exit_code == 1 and "nothing" in refused.stderr


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("12GiB", 12 * 2**30),
        ("12gib", 12 * 2**30),
        (" 8 G ", 8 * 2**30),
        ("12GB", 12 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("1000000", 10**6),
        ("900B", 900),
        ("1T", 2**40),
    ],
)
def test_sizes_of_memory(text: str, size_bytes: int) -> None:
    assert parse_memory(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "12 GIBs", "1e3", "-1G", "0", "0.0000001", "nan", "１２GiB", "12,5G"]
)
def test_what_is_no_size_of_memory(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--vram must be"):
        parse_memory(text)


def test_neither_torch_nor_anything_heavy_is_imported() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from serve_app.cli import app\n"
        "done = CliRunner().invoke(app, ['plan', '--model', 'zimage-turbo', '--vram', '12GiB'])\n"
        "assert done.exit_code == 0, done.output\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'ray', 'gradio'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"
