"""The command line as a person meets it: help, wrong input, pictures on the disk, a model from a hub."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from serve_app import cli, terminal
from serve_app.image_codec import ImageEncoding
from serve_app.settings import ALLOCATOR_VARIABLES
from tests.serve_app.test_metrics import REPORT
from tests.stand_in_hub import StandInHub
from tests.zimage_engine.tiny_models.lora import write_lora
from tests.zimage_engine.tiny_models.pixart import write_tiny_pixart
from zimage_engine.engine import DEMO_MODEL_PATH, Engine
from zimage_engine.errors import InvalidRequest
from zimage_engine.types import PromptCacheUse

COMMANDS = ("launch", "generate", "download")
#: The least work that draws: two steps without guidance.
QUICK = ("--steps", "2", "--guidance", "1")


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env=env)


def run_as_program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve_app.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def text_of(picture: Path) -> str:
    with Image.open(picture) as image:
        return str(image.info["parameters"])


def assert_one_sentence(result: Result, exit_code: int) -> None:
    assert result.exit_code == exit_code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("zimage-turbo: ")


def test_help_and_version_come_up_without_anything_heavy() -> None:
    checked = """
import sys
from serve_app import cli, terminal
for arguments in ("--help", "--version", "launch --help", "generate -h", "download --help"):
    try:
        cli.app(arguments.split())
    except SystemExit as ended:
        assert ended.code == 0, (arguments, ended.code)
heavy = {"torch", "ray", "gradio", "diffusers", "transformers", "huggingface_hub", "fastapi", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", checked], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "launch" in done.stdout
    assert re.search(r"^zimage-turbo \d+\.\d+", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_examples_that_can_be_copied(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    examples = [line.strip() for line in result.stdout.split("Examples:")[1].strip().splitlines()]
    assert len(examples) >= 3
    assert all(f"zimage-turbo {command}" in example for example in examples)
    for example in examples:
        for option in re.findall(r" (--?[a-z]+)", example):
            assert option in result.stdout.split("Examples:")[0], f"{option} of an example is not explained"


def test_without_a_command_the_help_is_shown() -> None:
    result = run()
    assert all(command in result.output for command in COMMANDS)


WRONG_GENERATE = [
    # (options, what the sentence must say); the model named does not exist, so nothing was loaded
    (["-o", "picture.gif"], r"must end in \.png, \.jpg, \.jpeg, \.webp; got \.gif"),
    (["-o", "picture"], r"must end in .*; got none in picture"),
    (["-o", "nowhere/picture.png"], r"no folder .*nowhere to write picture\.png into"),
    (["-o", "folder.png"], r"folder\.png is a folder"),
    (["-o", "p.png", "--size", "big"], r"--size must be width x height.*512x512, got 'big'"),
    (["-o", "p.png", "--size", "256"], r"--size must be width x height"),
    (["-o", "p.png", "--size", "-256x256"], r"--size must be width x height"),
    (["-o", "p.png", "--seed", "-1"], r"--seed must be from 0 to 4294967295 .* got -1"),
    (
        ["-o", "p.png", "--seed", "4294967295", "--n", "2"],
        r"--seed must be from 0 to 4294967294 for 2 picture",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG_GENERATE)
def test_what_cannot_be_written_or_read_is_refused_before_a_model_is_loaded(
    options: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    result = run("generate", "a star", *options, "--model", "/no/such/model")
    assert_one_sentence(result, cli.EXIT_INVALID_INPUT)
    assert re.search(sentence, result.stderr), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(
    ("options", "exit_code", "sentence"),
    [
        (["--model", "/no/such/model"], cli.EXIT_FAILED, "/no/such/model"),
        (["--device", "abacus"], cli.EXIT_FAILED, "abacus"),
        (["--size", "100x256"], cli.EXIT_INVALID_INPUT, r"width .* multiple of 32, got 100.* 96 and 128"),
        (["--size", "256x100"], cli.EXIT_INVALID_INPUT, r": the height of --size must be a multiple of 32"),
        (["--steps", "0"], cli.EXIT_INVALID_INPUT, r": --steps must be from 1 to 100, got 0"),
        (["--guidance", "nan"], cli.EXIT_INVALID_INPUT, r": --guidance must be from 0 to 20"),
        (["--negative", "a" * 99999], cli.EXIT_INVALID_INPUT, r": --negative must have at most"),
        (["--family", "sdxxl"], cli.EXIT_FAILED, r"no family 'sdxxl'; supported are: .*sdxl"),
        (["--base", "/no/base"], cli.EXIT_FAILED, "nothing at '/no/base'"),
        (["--text-encoder", "/no/text"], cli.EXIT_FAILED, "nothing at '/no/text'"),
        (["--vae", "/no/vae"], cli.EXIT_FAILED, "nothing at '/no/vae'"),
        (["--lora", "/no/lora.safetensors=0.5"], cli.EXIT_FAILED, r"no LoRA at /no/lora\.safetensors;"),
        (["--lora", "/no/lora=0,5"], cli.EXIT_FAILED, "'0,5' is no number"),
        (["--lora", "/no/lora=inf"], cli.EXIT_INVALID_INPUT, "weight of a LoRA must be a finite number"),
        (["--lora", str(DEMO_MODEL_PATH / "vae")], cli.EXIT_FAILED, "may be a whole model"),
    ],
)
def test_what_the_engine_refuses_is_one_sentence_and_the_old_file_stays(
    options: list[str], exit_code: int, sentence: str, tmp_path: Path
) -> None:
    picture = tmp_path / "star.png"
    picture.write_bytes(b"an older picture")
    result = run("generate", "a star", "-o", str(picture), *options)
    assert_one_sentence(result, exit_code)
    assert re.search(sentence, result.stderr), result.stderr
    assert picture.read_bytes() == b"an older picture"
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize(
    "arguments", [["generate"], ["generate", "a star"], ["download"], ["paint"], ["--loud"]]
)
def test_a_command_that_is_not_whole_is_refused_with_its_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == cli.EXIT_INVALID_INPUT
    assert "Usage:" in result.stderr
    assert "Traceback" not in result.stderr


def test_pictures_are_numbered_carry_their_settings_and_can_be_drawn_again(tmp_path: Path) -> None:
    several = run(
        "generate", "a red circle", "-o", str(tmp_path / "circle.png"), "--n", "2", "--seed", "41", *QUICK
    )
    assert several.exit_code == 0, several.stderr
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["circle-1.png", "circle-2.png"]
    for number, line in enumerate(several.stdout.splitlines(), 1):
        assert re.fullmatch(rf"{tmp_path}/circle-{number}\.png  seed {40 + number}  \d+\.\d s", line)
    assert len(several.stderr.splitlines()) == len(set(several.stderr.splitlines()))  # a warning comes once
    assert "warning: " in several.stderr  # two steps are too few
    text = text_of(tmp_path / "circle-2.png")
    assert text.startswith("a red circle, ")
    assert "Seed: 42" in text
    assert "Steps: 2" in text

    alone = run("generate", "a red circle", "-o", str(tmp_path / "again.png"), "--seed", "42", *QUICK)
    assert alone.exit_code == 0, alone.stderr
    with Image.open(tmp_path / "circle-2.png") as second, Image.open(tmp_path / "again.png") as again:
        assert second.tobytes() == again.tobytes()
        assert second.size == again.size == (256, 256)


def test_pictures_drawn_one_by_one_count_the_prompts_of_all() -> None:
    reports = [replace(REPORT, prompt_cache=use) for use in (PromptCacheUse(0, 2), PromptCacheUse(2, 0))]
    assert cli.join_reports(reports).prompt_cache == PromptCacheUse(2, 2)
    assert cli.join_reports([REPORT, REPORT]).prompt_cache is None


def test_loras_are_drawn_with_and_told(tmp_path: Path) -> None:
    style = write_lora(DEMO_MODEL_PATH, tmp_path / "style=2.safetensors", seed=1)
    touch = write_lora(DEMO_MODEL_PATH, tmp_path / "touch.safetensors", seed=2)
    command = ("generate", "a red circle", "--size", "64x64", "--seed", "7", "--no-enhance", *QUICK)
    plain = run(*command, "-o", str(tmp_path / "plain.png"))
    options = ("--lora", str(style), "--lora", f"{touch}=-0.5")
    styled = run(*command, *options, "-o", str(tmp_path / "styled.png"), "--json")
    assert styled.exit_code == plain.exit_code == 0, styled.stderr
    told = [(lora["name"], lora["weight"]) for lora in json.loads(styled.stdout)["loras"]]
    assert told == [("style=2.safetensors", 1.0), ("touch.safetensors", -0.5)]
    text = text_of(tmp_path / "styled.png")
    assert re.search(
        r'Lora 1: "<lora:style=2:1>, \d+ modules", Lora 2: "<lora:touch:-0.5>, \d+ modules"$', text
    )
    assert "lora" not in text_of(tmp_path / "plain.png").lower()
    with Image.open(tmp_path / "plain.png") as one, Image.open(tmp_path / "styled.png") as other:
        assert one.tobytes() != other.tobytes()


def test_a_lora_as_the_model_is_refused_with_advice(tmp_path: Path) -> None:
    style = write_lora(DEMO_MODEL_PATH, tmp_path / "style.safetensors")
    drawn = run("generate", "a star", "-o", str(tmp_path / "star.png"), "--model", str(style))
    started = run("launch", "--model", str(style))
    for result in (drawn, started):
        assert_one_sentence(result, cli.EXIT_FAILED)
        assert f"{style} is a LoRA and no model" in result.stderr
        assert f"--lora {style}" in result.stderr


def test_inspect_says_what_a_lora_is_and_how_it_is_used(tmp_path: Path) -> None:
    style = write_lora(DEMO_MODEL_PATH, tmp_path / "style.safetensors", modules=("to_q",))
    result = run("inspect", str(style))
    assert result.exit_code == 0, result.stderr
    for said in ("a LoRA", "rank 4", "PEFT, diffusers", "made for Z-Image", f"--lora {style}=1.0"):
        assert said in result.stdout
    fitting = run("inspect", str(style), "--base", str(DEMO_MODEL_PATH))
    assert re.search(rf"fits {DEMO_MODEL_PATH}: adapts \d+ of its modules", fitting.stdout)
    facts = json.loads(run("inspect", str(style), "--base", str(DEMO_MODEL_PATH), "--json").stdout)
    assert (facts["kind"], facts["usable"], facts["ranks"]) == ("lora", True, [4])
    assert facts["adapted_modules"] == facts["pairs"] > 0


def test_inspect_says_why_a_lora_cannot_be_used(tmp_path: Path) -> None:
    style = write_lora(DEMO_MODEL_PATH, tmp_path / "style.safetensors")
    style.write_bytes(style.read_bytes()[:-1])
    result = run("inspect", str(style))
    assert result.exit_code == 1
    assert re.match(r"Could not be used as a LoRA: .*style\.safetensors", result.stdout)
    told = run("inspect", str(style), "--json")
    facts = json.loads(told.stdout)
    assert (told.exit_code, facts["kind"], facts["usable"]) == (1, "lora", False)


def test_inspect_knows_a_hub_id_of_the_cache_and_fetches_no_other(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--demo"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(DEMO_MODEL_PATH, repo / "snapshots" / commit)
    # An address at which nobody answers: whoever asked there would fail with another sentence.
    cache = {"HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    known = run_as_program("inspect", "someone/demo", **cache)
    assert known.returncode == 0, known.stderr
    assert f"at the commit {commit}" in known.stdout
    other = run_as_program("inspect", "someone/else", **cache)
    assert other.returncode == 1
    assert "fetch it first: zimage-turbo download --model someone/else" in other.stdout


def test_dtype_reaches_the_report_and_float16_is_refused_with_the_reason(tmp_path: Path) -> None:
    target = str(tmp_path / "star.png")
    drawn = run("generate", "a star", "-o", target, "--dtype", "float32", "--json", *QUICK)
    assert drawn.exit_code == 0, drawn.stderr
    assert json.loads(drawn.stdout)["dtype"] == "float32"
    told = json.loads(run("inspect", str(DEMO_MODEL_PATH), "--dtype", "float32", "--json").stdout)
    assert told["dtype"] == "float32"
    refused = run("inspect", str(write_tiny_pixart(tmp_path / "pixart")), "--dtype", "float16")
    assert refused.exit_code == 1
    assert "cannot be drawn in float16: its text encoder, T5, overflows" in refused.stdout
    unserved = run("launch", "--dtype", "half")
    assert_one_sentence(unserved, cli.EXIT_INVALID_INPUT)
    assert "--dtype: input should be 'auto', 'bfloat16', 'float32' or 'float16'" in unserved.stderr
    misspelt = run("generate", "a star", "-o", target, "--dtype", "half", *QUICK)
    assert_one_sentence(misspelt, cli.EXIT_INVALID_INPUT)
    assert "dtype must be one of bfloat16, float32, float16, got 'half'" in misspelt.stderr


def test_the_ending_chooses_the_format_and_options_reach_the_engine(tmp_path: Path) -> None:
    kinds = {"a.PNG": "PNG", "b.jpg": "JPEG", "c.jpeg": "JPEG", "d.webp": "WEBP"}
    for name, kind in kinds.items():
        options = ["--size", "64x32", "--negative", "fog", "--no-enhance", "--json", *QUICK]
        result = run("generate", "白色背景上的红色圆形", "-o", str(tmp_path / name), *options)
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["files"] == [str(tmp_path / name)]
        assert (report["prompt"], report["negative_prompt"]) == ("白色背景上的红色圆形", "fog")
        assert (report["width"], report["height"], report["num_inference_steps"]) == (64, 32, 2)
        assert report["guidance_scale"] == 1.0
        assert 0 <= report["pictures"][0]["seed"] < 2**32
        with Image.open(tmp_path / name) as picture:
            assert (picture.format, picture.size) == (kind, (64, 32))


def test_json_joins_the_reports_of_several_pictures(tmp_path: Path) -> None:
    result = run(
        "generate", "a star", "-o", str(tmp_path / "s.webp"), "-n", "3", "--json", "--size", "32x32", *QUICK
    )
    report = json.loads(result.stdout)
    seeds = [picture["seed"] for picture in report["pictures"]]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]
    assert report["seconds"] >= sum(picture["seconds"] for picture in report["pictures"]) * 0.99
    assert [Path(file).name for file in report["files"]] == ["s-1.webp", "s-2.webp", "s-3.webp"]


def test_a_picture_that_cannot_be_packed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder goes away between the check and the writing: nothing is left under either name."""
    from zimage_engine import Engine

    folder = tmp_path / "pictures"
    folder.mkdir()
    generate = Engine.generate

    def and_then_the_folder_fills(self: Engine, *arguments: object, **options: object) -> object:
        result = generate(self, *arguments, **options)  # type: ignore[arg-type]
        (folder / "star.png").mkdir()  # os.replace cannot put a file over a folder
        return result

    monkeypatch.setattr(Engine, "generate", and_then_the_folder_fills)
    result = run("generate", "a star", "-o", str(folder / "star.png"), "--size", "32x32", *QUICK)
    assert_one_sentence(result, cli.EXIT_FAILED)
    assert "could not write" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["star.png"]


def test_a_log_gets_no_control_characters_and_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    command = ["generate", "a star", "-o", str(tmp_path / "star.png"), "--size", "32x32", *QUICK]
    logged = run_as_program(*command)
    assert logged.returncode == 0, logged.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", logged.stdout + logged.stderr)
    assert logged.stdout.startswith(str(tmp_path / "star.png"))

    terminal, program_side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "serve_app.cli", *command], stdout=subprocess.PIPE, stderr=program_side
    )
    os.close(program_side)
    shown = b""
    try:
        while block := os.read(terminal, 65536):
            shown += block
    except OSError:  # the terminal's other side was closed
        pass
    finally:
        os.close(terminal)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"Loading the demo model" in shown
    assert b"Drawing" in shown
    assert b"2/2" in shown


def test_a_downloaded_model_draws_by_its_id_without_a_network(tmp_path: Path) -> None:
    caches = {"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", "HF_HUB_CACHE": str(tmp_path / "hf" / "hub")}
    with StandInHub() as hub:
        hub.publish("someone/demo", DEMO_MODEL_PATH)
        fetched = run_as_program("download", "--model", "someone/demo", **caches, HF_ENDPOINT=hub.endpoint)
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stderr == ""
    assert re.search(r"someone/demo at [0-9a-f]{7}: \d+ files, [\d.]+ MB, all whole", fetched.stdout)
    assert "next: zimage-turbo launch --model someone/demo" in fetched.stdout

    picture = tmp_path / "star.png"
    drawn = run_as_program(
        *("generate", "a star", "-o", str(picture), "--model", "someone/demo", "--size", "32x32", *QUICK),
        **caches,
        HF_HUB_OFFLINE="1",
    )
    assert drawn.returncode == 0, drawn.stderr
    assert "Model: someone/demo" in text_of(picture)


def test_download_into_a_folder_and_what_it_says_when_it_cannot(tmp_path: Path) -> None:
    with StandInHub() as hub:
        hub.publish("someone/demo", {"model_index.json": b"{}"}, revision="v1")
        endpoint = ("--endpoint", hub.endpoint)
        dest = tmp_path / "demo"
        options = ("--revision", "v1", "--dest", str(dest), *endpoint)
        done = run("download", "--model", "someone/demo", *options)
        assert done.exit_code == 0, done.stderr
        assert (dest / "model_index.json").read_bytes() == b"{}"
        assert f"next: zimage-turbo launch --model {dest}" in done.stdout

        assert_one_sentence(run("download", "--model", "someone/other", *options), cli.EXIT_FAILED)
        assert_one_sentence(run("download", "--model", "not an id", *options), cli.EXIT_INVALID_INPUT)
        hub.publish("someone/demo", {"model_index.json": b'{"a": 1}'}, revision="v1")
        hub.faults.corrupt["model_index.json"] = 1
        broken = run("download", "--model", "someone/demo", *options)
        assert_one_sentence(broken, cli.EXIT_FAILED)
        assert "model_index.json: expected git-sha1" in broken.stderr


def test_a_long_download_says_in_a_log_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    with StandInHub() as hub:
        hub.publish("someone/demo", {"model.safetensors": b"\0" * 3_000_000})
        hub.faults.pause_seconds = 0.01
        done = run(
            *(
                "download",
                "--model",
                "someone/demo",
                "--endpoint",
                hub.endpoint,
                "--dest",
                str(tmp_path / "m"),
            )
        )
    lines = done.stderr.splitlines()
    assert len(lines) > 3
    assert all(re.fullmatch(r"Fetching: [\d.]+ (bytes|kB|MB) of 3\.0 MB", line) for line in lines)


WRONG_LAUNCH = [
    (["--port", "70000"], r"port.*70000"),
    (["--host", "0.0.0.0"], r"api_key"),
    (["--replicas", "0"], r": --replicas: input should be greater"),
    (["--lora", "a=nan"], r"weight of a LoRA must be a finite number, got nan for a;"),
    (["--config", "no-such.yaml"], r"--config must name a YAML file"),
    (["--config", "slip.yaml"], r"no setting prot; did you mean port\?"),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG_LAUNCH)
def test_launch_refuses_wrong_settings_before_anything_starts(
    options: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZIMAGE_CONFIG", "")  # what --config sets is taken back after the test
    (tmp_path / "slip.yaml").write_text("prot: 8000\n")
    result = run("launch", *options)
    assert_one_sentence(result, cli.EXIT_INVALID_INPUT)
    assert re.search(sentence, result.stderr), result.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "/no/model"], "nothing at '/no/model'"),
        (["--vae", "/no/vae"], "nothing at '/no/vae'"),
        (["--text-encoder", "/no/text", "--model", "owner/name"], "nothing at '/no/text'"),
        (["--base", "/no/base"], "nothing at '/no/base'"),
        (["--lora", "/no/lora.safetensors=0.5"], r"no LoRA at /no/lora\.safetensors;"),
        (["--lora", str(DEMO_MODEL_PATH / "vae")], "may be a whole model"),
        (["--family", "sdxxl"], "no family 'sdxxl'"),
    ],
)
def test_launch_refuses_files_that_no_worker_could_load_before_ray_is_started(
    options: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def never(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", never)
    result = run("launch", *options)
    assert_one_sentence(result, cli.EXIT_FAILED)
    assert re.search(sentence, result.stderr), result.stderr


def test_launch_puts_options_over_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_app.settings import Settings

    started: list[Settings] = []
    monkeypatch.setattr(import_module("serve_app.app"), "launch", started.append)
    monkeypatch.setenv("ZIMAGE_CONFIG", "")
    config = tmp_path / "server.yaml"
    config.write_text("port: 7951\nnum_replicas: 2\nmax_queued_requests: 5\n")
    result = run(
        "launch", "--config", str(config), "--port", "7952", "--device", "cpu", "--no-ui", "--no-history"
    )
    assert result.exit_code == 0, result.stderr
    (settings,) = started
    assert (settings.port, settings.num_replicas, settings.max_queued_requests) == (7952, 2, 5)
    assert (settings.device, settings.ui, settings.history, settings.host) == (
        "cpu",
        False,
        False,
        "127.0.0.1",
    )


def test_launch_hands_over_what_the_model_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_app.settings import Settings

    started: list[Settings] = []
    monkeypatch.setattr(import_module("serve_app.app"), "launch", started.append)
    options = ("--family", "z-image", "--base", "b", "--text-encoder", "t", "--vae", "v")
    result = run("launch", *options, "--lora", "one=0.5", "--lora", "two")
    assert result.exit_code == 0, result.stderr
    (settings,) = started
    assert (settings.family, settings.base, settings.text_encoder, settings.vae) == ("z-image", "b", "t", "v")
    assert [(str(lora.path), lora.weight) for lora in settings.loras] == [("one", 0.5), ("two", 1.0)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, (None, None)),
        ("auto", (None, None)),
        ("256x128", (256, 128)),
        ("256X128", (256, 128)),
        (" 256 × 128 ", (256, 128)),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | None, size: tuple[int | None, int | None]) -> None:
    assert cli.parse_size(text) == size


def test_every_format_of_an_ending_is_one_that_can_be_written() -> None:
    for file_format in cli.FORMAT_OF_SUFFIX.values():
        ImageEncoding(file_format)
    with pytest.raises(InvalidRequest):
        ImageEncoding("gif")  # type: ignore[arg-type]


def test_the_allocator_is_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def load(*_: Any, **__: Any) -> None:
        told.append({name: os.environ.get(name) for name in ALLOCATOR_VARIABLES})
        raise InvalidRequest("that is all", "model")

    monkeypatch.setattr(Engine, "load", load)
    for name in ALLOCATOR_VARIABLES:  # set first, so that what was there comes back afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    command = ("generate", "a star", "-o", str(tmp_path / "star.png"), *QUICK)
    assert run(*command).stderr.strip().endswith("that is all")
    monkeypatch.setenv(ALLOCATOR_VARIABLES[0], "backend:cudaMallocAsync")
    run(*command)
    assert told == [
        {ALLOCATOR_VARIABLES[0]: "expandable_segments:True", ALLOCATOR_VARIABLES[1]: None},
        {ALLOCATOR_VARIABLES[0]: "backend:cudaMallocAsync", ALLOCATOR_VARIABLES[1]: None},
    ]


def test_memory_is_a_card_s_and_a_size_has_a_unit(tmp_path: Path) -> None:
    target = str(tmp_path / "star.png")
    in_vain = run("generate", "a star", "-o", target, "--device", "cpu", "--vram", "12GiB", *QUICK)
    assert in_vain.exit_code == 2
    assert "cpu has none; leave it out" in in_vain.stderr
    unread = run("generate", "a star", "-o", target, "--vram", "much", *QUICK)
    assert unread.exit_code == 2
    assert "--vram must be a size such as 12GiB" in unread.stderr
    unread = run("launch", "--embedding-cache", "much")
    assert unread.exit_code == 2
    assert "--embedding-cache must be a size such as 12GiB" in unread.stderr
    unknown = run("launch", "--offload", "gpu")
    assert unknown.exit_code == 2
    assert "--offload: input should be 'auto', 'none', 'model'" in unknown.stderr
