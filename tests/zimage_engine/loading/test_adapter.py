"""Real tiny checkpoints, damaged one way each: what stock diffusers says of it, and what we say."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file, save_file

from zimage_engine.errors import CheckpointDamaged, CheckpointNotFound, UnknownFamily
from zimage_engine.loading.adapter import ModelLoaderAdapter

TRANSFORMER = Path("transformer/diffusion_pytorch_model.safetensors")
TEXT_ENCODER = Path("text_encoder/model.safetensors")
Weights = dict[str, torch.Tensor]


def rewrite(path: Path, change: Callable[[Weights], Weights]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def put(weights: Weights, name: str, value: float) -> Weights:
    weights[name].view(-1)[3] = value
    return weights


def without(weights: Weights, name: str) -> Weights:
    return {key: value for key, value in weights.items() if key != name}


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {f"{prefix}{key}": value for key, value in weights.items()}


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def empty_vocabulary(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)


def without_template(folder: Path) -> None:
    (folder / "tokenizer" / "chat_template.jinja").unlink()


def fewer_embeddings(folder: Path) -> None:
    rewrite(
        folder / TEXT_ENCODER, lambda w: w | {"embed_tokens.weight": w["embed_tokens.weight"][:100].clone()}
    )
    edit_json(folder / "text_encoder" / "config.json", vocab_size=100)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_whole_checkpoint_loads_into_the_stock_pipeline(tiny_model: Path) -> None:
    pipeline = ModelLoaderAdapter(tiny_model).load()
    assert type(pipeline) is ZImagePipeline
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_the_kwargs_are_those_of_the_stock_call(tiny_model: Path) -> None:
    adapter = ModelLoaderAdapter(str(tiny_model))
    assert adapter.get_load_kwargs() == {
        "torch_dtype": torch.bfloat16,
        "use_safetensors": True,
        "variant": None,
        "local_files_only": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = ZImagePipeline.from_pretrained(adapter.model_path, **adapter.get_load_kwargs())
    assert pipeline.transformer.dtype == torch.bfloat16


def test_loading_warns_of_nothing_and_shows_no_bars(
    tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        ModelLoaderAdapter(tiny_model).load()
    captured = capfd.readouterr()
    assert "%|" not in captured.out + captured.err


def test_float32_files_become_bfloat16(copy_of_tiny_model) -> None:
    folder = copy_of_tiny_model()
    rewrite(folder / TRANSFORMER, lambda weights: {key: value.float() for key, value in weights.items()})
    adapter = ModelLoaderAdapter(folder)
    assert "F32" in adapter.explain()
    assert adapter.load().transformer.dtype == torch.bfloat16


def test_a_text_encoder_stored_under_its_heads_names_loads(copy_of_tiny_model) -> None:
    folder = copy_of_tiny_model()
    rewrite(
        folder / TEXT_ENCODER,
        lambda w: prefixed(w, "model.") | {"lm_head.weight": w["embed_tokens.weight"].clone()},
    )
    stored = load_file(folder / TEXT_ENCODER)["model.embed_tokens.weight"]
    loaded = ModelLoaderAdapter(folder).load().text_encoder.get_input_embeddings().weight
    assert torch.equal(loaded, stored)


def test_variant_files_load_without_being_asked_for(copy_of_tiny_model) -> None:
    folder = copy_of_tiny_model()
    for path in (folder / TRANSFORMER, folder / TEXT_ENCODER, folder / "vae" / TRANSFORMER.name):
        path.rename(path.with_name(path.name.replace(".safetensors", ".bf16.safetensors")))
    adapter = ModelLoaderAdapter(folder)
    assert adapter.get_load_kwargs()["variant"] == "bf16"
    adapter.load()


def test_sharded_weights_load(copy_of_tiny_model) -> None:
    folder = copy_of_tiny_model()
    pipeline = ModelLoaderAdapter(folder).load()
    (folder / TRANSFORMER).unlink()
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="20KB")
    adapter = ModelLoaderAdapter(folder)
    assert len(adapter.plan.weights["transformer"]) > 1
    again = adapter.load()
    assert all(
        torch.equal(one, other)
        for one, other in zip(pipeline.transformer.parameters(), again.transformer.parameters(), strict=True)
    )


def test_pickled_weights_load_where_there_is_nothing_else(copy_of_tiny_model) -> None:
    folder = copy_of_tiny_model()
    torch.save(load_file(folder / TRANSFORMER), folder / "transformer" / "diffusion_pytorch_model.bin")
    (folder / TRANSFORMER).unlink()
    adapter = ModelLoaderAdapter(folder)
    assert adapter.get_load_kwargs()["use_safetensors"] is None
    adapter.load()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a NaN": (
        lambda f: rewrite(f / TRANSFORMER, lambda w: put(w, "layers.0.attention.to_q.weight", float("nan"))),
        r"transformer: layers.0.attention.to_q.weight holds NaN or infinite values",
    ),
    "an infinity in the text encoder": (
        lambda f: rewrite(f / TEXT_ENCODER, lambda w: put(w, "embed_tokens.weight", float("-inf"))),
        r"text_encoder: embed_tokens.weight holds NaN or infinite",
    ),
    "one key renamed": (
        lambda f: rewrite(
            f / TRANSFORMER, lambda w: without(w, "x_pad_token") | {"x_pad_tokens": w["x_pad_token"]}
        ),
        r"transformer: .* 1 of the 73 tensors are missing, the first is x_pad_token and 1 are not of this",
    ),
    "a missing key in the text encoder": (
        lambda f: rewrite(f / TEXT_ENCODER, lambda w: without(w, "norm.weight")),
        r"text_encoder: .* 1 of the 24 tensors are missing, the first is norm.weight",
    ),
    "a missing key in the VAE": (
        lambda f: rewrite(f / "vae" / TRANSFORMER.name, lambda w: without(w, "decoder.conv_in.weight")),
        r"vae: diffusion_pytorch_model.safetensors alone makes no AutoencoderKL",
    ),
    "another shape": (
        lambda f: rewrite(f / TRANSFORMER, lambda w: w | {"x_pad_token": torch.zeros(1, 5)}),
        r"transformer: x_pad_token in diffusion_pytorch_model.safetensors is \[1, 5\], expected \[1, 16\]",
    ),
    "a file cut off": (
        lambda f: cut_off(f / TRANSFORMER),
        r"safetensors has \d+ bytes where its header announces",
    ),
    "a web page in place of a file": (
        lambda f: (f / TRANSFORMER).write_text("<html>moved</html>" * 99),
        r"is a web page, not weights",
    ),
    "a component's folder is gone": (
        lambda f: (f / "vae").rename(f.parent / "elsewhere"),
        r"names 'vae', but there is no such folder",
    ),
    "the weights are gone": (lambda f: (f / TRANSFORMER).unlink(), r"transformer holds no weights"),
    "the vocabulary is gone": (empty_vocabulary, r"tokenizer: .* it lacks its vocabulary"),
    "the chat template is gone": (without_template, r"tokenizer: it has no chat template"),
    "fewer embeddings than ids": (fewer_embeddings, r"the text encoder has 100 embeddings"),
    "no shift in the VAE's config": (
        lambda f: edit_json(f / "vae" / "config.json", shift_factor=None),
        r"its config has no shift_factor",
    ),
    "the config is not JSON": (
        lambda f: (f / "vae" / "config.json").write_text("{,}"),
        r"config.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_before_anything_is_drawn(copy_of_tiny_model, case: str) -> None:
    damage_it, sentence = DAMAGE[case]
    folder = copy_of_tiny_model()
    damage_it(folder)
    with pytest.raises(CheckpointDamaged, match=sentence):
        ModelLoaderAdapter(folder).load()


def test_recognising_and_explaining_name_all_that_was_decided(tiny_model: Path) -> None:
    explanation = ModelLoaderAdapter(tiny_model).explain()
    for words in (
        str(tiny_model),
        "Z-Image",
        "pipeline_class('ZImagePipeline')",
        "bfloat16",
        "transformer: ",
    ):
        assert words in explanation


def test_a_family_can_be_said(copy_of_tiny_model, tmp_path: Path) -> None:
    folder = copy_of_tiny_model()
    edit_json(folder / "scheduler" / "scheduler_config.json", shift=4.5)
    with pytest.raises(UnknownFamily):
        _ = ModelLoaderAdapter(folder).family
    adapter = ModelLoaderAdapter(folder, family="z-image", cache_folder=tmp_path)
    assert "family='z-image' was given" in adapter.explain()
    adapter.load()


@pytest.mark.parametrize("family", ["", "z-images"])
def test_an_unknown_family_is_refused(copy_of_tiny_model, family: str) -> None:
    folder = copy_of_tiny_model()
    edit_json(folder / "model_index.json", _class_name="MyOwnPipeline")
    with pytest.raises(UnknownFamily):
        _ = ModelLoaderAdapter(folder, family=family).family


def test_nothing_at_the_path_is_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="there is nothing at"):
        ModelLoaderAdapter(tmp_path / "nowhere").load()
