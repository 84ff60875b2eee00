"""Settings come from three places, in one order, and nothing is taken in silence."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from serve_app.settings import (
    ALLOCATOR_VARIABLES,
    Settings,
    SettingsError,
    allocator_environment,
    is_loopback,
    load_settings,
)
from zimage_engine.loading.lora_weight import LoraWeight
from zimage_engine.memory.residency import MemoryWishes
from zimage_engine.types import EMBEDDING_CACHE_BYTES


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for variable in list(os.environ):
        if variable.startswith("ZIMAGE_"):
            monkeypatch.delenv(variable)


def test_the_caller_goes_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 7001\nnum_replicas: 3\nmax_queued_requests: 5\n", encoding="utf-8")
    monkeypatch.setenv("ZIMAGE_CONFIG", str(file))
    monkeypatch.setenv("ZIMAGE_NUM_REPLICAS", "4")
    monkeypatch.setenv("ZIMAGE_PORT", "7002")
    settings = load_settings(port=7003, host=None)
    assert (settings.port, settings.num_replicas, settings.max_queued_requests) == (7003, 4, 5)
    assert settings.host == "127.0.0.1"


def test_words_of_a_command_line_become_values() -> None:
    """`serve run serve_app:build port=7861 ui=false` hands over text, through model_validate."""
    settings = Settings.model_validate({"port": "7861", "ui": "false", "num_gpus": "0.5", "model": ""})
    assert (settings.port, settings.ui, settings.num_gpus, settings.model) == (7861, False, 0.5, None)


def test_the_environment_is_read_also_when_serve_validates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_MAX_QUEUED_REQUESTS", "7")
    assert Settings.model_validate({"port": "7861"}).max_queued_requests == 7


@pytest.mark.parametrize(
    ("chosen", "phrase"),
    [
        ({"port": 70000}, "setting port"),
        ({"port": "many"}, "setting port"),
        ({"num_replicas": 0}, "setting num_replicas"),
        ({"prot": 7860}, "did you mean port?"),
        ({"colour": "red"}, "known are"),
        ({"loras": "style.safetensors=nan"}, "must be a finite number, got nan for style.safetensors"),
        ({"loras": ["style.safetensors=-inf"]}, "must be a finite number"),
        ({"loras": ["=0.8"]}, "a LoRA is PATH or PATH=WEIGHT"),
        ({"loras": ["a", 1]}, "setting loras must be a list of PATH or PATH=WEIGHT"),
        ({"loras": 7}, "setting loras must be a list"),
        ({"loras": {"a": 0.5}}, "setting loras must be a list"),
        ({"loras": '["a"'}, "setting loras starts with a bracket but is no JSON list"),
        ({"loras": "[1]"}, "setting loras must be a list"),
        ({"vae": 3}, "setting vae"),
        ({"host": "0.0.0.0"}, "there is no api_key"),
        ({"host": "192.168.1.10"}, "ZIMAGE_API_KEY"),
        ({"host": "example.org"}, "there is no api_key"),
        ({"host": "::"}, "there is no api_key"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_sentence(chosen: dict[str, object], phrase: str) -> None:
    with pytest.raises(SettingsError, match=r".") as refused:
        load_settings(**chosen)
    assert phrase in str(refused.value)
    assert "pydantic" not in str(refused.value)


STYLE, TOUCH = LoraWeight(Path("a/style.safetensors"), 0.8), LoraWeight(Path("touch,2.safetensors"))


@pytest.mark.parametrize(
    ("given", "loras"),
    [
        ([], ()),
        ("", ()),
        ("a/style.safetensors=0.8", (STYLE,)),
        (["a/style.safetensors=0.8", "touch,2.safetensors"], (STYLE, TOUCH)),
        ('["a/style.safetensors=0.8", "touch,2.safetensors=1"]', (STYLE, TOUCH)),
        ("a/style.safetensors=0.8, a/style.safetensors=0.8,", (STYLE, STYLE)),
        ((STYLE, "touch,2.safetensors"), (STYLE, TOUCH)),
    ],
)
def test_loras_are_read_as_they_come(given: object, loras: tuple[LoraWeight, ...]) -> None:
    assert load_settings(loras=given).loras == loras


def test_loras_and_parts_come_from_the_environment_and_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("vae: my/vae\nloras:\n  - a/style.safetensors=0.8\n  - touch,2.safetensors\n", "utf-8")
    monkeypatch.setenv("ZIMAGE_CONFIG", str(file))
    monkeypatch.setenv("ZIMAGE_TEXT_ENCODER", "my/text")
    monkeypatch.setenv("ZIMAGE_FAMILY", "")
    settings = load_settings(base="my/base")
    assert (settings.base, settings.text_encoder, settings.vae, settings.family) == (
        "my/base",
        "my/text",
        "my/vae",
        None,
    )
    assert settings.loras == (STYLE, TOUCH)
    monkeypatch.setenv("ZIMAGE_LORAS", "a/style.safetensors=0.8")
    assert load_settings().loras == (STYLE,)
    monkeypatch.setenv("ZIMAGE_LORAS", "")
    assert load_settings().loras == ()


def test_a_misspelt_variable_is_refused_with_the_near_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_PROT", "7861")
    with pytest.raises(SettingsError, match=r"ZIMAGE_PROT is no setting; did you mean ZIMAGE_PORT"):
        load_settings()


def test_a_config_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_CONFIG", "/nowhere/server.yaml")
    with pytest.raises(SettingsError, match=r"/nowhere/server\.yaml"):
        load_settings()


def test_unknown_keys_of_the_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("prot: 7001\n", encoding="utf-8")
    monkeypatch.setenv("ZIMAGE_CONFIG", str(file))
    with pytest.raises(SettingsError, match="did you mean port"):
        load_settings()


def test_an_open_address_is_fine_with_a_key_and_the_key_is_not_shown() -> None:
    settings = load_settings(host="0.0.0.0", api_key="swordfish")
    assert settings.api_key is not None
    assert "swordfish" not in repr(settings)


def test_settings_travel_to_other_processes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(port=7005, api_key="swordfish", loras=["style.safetensors=0.8"])
    monkeypatch.setenv("ZIMAGE_PORT", "7006")
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("127.0.0.1", 7860, "http://127.0.0.1:7860"),
        ("0.0.0.0", 80, "http://127.0.0.1:80"),
        ("::1", 7860, "http://[::1]:7860"),
        ("localhost", 7860, "http://localhost:7860"),
    ],
)
def test_the_url_is_one_that_opens(host: str, port: int, url: str) -> None:
    assert load_settings(host=host, port=port, api_key="x").url == url


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
    ],
)
def test_loopback_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_every_setting_is_described() -> None:
    undescribed = [name for name, field in Settings.model_fields.items() if not field.description]
    assert undescribed == []


@pytest.mark.parametrize(
    ("stated", "given"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (
            {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"},
            {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"},
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
        ),
    ],
)
def test_the_allocator_is_told_what_a_person_has_set_or_to_expand(
    stated: dict[str, str], given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in stated.items():
        monkeypatch.setenv(name, value)
    assert allocator_environment() == given


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("32MiB", 32 * 2**20),
        ("1000", 1000),
        ("0", 0),
        (" ", EMBEDDING_CACHE_BYTES),
        (None, EMBEDDING_CACHE_BYTES),
    ],
)
def test_the_room_for_prompts_is_a_size_or_nothing(
    text: str | None, size_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        monkeypatch.setenv("ZIMAGE_EMBEDDING_CACHE", text)
    assert load_settings().embedding_cache == size_bytes


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("much", "setting embedding_cache must be a size such as 12GiB.*got 'much'; 0 keeps no prompts"),
        ("0MiB", "setting embedding_cache must be more than nothing.*; 0 keeps no prompts"),
        (-1, "setting embedding_cache: input should be greater than or equal to 0, got -1"),
    ],
)
def test_a_room_for_prompts_that_is_none_is_refused(wrong: Any, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        load_settings(embedding_cache=wrong)


def test_wishes_about_memory_are_read_from_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().memory == MemoryWishes()
    monkeypatch.setenv("ZIMAGE_VRAM", "12GiB")
    monkeypatch.setenv("ZIMAGE_FLOAT8", "true")
    assert load_settings(offload="stream").memory == MemoryWishes("stream", 12 * 2**30, True)
    with pytest.raises(SettingsError, match="vram must be a size such as 12GiB"):
        load_settings(vram="much")
    with pytest.raises(SettingsError, match="offload"):
        load_settings(offload="gpu")


def test_matrices_are_stored_in_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_QUANTIZE", " ")
    assert load_settings().memory.quantize is None
    monkeypatch.setenv("ZIMAGE_QUANTIZE", "int8")
    assert load_settings().memory == MemoryWishes(quantize="int8")
    with pytest.raises(SettingsError, match="choose one of them"):
        load_settings(float8=True)
    with pytest.raises(SettingsError, match="'int8-dynamic' or 'fp8-dynamic', got 'int4'"):
        load_settings(quantize="int4")
