"""Tuning measures here, takes what is quicker within the tolerance, remembers it, and tells all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from zimage_engine import Engine, GenerationRequest
from zimage_engine.errors import InvalidSize
from zimage_engine.memory.residency import MemoryWishes
from zimage_engine.speed.levers import LEVER_NAMES
from zimage_engine.speed.remembered import remembered_choices
from zimage_engine.tuning import TuneWishes, Tuning, _Compared, _judged, tune

WISHES = TuneWishes(repeat=2, steps=2)


@pytest.fixture
def without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiling takes half a minute, and is tried in tests/zimage_engine/speed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def engine(tiny_model: Path, without_a_compiler: None) -> Iterator[Engine]:
    yield Engine.load(tiny_model, "cpu")
    remembered_choices().forget()


def test_every_lever_is_told_at_every_size(engine: Engine) -> None:
    said: list[str] = []
    tuning = tune(engine, [(64, 64), (128, 64)], WISHES, said.append)
    assert [(size.width, size.height, size.bucket) for size in tuning.sizes] == [(64, 64, 64), (128, 64, 91)]
    assert any("128x64" in line for line in said)
    for size in tuning.sizes:
        assert tuple(trial.lever for trial in size.trials) == LEVER_NAMES
        told = {trial.lever: trial for trial in size.trials}
        assert "for cuda" in told["attention_cudnn"].because
        assert "g++" in told["compiled"].because and told["compiled"].seconds is None
        tried = told["channels_last_vae"]
        assert tried.seconds is not None and tried.without is not None and tried.speedup is not None
        assert tried.seconds.count == tried.without.count == 2
        assert tried.mean_difference is not None and tried.mean_difference < WISHES.tolerance
        # What was taken has to hold again, all of it together.
        assert size.levers in (((), ("channels_last_vae",)) if tried.taken else ((),))
        assert (size.speedup is None) == (size.levers == ())
    assert json.loads(json.dumps(tuning.to_dict()))["facts"]["device_name"]


def test_what_was_taken_acts_now_and_in_every_later_engine(engine: Engine, tiny_model: Path) -> None:
    tuning: Tuning = tune(engine, [(64, 64)], WISHES)
    assert tuning.remembered
    asked = GenerationRequest(prompt="a", seed=1, width=64, height=64, num_inference_steps=2)
    for each in (engine, Engine.load(tiny_model, "cpu")):
        assert each.generate(asked).report.accelerated_by == tuning.sizes[0].levers
    notes = remembered_choices().known()
    assert [set(note["sizes"]) for note in notes] == [{"64"}]


def test_another_size_is_measured_beside_those_before(engine: Engine) -> None:
    tune(engine, [(64, 64)], WISHES)
    tune(engine, [(128, 128)], WISHES)
    assert set(remembered_choices().known()[0]["sizes"]) == {"64", "128"}


def test_a_size_that_cannot_be_drawn_is_refused_before_anything_is_measured(engine: Engine) -> None:
    with pytest.raises(InvalidSize):
        tune(engine, [(64, 64), (65, 64)], WISHES)
    assert remembered_choices().known() == []


@pytest.mark.parametrize(
    ("gain", "mean", "tripped", "says"),
    [
        ((1.2,) * 9, 0.3, False, None),
        ((0.9, *(1.2,) * 8), 0.3, False, None),
        ((1.2,) * 9, 0.3, True, "guard"),
        ((1.2,) * 9, 1.2, False, "1.20 of 255"),
        ((1.01,) * 9, 0.3, False, "not clearly quicker"),
        ((0.9, 0.9, *(1.2,) * 7), 0.3, False, "not clearly quicker"),
        ((0.9, 1.2, 1.2), 0.3, False, "not clearly quicker"),
    ],
)
def test_what_is_taken(gain: tuple[float, ...], mean: float, tripped: bool, says: str | None) -> None:
    compared = _Compared(gain, (1.0,) * len(gain), mean, 9, tripped)
    because = _judged(compared, tolerance=1.0)
    assert because is None if says is None else because is not None and says in because


def test_code_of_two_kinds_is_held_against_the_plain_path() -> None:
    """1.3 times as fast as that is no gain where what is there already is 1.3 times as fast."""
    one, other = (_Compared((pair,) * 9, (1.0,) * 9, 0.3, 9, False) for pair in (1.3, 1.4))
    assert _judged(one, 1.0, before=one) is not None
    assert _judged(other, 1.0, before=one) is None
    assert _judged(one, 1.0, before=other) is not None


def test_quantised_and_plain_weights_are_measured_apart(tiny_model: Path, without_a_compiler: None) -> None:
    engines = [
        Engine.load(tiny_model, "cpu", memory=MemoryWishes(quantize=word), exact=True)
        for word in (None, "int8")
    ]
    one, other = (engine.lever_facts for engine in engines)
    assert {name for name in one if one[name] != other[name]} == {"quantize"}
