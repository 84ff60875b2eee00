from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading.verify import check_dtype, check_finite, check_names, check_no_meta

CONFIG = Qwen3Config(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    tie_word_embeddings=True,
)
BASE = Qwen3Model(CONFIG)
WITH_HEAD = Qwen3ForCausalLM(CONFIG)
BASE_NAMES = set(BASE.state_dict())
HEAD_NAMES = set(WITH_HEAD.state_dict())


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        (BASE, BASE_NAMES),
        (BASE, HEAD_NAMES),
        (BASE, HEAD_NAMES - {"lm_head.weight"}),
        (WITH_HEAD, HEAD_NAMES),
        (WITH_HEAD, HEAD_NAMES - {"lm_head.weight"}),
        (torch.nn.Linear(2, 2), {"weight", "bias"}),
    ],
)
def test_names_that_fit_are_accepted_with_or_without_a_tied_head(module: torch.nn.Module, stored) -> None:
    check_names("part", module, stored)


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        (BASE, BASE_NAMES - {"norm.weight"}),
        (BASE, BASE_NAMES | {"vision.weight"}),
        (BASE, set()),
        (WITH_HEAD, HEAD_NAMES - {"model.embed_tokens.weight"}),
        (torch.nn.Linear(2, 2), {"weight"}),
        (torch.nn.Linear(2, 2), {"weight", "bias", "lm_head.weight"}),
        (torch.nn.Linear(2, 2), {"_orig_mod.weight", "_orig_mod.bias"}),
    ],
)
def test_names_that_do_not_fit_are_refused(module: torch.nn.Module, stored) -> None:
    with pytest.raises(CheckpointDamaged, match="part: the weight files do not fit the model"):
        check_names("part", module, stored)


def test_a_parameter_on_meta_is_refused() -> None:
    check_no_meta("part", torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointDamaged, match=r"2 tensors were not loaded \(the first is weight\)"):
        check_no_meta("part", torch.nn.Linear(2, 2, device="meta"))


def test_a_parameter_of_another_dtype_is_refused() -> None:
    module = torch.nn.Linear(2, 2).to(torch.bfloat16)
    check_dtype("part", module, torch.bfloat16)
    module.bias.data = module.bias.data.float()
    with pytest.raises(
        CheckpointDamaged, match=r"1 parameters are not torch\.bfloat16: bias is torch\.float32"
    ):
        check_dtype("part", module, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 5, -1])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, value: float, place: int) -> None:
    module = torch.nn.Linear(50, 50).to(dtype)
    check_finite("part", module)
    module.weight.data.view(-1)[place] = value
    with pytest.raises(CheckpointDamaged, match="part: weight holds NaN or infinite values"):
        check_finite("part", module)


CLIP = CLIPTextModel(
    CLIPTextConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=8,
        eos_token_id=9,
    )
)
CLIP_NAMES = {f"text_model.{name.removeprefix('text_model.')}" for name in CLIP.state_dict()}
T5 = T5EncoderModel(
    T5Config(vocab_size=10, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1, decoder_start_token_id=0)
)
T5_NAMES = set(T5.state_dict())


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        (CLIP, CLIP_NAMES),
        (CLIP, CLIP_NAMES | {"text_model.embeddings.position_ids"}),
        (T5, T5_NAMES | {"encoder.embed_tokens.weight"}),
        (T5, T5_NAMES - {"encoder.embed_tokens.weight"}),
    ],
)
def test_position_ids_and_tied_embeddings_are_no_damage(module: torch.nn.Module, stored: set[str]) -> None:
    check_names("part", module, stored)


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        (CLIP, CLIP_NAMES - {"text_model.final_layer_norm.weight"}),
        (CLIP, CLIP_NAMES | {"text_model.embeddings.other_ids"}),
        (T5, T5_NAMES - {"shared.weight", "encoder.embed_tokens.weight"}),
    ],
)
def test_what_those_models_lack_is_still_found(module: torch.nn.Module, stored: set[str]) -> None:
    with pytest.raises(CheckpointDamaged, match="part: the weight files do not fit the model"):
        check_names("part", module, stored)
