"""Prompts that return are not read again, and nothing of a picture depends on that."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from tests.zimage_engine.memory.residencies import plan_for
from tests.zimage_engine.sampling.faults import FAMILIES
from tests.zimage_engine.tiny_models.lora import write_lora
from zimage_engine import Engine, GenerationRequest, LoraWeight
from zimage_engine.errors import GenerationCancelled, GuardExhausted
from zimage_engine.families import family_named
from zimage_engine.memory.residency import Residency
from zimage_engine.memory.strategies import apply
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.sampling.embedding_cache import EmbeddingCache, PromptKey
from zimage_engine.sampling.pipeline import GuardedPipeline
from zimage_engine.sampling.plan import resolve
from zimage_engine.types import PromptCacheUse

ASKED = GenerationRequest(
    prompt="A red circle", seed=11, width=64, height=64, num_inference_steps=2, enhance=False
)
GUIDED = replace(ASKED, guidance_scale=3.0, negative_prompt="blue")


def key(text: str, role: str = "prompt") -> PromptKey:
    return PromptKey(text, role, 512)


def states(size_bytes: int, value: int = 1) -> dict[str, Any]:
    return {"prompt_embeds": (torch.full((size_bytes,), value, dtype=torch.uint8),)}


# The cache alone.


@given(
    limit_bytes=st.integers(0, 2_000),
    acts=st.lists(
        st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 700), st.integers(0, 255)), max_size=60
    ),
)
def test_it_stays_within_its_bound_and_lets_the_longest_unused_go(
    limit_bytes: int, acts: list[tuple[bool, int, int, int]]
) -> None:
    """Against a model of it: (value, size) by text, the one used last at the end."""
    overhead = sys.getsizeof("0")
    cache, model = EmbeddingCache(limit_bytes), OrderedDict[int, tuple[int, int]]()
    for is_put, number, size_bytes, value in acts:
        if is_put:
            cache.put(key(str(number)), states(size_bytes, value))
            model.pop(number, None)
            if overhead + size_bytes <= limit_bytes:
                model[number] = (value, size_bytes)
            while sum(overhead + size for _, size in model.values()) > limit_bytes:
                model.popitem(last=False)
        else:
            found = cache.find(key(str(number)))
            assert (found is None) == (number not in model)
            if found is not None:
                model.move_to_end(number)
                kept_value, kept_size = model[number]
                assert torch.equal(
                    found["prompt_embeds"][0], states(kept_size, kept_value)["prompt_embeds"][0]
                )
        assert cache.size_bytes == sum(overhead + size for _, size in model.values()) <= limit_bytes
        assert len(cache) == len(model)


def test_what_is_larger_than_the_bound_is_not_kept_and_drives_none_out() -> None:
    cache = EmbeddingCache(1_000)
    cache.put(key("a"), states(100))
    cache.put(key("b"), states(1_000))
    assert cache.find(key("b")) is None
    assert cache.find(key("a")) is not None
    cache.put(key("x" * 2_000), states(1))  # the text counts too
    assert len(cache) == 1


def test_nobody_can_write_into_what_is_kept() -> None:
    cache, given_in = EmbeddingCache(1_000), states(10, 5)
    cache.put(key("a"), given_in)
    given_in["prompt_embeds"][0].zero_()
    for _ in range(2):
        found = cache.find(key("a"))
        assert found is not None
        assert found["prompt_embeds"][0].tolist() == [5] * 10
        found["prompt_embeds"][0].zero_()


def test_a_key_tells_what_an_embedding_depends_on() -> None:
    cache, whole = EmbeddingCache(1_000), PromptKey("a", "prompt", 512, "bfloat16")
    cache.put(whole, states(10))
    for changes in ({"text": "b"}, {"role": "negative_prompt"}, {"max_tokens": 77}, {"encoder": "float32"}):
        assert cache.find(replace(whole, **changes)) is None
    assert cache.find(PromptKey("a", "prompt", 512, "bfloat16")) is not None


def test_a_bound_below_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 bytes or more, got -1"):
        EmbeddingCache(-1)


# The engine with it.


@dataclass(frozen=True)
class Pair:
    """One model twice: with the cache and without."""

    folder: Path
    cached: Engine
    plain: Engine

    def draw(self, request: GenerationRequest) -> PromptCacheUse:
        """Both pictures are the same; how many prompts the one with the cache found."""
        ours, theirs = self.cached.generate(request), self.plain.generate(request)
        assert [image.tobytes() for image in ours.images] == [image.tobytes() for image in theirs.images]
        assert ours.report.warnings == theirs.report.warnings
        assert theirs.report.prompt_cache is None
        assert ours.report.prompt_cache is not None
        return ours.report.prompt_cache


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(family: str, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = FAMILIES[family](tmp_path_factory.mktemp("models") / "tiny")
    return Pair(
        folder, Engine.load(folder, device="cpu"), Engine.load(folder, device="cpu", embedding_cache_bytes=0)
    )


@pytest.fixture
def pair(loaded: Pair) -> Pair:
    kept(loaded.cached).clear()
    return loaded


def kept(engine: Engine) -> EmbeddingCache:
    assert engine._embeddings is not None
    return engine._embeddings


def text_encoders(engine: Engine) -> list[torch.nn.Module]:
    names = [name for _, name in family_named(engine.description.family).text_encoders]
    return [getattr(engine.pipeline, name) for name in names]


@contextmanager
def readings(
    engine: Engine, spoil: Callable[[int, Any], Any] = lambda _, output: output
) -> Iterator[list[int]]:
    """How often the (first) text encoder reads within; `spoil` may change the answer or raise."""
    calls: list[int] = []

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        calls.append(len(calls))
        return spoil(calls[-1], output)

    handle = text_encoders(engine)[0].register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def test_pictures_are_the_same_whatever_is_found(pair: Pair, family: str) -> None:
    takes_no_negative = family == "sdxl-lcm"  # its denoiser is told the guidance instead
    zeros_for_empty = family.startswith("sdxl")
    rows = (
        ({"guidance_scale": 1.0}, 0, 1, 1),
        ({"guidance_scale": 1.0}, 1, 0, 1),
        ({"guidance_scale": 3.0, "negative_prompt": "blue"}, 1, 1, 2),
        ({"guidance_scale": 6.0, "negative_prompt": "blue"}, 2, 0, 2),
        ({"guidance_scale": 3.0, "negative_prompt": "blue", "prompt": "a star"}, 1, 1, 2),
        ({"guidance_scale": 3.0, "negative_prompt": ""}, 1, 1, 1 if zeros_for_empty else 2),
        ({"guidance_scale": 3.0, "negative_prompt": "A red circle"}, 1, 1, 2),
        ({"guidance_scale": 3.0, "negative_prompt": "blue", "n": 2, "width": 32, "height": 32}, 2, 0, 2),
    )
    for changes, hits, misses, prompts in rows:
        use = pair.draw(replace(ASKED, **changes))
        prompts = 1 if takes_no_negative else prompts
        assert use.hits + use.misses == prompts, changes
        if prompts == hits + misses:
            assert use == PromptCacheUse(hits, misses), changes


def test_what_is_found_is_not_read_and_takes_no_time_of_the_text_encoder(
    pair: Pair, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(pair.cached._guarded, "_clock", lambda: now)

    def for_a_second(_call: int, output: Any) -> Any:
        nonlocal now
        now += 1.0
        return output

    with readings(pair.cached, for_a_second) as calls:
        first = pair.cached.generate(GUIDED).report
        assert len(calls) == (1 if family == "sdxl-lcm" else 2)
        calls.clear()
        again = pair.cached.generate(GUIDED).report
        assert calls == []
        pair.cached.generate(replace(GUIDED, prompt="a star"))
        assert len(calls) == 1, "the negative prompt was found alone"
    assert first.pictures[0].encode_seconds == (1.0 if family == "sdxl-lcm" else 2.0)
    assert again.pictures[0].encode_seconds == 0.0
    assert again.to_dict()["prompt_cache"] == {"hits": 1 if family == "sdxl-lcm" else 2, "misses": 0}


def test_drawing_does_not_write_into_what_is_kept(pair: Pair) -> None:
    cache = kept(pair.cached)
    pair.cached.generate(GUIDED)
    before = {each: cache.find(each) for each in list(cache._kept)}
    assert before
    pair.cached.generate(replace(GUIDED, n=3))
    for each, value in before.items():
        for one, other in zip(tree_leaves(value), tree_leaves(cache.find(each)), strict=True):
            assert torch.equal(one, other)
            assert not one.is_floating_point() or bool(torch.isfinite(one).all())


def test_what_was_cut_off_is_told_of_a_prompt_that_is_found(pair: Pair) -> None:
    long = replace(ASKED, prompt="x y z " * 200)
    codes = [[notice.code for notice in pair.cached.generate(long).report.warnings] for _ in range(2)]
    assert codes[0] == codes[1]
    assert "prompt_truncated" in codes[1]


def nan_at(times: int) -> Callable[[int, Any], Any]:
    """Spoils the first `times` answers."""

    def spoil(call: int, output: Any) -> Any:
        if call < times:
            for tensor in (output.last_hidden_state, *(output.hidden_states or ())):
                tensor.view(-1)[0] = torch.nan
        return output

    return spoil


def test_what_was_found_bad_is_not_kept_nor_what_recovering_made(pair: Pair) -> None:
    cache = kept(pair.cached)
    with readings(pair.cached, nan_at(1)) as calls:
        (picture,) = pair.cached.generate(GUIDED).report.pictures
        assert len(calls) > 1
    assert [trip.recovered_by for trip in picture.guard.trips if trip.stage == "encode"] == ["same_inputs"]
    assert len(cache) == 0
    assert pair.draw(GUIDED).hits == 0


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sdxl-lcm"], indirect=True)
def test_recovering_reads_all_again_as_without_a_cache(pair: Pair) -> None:
    """The prompt is known, the negative one comes back bad until it is read in float32."""
    pair.cached.generate(ASKED)
    before = set(kept(pair.cached)._kept)
    pictures = []
    # The rungs are the same plain once more, plain attention, float32; without a cache each reads two.
    for engine, bad in ((pair.cached, 1 + 4), (pair.plain, 2 + 4)):
        with readings(engine, nan_at(bad)):
            result = engine.generate(GUIDED)
        (trip,) = [trip for trip in result.report.pictures[0].guard.trips if trip.stage == "encode"]
        assert trip.recovered_by == "float32"
        pictures.append(result.images[0].tobytes())
    assert pictures[0] == pictures[1]
    assert set(kept(pair.cached)._kept) == before


def test_a_prompt_for_which_nothing_helps_leaves_what_was_kept(pair: Pair) -> None:
    pair.cached.generate(GUIDED)
    before = set(kept(pair.cached)._kept)
    with readings(pair.cached, nan_at(10_000)), pytest.raises(GuardExhausted):
        pair.cached.generate(replace(GUIDED, prompt="a star"))
    assert set(kept(pair.cached)._kept) == before
    pair.draw(GUIDED)


def test_a_reading_that_is_broken_off_leaves_what_was_kept(pair: Pair) -> None:
    pair.cached.generate(GUIDED)
    before = set(kept(pair.cached)._kept)

    def broken(_call: int, _output: Any) -> Any:
        raise KeyboardInterrupt

    with readings(pair.cached, broken), pytest.raises(KeyboardInterrupt):
        pair.cached.generate(replace(GUIDED, prompt="a star"))
    assert set(kept(pair.cached)._kept) == before
    assert pair.draw(replace(GUIDED, prompt="a star")).misses == 1


def test_a_request_that_runs_out_of_memory_while_encoding_is_counted_once(pair: Pair, family: str) -> None:
    def once(call: int, output: Any) -> Any:
        if call == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return output

    with readings(pair.cached, once):
        report = pair.cached.generate(GUIDED).report
    assert report.memory is not None and report.memory.oom_recoveries == ("freed",)
    assert report.prompt_cache == PromptCacheUse(0, 1 if family == "sdxl-lcm" else 2)


def test_a_cancelled_drawing_leaves_sound_embeddings(pair: Pair) -> None:
    control = DrawingControl(on_step=lambda _: control.cancel())
    with pytest.raises(GenerationCancelled):
        pair.cached.generate(GUIDED, control=control)
    assert pair.draw(GUIDED).misses == 0


def test_a_little_cache_draws_the_same_and_keeps_what_fits(pair: Pair) -> None:
    pair.cached.generate(ASKED)
    little = Engine.load(pair.folder, device="cpu", embedding_cache_bytes=1 + kept(pair.cached).size_bytes)
    for prompt in ("A red circle", "a blue star", "A red circle"):
        request = replace(GUIDED, prompt=prompt)
        assert (
            little.generate(request).images[0].tobytes() == pair.plain.generate(request).images[0].tobytes()
        )
        assert 0 < kept(little).size_bytes <= kept(little).limit_bytes


# What has to empty it, and what has to pass it by.


def test_loras_empty_it(tiny_model: Path, tmp_path: Path) -> None:
    style = [LoraWeight(write_lora(tiny_model, tmp_path / "style.safetensors"))]
    engine = Engine.load(tiny_model, device="cpu")
    bare = engine.generate(GUIDED).images[0].tobytes()
    engine.set_loras(style)
    assert len(kept(engine)) == 0
    styled = engine.generate(GUIDED)
    assert styled.report.prompt_cache == PromptCacheUse(0, 2)
    fresh = Engine.load(tiny_model, device="cpu", loras=style, embedding_cache_bytes=0)
    assert styled.images[0].tobytes() == fresh.generate(GUIDED).images[0].tobytes() != bare
    engine.set_loras(())
    assert len(kept(engine)) == 0
    assert engine.generate(GUIDED).images[0].tobytes() == bare


def test_a_text_encoder_that_has_left_stays_away(tiny_model: Path, tmp_path: Path) -> None:
    engine = Engine.load(tiny_model, device="cpu")
    plan, family = resolve(GUIDED, engine.description), family_named(engine.description.family)
    engine._keeper.close()
    applied = apply(
        plan_for(Residency.NONE, release_text_encoder=True),
        engine.pipeline,
        engine._keeper._footprint,
        "cpu",
        tmp_path,
    )
    guarded = GuardedPipeline(engine.pipeline, family, lambda: 0.0, EmbeddingCache(2**20))
    (text_encoder,) = applied._text_encoders
    was_here, arguments = [], []
    for _ in range(2):
        arguments.append(guarded.encode(plan, 512).arguments)
        was_here.append(text_encoder.is_here)
        applied.after_encoding()
    applied.remove()
    assert was_here == [True, False]
    for one, other in zip(*map(tree_leaves, arguments), strict=True):
        assert torch.equal(one, other)


def test_a_guarded_pipeline_has_none_unless_it_is_given_one(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, device="cpu")
    guarded = GuardedPipeline(engine.pipeline, family_named(engine.description.family), lambda: 0.0)
    plan = resolve(GUIDED, engine.description)
    with readings(engine) as calls:
        assert [guarded.encode(plan, 512).cache for _ in range(2)] == [None, None]
    assert len(calls) == 4


def test_the_same_weights_in_another_dtype_are_another_encoder(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, device="cpu")
    engine.generate(ASKED)
    engine.pipeline.text_encoder.to(torch.float32)
    report = engine.generate(ASKED).report
    assert report.prompt_cache is not None and report.prompt_cache.hits == 0
