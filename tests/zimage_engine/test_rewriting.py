"""The text encoder as a writer: on the weights that are there, checked, within bounds, without a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageChops

from tests.zimage_engine.writing_encoder import write_writing_model
from zimage_engine import Engine, GenerationRequest
from zimage_engine.errors import DeadlineExceeded, GenerationCancelled
from zimage_engine.memory.residency import Residency
from zimage_engine.memory.streaming import tensors_of
from zimage_engine.prompts.enhancer import enhance
from zimage_engine.rewriting import obstacle
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.sampling.text_generation import language_model, write
from zimage_engine.types import EnhancedPrompt, NotWritten, RewriteBudget, Written

BUDGET = RewriteBudget(seconds=60, tokens=16)
PROMPT = "red boat house moon tree"
REWRITTEN = f"{PROMPT} by day, with mountains"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(write_writing_model(tmp_path_factory.mktemp("models") / "writing"), device="cpu")


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def test_the_head_is_the_embedding_and_the_body_the_text_encoder(engine: Engine) -> None:
    text_encoder = engine.pipeline.text_encoder
    before = {id(tensor): tensor.data_ptr() for tensor in tensors_of((text_encoder,))}
    model = language_model(text_encoder)
    assert model.model is text_encoder
    assert model.lm_head.weight.data_ptr() == text_encoder.embed_tokens.weight.data_ptr()
    assert {id(tensor): tensor.data_ptr() for tensor in tensors_of((model,))} == before


def test_it_writes_what_the_same_weights_with_a_head_of_their_own_write(engine: Engine) -> None:
    """Step by step with all of the text anew each time: no cache, no generation of transformers'."""
    pipeline = engine.pipeline
    answer = write(pipeline, chat(PROMPT), BUDGET)
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    framed = tokenizer.apply_chat_template(chat(PROMPT), tokenize=False)
    ids = tokenizer(framed, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(BUDGET.tokens):
            last = text_encoder(ids).last_hidden_state[:, -1]
            ids = torch.cat([ids, (last @ text_encoder.embed_tokens.weight.T).argmax(-1, keepdim=True)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    assert answer == replace(
        answer, text=tokenizer.decode(ids[0, start:], skip_special_tokens=True), ended="done"
    )
    assert isinstance(answer, Written) and answer.text == REWRITTEN and answer.tokens == ids.shape[1] - start


@pytest.mark.parametrize(
    ("prompt", "outcome", "found"),
    [
        (PROMPT, "used", ""),
        ("blue star boat moon tree", "number", "'two'"),
        ("green boat house moon tree", "quoted", "'star'"),
        ("yellow boat house moon tree", "loop", "over and over"),
    ],
)
def test_what_is_written_is_judged(engine: Engine, prompt: str, outcome: str, found: str) -> None:
    pieces: list[str] = []
    made = engine.rewrite(prompt, "text", BUDGET, on_text=pieces.append)
    assert made.rewrite is not None and made.rewrite.by == "model"
    assert made.rewrite.outcome == outcome
    assert found in made.rewrite.because
    assert "".join(pieces).startswith(prompt)
    counted = {"count_tokens": engine._tokens.count, "token_limit": engine.description.token_limit}
    by_rules = enhance(prompt, "text", **counted)
    if outcome == "used":
        assert made.prompt == REWRITTEN == "".join(pieces)
        assert made.negative_prompt == enhance(made.prompt, "text", **counted).negative_prompt
        assert made.added == () and {each.field for each in made.additions} == {"negative_prompt"}
    else:
        assert replace(made, rewrite=None) == by_rules
    assert timeless(engine.rewrite(prompt, "text", BUDGET)) == timeless(made)


def timeless(made: EnhancedPrompt) -> EnhancedPrompt:
    assert made.rewrite is not None
    return replace(made, rewrite=replace(made.rewrite, seconds=0.0))


def test_a_request_is_drawn_from_what_was_written_and_tells_so(engine: Engine) -> None:
    asked = GenerationRequest(PROMPT, seed=3, num_inference_steps=2, enhancer="model", rewrite_budget=BUDGET)
    drawn = engine.generate(asked)
    assert drawn.report.prompt == REWRITTEN
    assert drawn.report.enhancement.rewrite is not None
    assert not {notice.code for notice in drawn.report.warnings} & {"prompt_not_rewritten"}
    by_hand = replace(
        asked,
        prompt=REWRITTEN,
        negative_prompt=drawn.report.negative_prompt,
        enhance=False,
        refine=True,
    )
    assert same(drawn.images[0], engine.generate(by_hand).images[0])

    refused = engine.generate(replace(asked, prompt="green boat house moon tree"))
    (notice,) = [each for each in refused.report.warnings if each.code == "prompt_not_rewritten"]
    assert "quoted" in notice.message and "rules" in notice.message
    assert refused.report.prompt.startswith("green boat house moon tree, masterpiece")

    off = engine.generate(replace(asked, enhance=False))
    assert off.report.prompt == PROMPT and off.report.enhancement.rewrite is None


def same(one: Any, other: Any) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def test_pictures_are_bit_for_bit_the_same_before_and_after_writing(engine: Engine) -> None:
    asked = GenerationRequest(PROMPT, seed=5, num_inference_steps=2, enhance=False)
    state = {name: tensor.clone() for name, tensor in engine.pipeline.text_encoder.state_dict().items()}
    generator = torch.get_rng_state()
    before = engine.generate(asked).images[0]
    for prompt in (PROMPT, "green boat house moon tree"):
        engine.rewrite(prompt, None, BUDGET)
    assert same(before, engine.generate(asked).images[0])
    assert torch.equal(generator, torch.get_rng_state())
    after = engine.pipeline.text_encoder.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in state.items())
    assert not engine.pipeline.text_encoder._forward_hooks


def test_it_stops_within_one_token_when_cancelled(engine: Engine) -> None:
    pieces: list[str] = []
    control = DrawingControl()

    def heard(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            control.cancel()

    with pytest.raises(GenerationCancelled):
        engine.rewrite(PROMPT, None, BUDGET, control, heard)
    assert len(pieces) == 2
    with pytest.raises(DeadlineExceeded):
        engine.rewrite(PROMPT, None, BUDGET, DrawingControl(0.0))
    assert engine.rewrite(PROMPT, None, BUDGET).prompt == REWRITTEN


def test_what_is_not_done_within_its_tokens_is_not_used(engine: Engine) -> None:
    made = engine.rewrite(PROMPT, None, replace(BUDGET, tokens=8))
    assert made.rewrite is not None
    assert (made.rewrite.outcome, made.rewrite.tokens) == ("unfinished", 8)
    assert made.prompt.startswith(f"{PROMPT}, masterpiece")


def test_its_time_is_kept_and_the_rules_are_used(engine: Engine) -> None:
    made = engine.rewrite(PROMPT, None, replace(BUDGET, seconds=1e-6))
    assert made.rewrite is not None
    assert (made.rewrite.outcome, made.rewrite.tokens) == ("timeout", 1)
    assert made.prompt.startswith(f"{PROMPT}, masterpiece")


@pytest.mark.parametrize("residency", list(Residency))
@pytest.mark.parametrize("streams_text", [False, True])
def test_a_plan_that_fetches_the_text_encoder_piece_by_piece_is_refused(
    engine: Engine, residency: Residency, streams_text: bool
) -> None:
    assert engine._keeper.plan is not None
    plan = replace(engine._keeper.plan, residency=residency, stream_text_encoder=streams_text)
    stays = residency in (Residency.NONE, Residency.MODEL, Residency.STREAM) and not streams_text
    assert (obstacle(plan) is None) == stays
    assert obstacle(None) is None


@pytest.mark.parametrize("residency", [Residency.MODEL, Residency.STREAM, Residency.NONE])
def test_weights_that_come_for_their_turn_write_the_same(engine: Engine, residency: Residency) -> None:
    """On the CPU the copies are as real."""
    keeper = engine._keeper
    plan = keeper.plan
    assert plan is not None
    try:
        keeper._go_over_to(replace(plan, residency=residency, release_text_encoder=True), "encode")
        assert engine.rewrite(PROMPT, None, BUDGET).prompt == REWRITTEN
    finally:
        keeper._go_over_to(plan, "encode")


def test_a_prompt_longer_than_the_model_reads_is_left_to_the_rules(engine: Engine) -> None:
    prompt = "red circle " * 400
    made = engine.rewrite(prompt, None, BUDGET)
    assert made.rewrite is not None and made.rewrite.outcome == "unavailable"
    assert made.prompt == prompt


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"tie_word_embeddings": False}, "no language model"),
        ({"max_position_embeddings": 20}, "reads 20 in all"),
    ],
)
def test_a_text_encoder_that_cannot_write_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], found: str
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(engine.pipeline.text_encoder.config, name, value)
    answer = write(engine.pipeline, chat(PROMPT), BUDGET)
    assert isinstance(answer, NotWritten) and answer.outcome == "unavailable"
    assert found in answer.because


def test_a_model_whose_text_encoder_is_another_leaves_it_to_the_rules(tiny_model: Path) -> None:
    """The tiny model's template says nothing of an assistant, and its random weights write nonsense."""
    engine = Engine.load(tiny_model, device="cpu")
    made = engine.rewrite("a red circle", None, RewriteBudget(60, 16))
    assert made.rewrite is not None and made.rewrite.outcome != "used"
    assert made.prompt.startswith("a red circle, masterpiece")
