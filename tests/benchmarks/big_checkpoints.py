"""Writes checkpoints of any size with noise in them, one tensor at a time; they load, and draw nothing.

The shapes are those of the real diffusers classes at Z-Image's widths, with as many layers as the size asks
for. The text encoder has the published number of tensors and embeddings and is narrow, the tokenizer has the
published number of tokens and merges, the VAE is tiny.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests.zimage_engine.tiny_models import TEXT_WIDTH, write_tiny_z_image
from zimage_engine.checkpoint.parts import Recipe
from zimage_engine.checkpoint.tensors import TensorFacts
from zimage_engine.loading.tensor_writer import write_safetensors

DIM = 3840
HEAD_DIM = 128
STORED_BYTES = {"float32": 4, "bfloat16": 2}
#: Below this a folder has one head of attention, not thirty: a layer of the real width has 350 MB.
FULL_WIDTH_BYTES = 2_000_000_000
SHARD_BYTES = 1_000_000_000
#: What the published text encoder and tokenizer count; loading them takes time whatever their width.
TEXT_LAYERS, EMBEDDINGS, MERGES = 36, 151_936, 151_387
SMALL_EMBEDDINGS, SMALL_MERGES = 1000, 500
#: What `torch.compile` puts before every name; stock diffusers takes none of such a file.
COMPILED_PREFIX = "_orig_mod."

_STEM = "diffusion_pytorch_model"
_Shapes = Mapping[str, tuple[int, ...]]


def write_z_image_folder(folder: Path, about_bytes: int, stored: str) -> Path:
    """A healthy Z-Image folder; its transformer is in shards, as published, and has about that size."""
    is_wide = about_bytes >= FULL_WIDTH_BYTES
    write_tiny_z_image(folder, head_dim=HEAD_DIM)
    for name in ("transformer", "tokenizer", "text_encoder"):
        shutil.rmtree(folder / name)
    _tokenizer(MERGES if is_wide else SMALL_MERGES).save_pretrained(folder / "tokenizer")
    text_encoder = _text_encoder(EMBEDDINGS if is_wide else SMALL_EMBEDDINGS)
    text_encoder.to(getattr(torch, stored)).save_pretrained(folder / "text_encoder")
    model = _transformer_of(about_bytes / STORED_BYTES[stored], is_wide)
    model.save_config(folder / "transformer")
    shards = list(_shards(_shapes(model), SHARD_BYTES // STORED_BYTES[stored]))
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"{_STEM}-{number:05}-of-{len(shards):05}.safetensors"
        _write_noise(folder / "transformer" / name, shapes, stored)
        weight_map.update(dict.fromkeys(shapes, name))
    index = {"metadata": {"total_size": about_bytes}, "weight_map": weight_map}
    (folder / "transformer" / f"{_STEM}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_compiled_twin(folder: Path, healthy: Path, about_bytes: int, stored: str) -> Path:
    """The folder `healthy` again, its transformer saved after `torch.compile`: every name has a prefix."""
    in_shards = shutil.ignore_patterns(f"{_STEM}-*", f"{_STEM}.*.index.json")
    shutil.copytree(healthy, folder, ignore=in_shards)
    model = _transformer_of(about_bytes / STORED_BYTES[stored], about_bytes >= FULL_WIDTH_BYTES)
    shapes = {COMPILED_PREFIX + name: shape for name, shape in _shapes(model).items()}
    _write_noise(folder / "transformer" / f"{_STEM}.safetensors", shapes, stored)
    return folder


def _transformer_of(elements: float, is_wide: bool) -> ZImageTransformer2DModel:
    """On the meta device, with the number of layers that comes nearest to `elements` weights."""
    heads = DIM // HEAD_DIM if is_wide else 1
    one, two = (_count(_transformer(heads, layers)) for layers in (1, 2))
    return _transformer(heads, max(1, 1 + round((elements - one) / (two - one))))


def _transformer(heads: int, layers: int) -> ZImageTransformer2DModel:
    with torch.device("meta"):
        return ZImageTransformer2DModel(
            in_channels=4,
            dim=heads * HEAD_DIM,
            n_layers=layers,
            n_refiner_layers=1,
            n_heads=heads,
            n_kv_heads=heads,
            cap_feat_dim=TEXT_WIDTH,
        )


def _text_encoder(embeddings: int) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=embeddings,
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def _tokenizer(merge_count: int) -> Qwen2Tokenizer:
    """Tokens of one, two and three bytes, in no order that a language has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(first, second) for first in alphabet for second in alphabet]
    triples = ((first + second, third) for first, second in pairs for third in alphabet)
    merges = list(islice(chain(pairs, triples), merge_count))
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*alphabet, *(left + right for left, right in merges), *specials]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=merges,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>u\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    )
    return tokenizer


def _shapes(model: torch.nn.Module) -> _Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _count(model: torch.nn.Module) -> int:
    return sum(math.prod(shape) for shape in _shapes(model).values())


def _shards(shapes: _Shapes, elements_each: int) -> Iterator[_Shapes]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if shard and sum(map(math.prod, (*shard.values(), shape))) > elements_each:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _write_noise(file: Path, shapes: _Shapes, stored: str) -> None:
    noise = torch.randn(max(map(math.prod, shapes.values())))
    write_safetensors(
        file,
        [Recipe(name, shape, name) for name, shape in shapes.items()],
        lambda name: noise[: math.prod(shapes[name])].view(shapes[name]),
        [TensorFacts(name, "F32", shape) for name, shape in shapes.items()],
        stored,
    )
