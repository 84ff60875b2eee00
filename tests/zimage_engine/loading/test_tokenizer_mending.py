"""Tokenizers with files missing or broken: the same ids as before, or a refusal that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, Qwen2Tokenizer

from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl, write_tiny_z_image
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading.adapter import ModelLoaderAdapter

#: Words that merge, the padding of one tokenizer as a word, case, bytes beyond ASCII, and a special token.
PROMPTS = ["a red circle", "Red! and ! re red!!", "白色背景 can't <|endoftext|> x", ""]
MERGES = [("r", "e"), ("a", "n")]


def _clip(pad_token: str) -> CLIPTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{piece}</w>" for piece in alphabet[:-3])]
    pieces += ["re", "an", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[*MERGES, ("re", "d</w>")],
        pad_token=pad_token,
        model_max_length=77,
    )


def _qwen() -> Qwen2Tokenizer:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:-3], "re", "an", "red"]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate([*pieces, *specials])},
        merges=[*MERGES, ("re", "d")],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=1024,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    sdxl = write_tiny_sdxl(root / "sdxl")
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        shutil.rmtree(sdxl / name)
        _clip(pad).save_pretrained(sdxl / name)
    z_image = write_tiny_z_image(root / "z-image", head_dim=128)
    template = (z_image / "tokenizer" / "chat_template.jinja").read_text()
    shutil.rmtree(z_image / "tokenizer")
    qwen = _qwen()
    qwen.chat_template = template
    qwen.save_pretrained(z_image / "tokenizer")
    return {"sdxl": sdxl, "z-image": z_image, "pixart": write_tiny_pixart(root / "pixart", "sigma")}


@pytest.fixture
def copy_of(models, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(models[name], tmp_path / "model"))


def as_published(folder: Path, special_ids: bool = True, keep_whole: bool = False) -> None:
    """vocab.json and merges.txt in place of tokenizer.json, as the makers of CLIP and Qwen publish them."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    added = whole["added_tokens"]
    pieces = whole["model"]["vocab"]
    if not special_ids:
        pieces = {piece: number for piece, number in pieces.items() if not piece.startswith("<|")}
    (folder / "vocab.json").write_text(json.dumps(pieces, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in whole["model"]["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    if special_ids:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {
            str(each["id"]): {key: value for key, value in each.items() if key != "id"} for each in added
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if not keep_whole:
        (folder / "tokenizer.json").unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def all_of(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [damage(folder) for damage in damages] and None


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-30]) and None


BOTH_FORMS = lambda folder: as_published(folder, keep_whole=True)  # noqa: E731

#: model, tokenizer, what is done to its folder, the repair expected
MENDED: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "whole file garbled, pieces there": (
        "sdxl",
        "tokenizer",
        all_of(BOTH_FORMS, cut("tokenizer.json")),
        "leave-out-broken-file",
    ),
    "whole file empty, pieces there (Qwen)": (
        "z-image",
        "tokenizer",
        all_of(BOTH_FORMS, write("tokenizer.json", "")),
        "leave-out-broken-file",
    ),
    "pieces garbled, whole file there": (
        "z-image",
        "tokenizer",
        all_of(BOTH_FORMS, cut("vocab.json")),
        "",
    ),
    "map of special tokens garbled": (
        "sdxl",
        "tokenizer",
        write("special_tokens_map.json", "{"),
        "leave-out-broken-file",
    ),
    "settings missing": ("sdxl", "tokenizer", remove("tokenizer_config.json"), "write-tokenizer-config"),
    "settings of the second missing": (
        "sdxl",
        "tokenizer_2",
        remove("tokenizer_config.json"),
        "write-tokenizer-config",
    ),
    "settings garbled": (
        "sdxl",
        "tokenizer_2",
        write("tokenizer_config.json", '{"pad_'),
        "write-tokenizer-config",
    ),
    "settings missing, template beside (Qwen)": (
        "z-image",
        "tokenizer",
        remove("tokenizer_config.json"),
        "write-tokenizer-config",
    ),
    "settings missing (T5)": (
        "pixart",
        "tokenizer",
        write("tokenizer_config.json", "[]"),
        "write-tokenizer-config",
    ),
    "vocabulary from the second": ("sdxl", "tokenizer", remove("tokenizer.json"), "rebuild-vocabulary"),
    "vocabulary from the first": ("sdxl", "tokenizer_2", remove("tokenizer.json"), "rebuild-vocabulary"),
    "only merges.txt left": (
        "sdxl",
        "tokenizer",
        all_of(as_published, remove("vocab.json")),
        "rebuild-vocabulary",
    ),
    "merges.txt cut short": ("sdxl", "tokenizer_2", all_of(as_published, cut("merges.txt")), "rebuild-"),
    "all files of the first gone": ("sdxl", "tokenizer", shutil.rmtree, "rebuild-vocabulary"),
    "all files of the second gone": ("sdxl", "tokenizer_2", shutil.rmtree, "rebuild-vocabulary"),
}


def reads_as(tokenizer: Any) -> list[Any]:
    """What the pipelines ask of a tokenizer: padded ids of each prompt, and the length they are padded to."""
    padded = [
        tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        for prompt in PROMPTS
    ]
    return [padded, tokenizer.pad_token_id, min(tokenizer.model_max_length, 512)]


@pytest.mark.parametrize("case", MENDED)
def test_a_mended_tokenizer_reads_as_before(models, copy_of, tmp_path: Path, case: str) -> None:
    model, name, damage, repair = MENDED[case]
    folder = copy_of(model)
    damage(folder / name)
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    lines = [line for line in adapter.explain().splitlines() if f"({name}):" in line]
    assert any(repair in line for line in lines) or not repair
    loaded, whole = adapter.load(), ModelLoaderAdapter(models[model]).load()
    for each in dict(adapter.family.text_encoders):
        assert reads_as(getattr(loaded, each)) == reads_as(getattr(whole, each))
    if adapter.family.has_chat_template:
        messages = [{"role": "user", "content": "hi"}]
        assert loaded.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True
        ) == whole.tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("what", ["vocabulary", "all"])
def test_siblings_in_the_published_form_rebuild_each_other(
    models, copy_of, tmp_path: Path, name: str, what: str
) -> None:
    folder = copy_of("sdxl")
    for each in ("tokenizer", "tokenizer_2"):
        as_published(folder / each)
    if what == "all":
        shutil.rmtree(folder / name)
    else:
        (folder / name / "merges.txt").write_text("")
    loaded = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views").load()
    whole = ModelLoaderAdapter(models["sdxl"]).load()
    assert reads_as(loaded.tokenizer) == reads_as(whole.tokenizer)
    assert reads_as(loaded.tokenizer_2) == reads_as(whole.tokenizer_2)


@pytest.mark.parametrize("model", ["sdxl", "z-image"])
def test_the_published_form_is_healthy(models, copy_of, model: str) -> None:
    folder = copy_of(model)
    as_published(folder / "tokenizer")
    adapter = ModelLoaderAdapter(folder)
    assert adapter.mending.repairs == ()
    assert reads_as(adapter.load().tokenizer) == reads_as(ModelLoaderAdapter(models[model]).load().tokenizer)


REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no vocabulary at all": ("z-image", remove("tokenizer.json"), r"it lacks its vocabulary"),
    "garbled and no other": ("z-image", cut("tokenizer.json"), r"tokenizer\.json is not valid JSON"),
    "not a tokenizer": ("z-image", write("tokenizer.json", '{"model": {}}'), r"holds no vocabulary"),
    "merges cut short, no sibling": (
        "z-image",
        all_of(as_published, lambda f: (f / "merges.txt").write_text("#version: 0.2\nr e\n") and None),
        r"merges\.txt is cut short: nothing in it makes 'red'",
    ),
    "ids of special tokens lost": (
        "z-image",
        lambda folder: as_published(folder, special_ids=False),
        r"vocab\.json has no id for '<\|endoftext\|>'",
    ),
    "settings and template gone": (
        "z-image",
        remove("tokenizer_config.json", "chat_template.jinja"),
        r"tokenizer_config\.json is missing, and the chat template",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nothing_tells_is_refused_before_loading(copy_of, case: str) -> None:
    model, damage, sentence = REFUSED[case]
    folder = copy_of(model)
    damage(folder / "tokenizer")
    with pytest.raises(CheckpointDamaged, match=sentence) as raised:
        ModelLoaderAdapter(folder).explain()
    assert str(folder / "tokenizer") in str(raised.value)


def test_two_text_encoders_of_unlike_size_lend_each_other_nothing(copy_of) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of("sdxl")
    shutil.rmtree(folder / "tokenizer")
    weights = load_file(folder / "text_encoder_2" / "model.safetensors")
    table = "text_model.embeddings.token_embedding.weight"
    weights[table] = weights[table][:-1].clone()
    save_file(weights, folder / "text_encoder_2" / "model.safetensors", metadata={"format": "pt"})
    config = folder / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": len(weights[table])}))
    with pytest.raises(CheckpointDamaged, match="names 'tokenizer', but there is no such folder"):
        ModelLoaderAdapter(folder).explain()


def test_a_base_folder_lends_the_whole_tokenizer(models, copy_of, tmp_path: Path) -> None:
    folder = copy_of("z-image")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    adapter = ModelLoaderAdapter(folder, base=models["z-image"], cache_folder=tmp_path / "views")
    assert "take-from-base (tokenizer)" in adapter.explain()
    assert reads_as(adapter.load().tokenizer) == reads_as(
        ModelLoaderAdapter(models["z-image"]).load().tokenizer
    )


def as_spiece(folder: Path) -> None:
    """PixArt's makers publish the vocabulary of T5 in this form alone."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    pieces = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    model = proto.ModelProto()
    for piece, score in pieces:
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    model.trainer_spec.model_type = 1
    model.trainer_spec.unk_id = 2
    model.normalizer_spec.name = "identity"
    (folder / "spiece.model").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("rest", ["gone", "garbled", "settings gone too"])
def test_t5s_published_form_is_read(models, copy_of, tmp_path: Path, rest: str) -> None:
    folder = copy_of("pixart")
    as_spiece(folder / "tokenizer")
    if rest == "garbled":
        cut("tokenizer.json")(folder / "tokenizer")
    else:
        (folder / "tokenizer" / "tokenizer.json").unlink()
    if rest == "settings gone too":
        (folder / "tokenizer" / "tokenizer_config.json").unlink()
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    assert (adapter.mending.repairs == ()) is (rest == "gone")
    whole = ModelLoaderAdapter(models["pixart"]).load()
    assert reads_as(adapter.load().tokenizer) == reads_as(whole.tokenizer)
