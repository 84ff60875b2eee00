"""The demo model's training: its words, its pictures, its batched forward pass, and every stage once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ZImagePipeline
from transformers import AutoTokenizer

from zimage_engine.demo import captions
from zimage_engine.demo.model import (
    BatchedDenoiser,
    new_text_encoder,
    new_transformer,
    read_words,
)
from zimage_engine.demo.pictures import (
    COLOURS,
    SHAPES,
    ShapesSpec,
    Thing,
    draw,
    is_held_out,
    random_pair,
    random_scene,
    random_single,
)
from zimage_engine.demo.tokenizer import build_tokenizer
from zimage_engine.demo.train import export, read_latents, write_latents
from zimage_engine.demo.train_denoiser import TokenCache, batches, train_denoiser, training_spec
from zimage_engine.demo.train_vae import VAE_CONFIG, train_vae
from zimage_engine.prompts.phrases import lexicon

MODEL_FOLDER = Path(captions.__file__).parent / "model"
MAKERS = (random_single, random_pair, random_scene)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_random_state_draws_the_same_picture(make):
    spec = make(random.Random(3))
    first, second = (draw(spec, random.Random(5)).tobytes() for _ in range(2))
    assert first == second
    assert first != draw(spec, random.Random(6)).tobytes()


def test_about_one_combination_in_seven_is_held_out_and_none_reaches_training():
    singles = [
        ShapesSpec(ground, (Thing(colour, shape),))
        for ground in COLOURS
        for colour in COLOURS
        for shape in SHAPES
        if colour != ground
    ]
    assert 0.09 < sum(map(is_held_out, singles)) / len(singles) < 0.2
    rng = random.Random(1)
    assert not any(is_held_out(training_spec(rng)) for _ in range(3000))


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("make", MAKERS)
def test_every_caption_is_made_of_whole_words(make, language, tokenizer):
    rng = random.Random(2)
    for _ in range(400):
        words = captions.with_quality(captions.caption(make(rng), rng, language), rng, language)
        for token in tokenizer.tokenize(words):
            text = tokenizer.convert_tokens_to_string([token])
            assert "�" not in text, f"{words!r} falls apart into bytes"
            assert len(text.strip()) != 1 or not text.strip().isascii() or text.strip() in "aA,.-", (
                f"{words!r} falls apart into letters: {text!r}"
            )


@pytest.mark.parametrize(
    "text", ["", "a red circle", "红色圆形，白色背景。", "xyzzy 42 §", "émoji 🎈", "Red\nBIG\tsquare"]
)
def test_any_text_survives_the_tokenizer(text, tokenizer):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_shipped_tokenizer_is_the_one_that_the_tables_make(tokenizer):
    shipped = AutoTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer")
    rng = random.Random(4)
    for make in MAKERS:
        for language in ("en", "zh"):
            words = captions.caption(make(rng), rng, language)
            assert shipped(words).input_ids == tokenizer(words).input_ids


def test_a_complete_caption_tells_colours_shapes_and_ground():
    rng = random.Random(6)
    for _ in range(300):
        spec = random_pair(rng)
        words = captions.caption(spec, rng, "en", complete=True).lower()
        assert spec.background in words
        for thing in spec.things:
            assert thing.colour in words
            assert thing.shape in words or (thing.shape == "circle" and "disc" in words)


def test_the_batched_forward_pass_computes_what_the_stock_one_does():
    torch.manual_seed(0)
    transformer = new_transformer()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    latents, time = torch.randn(3, 8, 16, 16), torch.rand(3)
    told = [torch.randn(length, 192) for length in (5, 32, 20)]
    words, mask = torch.zeros(3, 32, 192), torch.zeros(3, 32, dtype=torch.bool)
    for row, part in enumerate(told):
        words[row, : len(part)] = part
        mask[row, : len(part)] = True
    with torch.no_grad():
        stock = torch.stack(transformer([picture[:, None] for picture in latents], time, told).sample)[
            :, :, 0
        ]
        batched = BatchedDenoiser(transformer)
        ours = batched(latents, time, words, mask, *batched.rotations(32, 8, 8))
    assert stock.abs().mean() > 0.1
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_reading_words_gives_the_hidden_state_that_the_pipeline_reads(tokenizer):
    torch.manual_seed(0)
    text_encoder = new_text_encoder(len(tokenizer)).eval()
    token_ids = torch.randint(0, len(tokenizer), (2, 20))
    with torch.no_grad():
        stock = text_encoder(token_ids, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(read_words(text_encoder, token_ids), stock)


def test_a_batch_holds_captions_of_one_padded_length(tokenizer):
    rng = random.Random(0)
    specs = [training_spec(rng) for _ in range(50)]
    stream = batches(specs, TokenCache(tokenizer), rng)
    seen = set()
    for _ in range(12):
        batch = next(stream)
        assert batch.token_ids.shape == batch.mask.shape
        assert batch.mask.any(dim=1).all()
        lengths = batch.mask.sum(dim=1)
        assert ((lengths + 31) // 32 * 32 == batch.mask.shape[1]).all()
        seen.add(batch.mask.shape[1])
    assert 32 in seen


def test_every_stage_runs_and_leaves_a_folder_that_stock_diffusers_draws_with(tmp_path, tokenizer):
    train_vae(tmp_path, minutes=0.03)
    write_latents(tmp_path, 64, seed=1)
    data = read_latents(tmp_path)
    assert data.latents.shape == (64, VAE_CONFIG["latent_channels"], 16, 16)
    scaled = (data.latents.float() - data.shift) * data.scale
    assert abs(scaled.mean()) < 0.1
    assert 0.9 < scaled.std() < 1.1
    for resume in (None, tmp_path / "student.pt"):
        train_denoiser(
            tmp_path, tokenizer, data, minutes=0.02, resume=resume, warm_up_steps=2, compiled=False
        )
    export(tmp_path, tmp_path / "model")
    pipeline = ZImagePipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert pipeline.vae.config.scaling_factor == pytest.approx(data.scale, abs=1e-3)
    picture = pipeline(
        prompt="a red circle", num_inference_steps=2, guidance_scale=0.8, height=256, width=256
    ).images[0]
    assert picture.size == (256, 256)


@pytest.mark.parametrize(
    ("language", "quality", "negative"),
    [
        ("en", captions.QUALITY_EN, captions.NEGATIVE_EN),
        ("zh", captions.QUALITY_ZH, captions.NEGATIVE_ZH),
    ],
)
def test_the_model_was_taught_the_very_words_that_the_enhancer_adds(language, quality, negative):
    words = lexicon(language)
    assert tuple(phrase.text for phrase in words.positive) == quality
    assert tuple(phrase.text for phrase in words.negative) == negative
