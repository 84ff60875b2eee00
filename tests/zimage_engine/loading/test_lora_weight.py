"""`PATH=WEIGHT` as people type it."""

from __future__ import annotations

from pathlib import Path

import pytest

from zimage_engine.errors import CheckpointNotFound, InvalidRequest
from zimage_engine.loading.lora_weight import LoraWeight, parse_lora, require_lora


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors=0.8", "style.safetensors", 0.8),
        (" style.safetensors = -1 ", "style.safetensors", -1.0),
        ("a/b c,d.safetensors=2e-1", "a/b c,d.safetensors", 0.2),
        ("epoch=10.safetensors", "epoch=10.safetensors", 1.0),
        ("epoch=10.safetensors=0.5", "epoch=10.safetensors", 0.5),
        ("rank=8=0", "rank=8", 0.0),
        ("水彩.safetensors=1", "水彩.safetensors", 1.0),
        ("~/style.safetensors", str(Path.home() / "style.safetensors"), 1.0),
    ],
)
def test_what_follows_the_last_equals_sign_is_a_weight_if_it_is_a_number(
    text: str, path: str, weight: float
) -> None:
    assert parse_lora(text) == LoraWeight(Path(path), weight)


@pytest.mark.parametrize("text", ["a=nan", "a=inf", "a=-inf", "a=1e999", "", " ", "=0.8"])
def test_what_is_no_lora_and_no_weight_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"finite number|PATH=WEIGHT"):
        parse_lora(text)


def test_a_weight_that_was_no_number_is_told_where_the_file_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    file.touch()
    require_lora(parse_lora(f"{file}=0.8"))
    with pytest.raises(CheckpointNotFound, match=r"'0,8' is no number"):
        require_lora(parse_lora(f"{file}=0,8"))
    with pytest.raises(CheckpointNotFound, match=r"there is no LoRA at .*other\.safetensors; expected"):
        require_lora(parse_lora(str(tmp_path / "other.safetensors=1")))
