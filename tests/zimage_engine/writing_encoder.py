"""A Z-Image folder whose text encoder has learned to write: it copies five words and says some more.

What it says behind them depends on the first, so that it writes what can be used, and what must not be.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch.nn.functional import cross_entropy
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.zimage_engine.tiny_models.seeded import seeded
from tests.zimage_engine.tiny_models.z_image import _transformer, _vae
from zimage_engine.engine import DEMO_MODEL_PATH

#: What stands behind the five words, by the first of them.
ENDINGS = {
    "red": " by day, with mountains",
    "blue": ", two stars",
    "green": ' "star"',
    "yellow": " day" * 6,
}
WORDS = (
    "circle",
    "square",
    "star",
    "house",
    "tree",
    "boat",
    "moon",
    "small",
    "big",
    "sea",
    "black",
    "purple",
)
#: So many words has each prompt: copying is then looking back so far, which is learned in a second.
LENGTH = 5
_USERS_TURN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
_WIDTH = 64


def write_writing_model(folder: Path) -> Path:
    """Train the text encoder, which takes seconds, and write the folder."""
    tokenizer = Qwen2Tokenizer.from_pretrained(DEMO_MODEL_PATH / "tokenizer")
    tokenizer.chat_template = _USERS_TURN
    transformer = ZImageTransformer2DModel.from_config({**_transformer(16).config, "cap_feat_dim": _WIDTH})
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=seeded(_vae(channels=8)),
        text_encoder=_trained(tokenizer).model.to(torch.bfloat16),
        tokenizer=tokenizer,
        transformer=seeded(transformer),
    )
    pipeline.save_pretrained(folder)
    return folder


def _trained(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """On prompts of random words, each with itself and its ending as the answer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=_WIDTH,
                intermediate_size=2 * _WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=32,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            )
        )
    choice = random.Random(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    end, nothing = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for _ in range(120):
        rows = []
        for first, ending in ENDINGS.items():
            for _ in range(4):
                prompt = " ".join((first, *choice.sample(WORDS, LENGTH - 1)))
                asked, answer = (tokenizer(text).input_ids for text in (prompt, prompt + ending))
                assert len(asked) == LENGTH
                rows.append([*asked, end, *answer, end])
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [nothing] * (longest - len(row)) for row in rows])
        labels = tokens[:, 1:].masked_fill(tokens[:, 1:] == nothing, -100)
        labels[:, :LENGTH] = -100
        scores = model(tokens).logits[:, :-1]
        loss = cross_entropy(scores.flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1, "it has not learned it"
    return model.eval()
