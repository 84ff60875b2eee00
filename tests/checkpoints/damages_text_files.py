"""Damage to what is not weights: settings that hold rubbish, tokenizer files missing or broken; as rows.

And two of weights that only names tell: a text encoder's words under their other name, half an average.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from tests.checkpoints import damages as d

Row = tuple[str, d.Damage, dict[str, object]]
REFUSED = "CheckpointDamaged"


def holding(name: str, text: str) -> d.Damage:
    """The file holds `text` instead; `{}` in the name stands for the denoiser's folder."""

    def damage(folder: Path) -> Path:
        (folder / name.format(d.denoiser_folder(folder).name)).write_text(text, encoding="utf-8")
        return folder

    return damage


def cut_off(name: str) -> d.Damage:
    """The second half of the file is gone."""

    def damage(folder: Path) -> Path:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        return folder

    return damage


def of_another_class(folder: Path) -> Path:
    place = d.denoiser_folder(folder) / "config.json"
    d.edit_json(place, lambda content: content.update(_class_name="MyOwnTurboModel"))
    return folder


def in_pieces(tokenizer: str) -> d.Damage:
    """vocab.json and merges.txt beside tokenizer.json, as makers publish them."""

    def damage(folder: Path) -> Path:
        place = folder / tokenizer
        model = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        (place / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
        (place / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return damage


def partly_averaged(folder: Path) -> Path:
    """All weights plain, and every second one a second time as an average of other values."""
    place = d.denoiser_folder(folder)
    plain = d.weights(place)
    averaged = {f"state_dict_ema.{name}": plain[name] * 0 for name in sorted(plain)[::2]}
    stored: dict[str, torch.Tensor] = {f"state_dict.{name}": tensor for name, tensor in plain.items()}
    d.rewrite(place, stored | averaged)
    return folder


def without_folder(name: str) -> d.Damage:
    def damage(folder: Path) -> Path:
        shutil.rmtree(folder / name)
        return folder

    return damage


ANY: tuple[Row, ...] = (
    ("vae-config-garbled", cut_off("vae/config.json"), {"repairs": ("write-config",)}),
    ("denoiser-config-empty", holding("{}/config.json", ""), {"repairs": ("write-config",)}),
    ("denoiser-of-another-class", of_another_class, {"repairs": ("correct-config",)}),
    ("model-index-garbled", cut_off("model_index.json"), {"repairs": ("write-model-index",)}),
    ("average-partial", partly_averaged, {"repairs": ("leave-partial-average",)}),
)
Z_IMAGE: tuple[Row, ...] = (
    ("tokenizer-garbled", cut_off("tokenizer/tokenizer.json"), {"error": REFUSED, "message": "vocabulary"}),
    (
        "tokenizer-garbled-beside-its-pieces",
        d.chained(in_pieces("tokenizer"), cut_off("tokenizer/tokenizer.json")),
        {"repairs": ("leave-out-broken-file",)},
    ),
)
SDXL: tuple[Row, ...] = (
    ("tokenizer-gone", without_folder("tokenizer"), {"repairs": ("rebuild-vocabulary",)}),
    ("tokenizer-2-gone", without_folder("tokenizer_2"), {"repairs": ("rebuild-vocabulary",)}),
    (
        "tokenizer-2-settings-missing",
        d.without("tokenizer_2/tokenizer_config.json"),
        {"repairs": ("write-tokenizer-config",)},
    ),
    (
        "model-index-garbled-and-tokenizer-gone",
        d.chained(cut_off("model_index.json"), without_folder("tokenizer")),
        {"repairs": ("write-model-index", "rebuild-vocabulary")},
    ),
    (
        "text-encoder-2-without-prefix",
        d.renamed_keys(lambda name: name.removeprefix("text_model."), "text_encoder_2"),
        {},
    ),
)
PIXART: tuple[Row, ...] = (
    (
        "tokenizer-settings-garbled",
        holding("tokenizer/tokenizer_config.json", "[]"),
        {"repairs": ("write-tokenizer-config",)},
    ),
    (
        "words-under-the-encoder",
        d.renamed_keys(lambda name: name.replace("shared.", "encoder.embed_tokens."), "text_encoder"),
        {},
    ),
)

#: The models that each table is for.
TEXT_FILES = (
    (("z-image", "sdxl", "pixart-sigma"), ANY),
    (("z-image",), Z_IMAGE),
    (("sdxl",), SDXL),
    (("pixart-sigma",), PIXART),
)
