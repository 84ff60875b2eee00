"""A processor's signature is worked out once for a drawing, and every time by everybody else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention

from zimage_engine import Engine, GenerationRequest
from zimage_engine.sampling.known_signatures import signatures_known

SHAPE = (1, 4, 8)


class OfTwo:
    """Takes an argument that the stock one does not."""

    def __call__(
        self, attention: Attention, hidden_states: torch.Tensor, scale: float = 1.0, **_: Any
    ) -> torch.Tensor:
        return hidden_states * scale


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What Python's own `signature` was asked about."""
    with signatures_known():  # from now on diffusers' module has its own `inspect`
        pass
    asked: list[object] = []
    stock = inspect.signature

    def noted(what: Callable[..., Any], **options: Any) -> inspect.Signature:
        asked.append(what)
        return stock(what, **options)

    monkeypatch.setattr(inspect, "signature", noted)
    return asked


def test_within_it_each_is_worked_out_once_and_outside_every_time(worked_out: list[object]) -> None:
    one, other = Attention(8, heads=1, dim_head=8), Attention(8, heads=1, dim_head=8)
    states = torch.ones(SHAPE)
    with signatures_known():
        expected = one(states)
        assert torch.equal(one(states), expected)
        other(states)
        assert worked_out == [one.processor.__call__]
    assert torch.equal(one(states), expected)
    one(states)
    assert len(worked_out) == 3
    with signatures_known():
        one(states)
    assert len(worked_out) == 4


def test_another_processor_is_given_what_it_takes_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    attention, states = Attention(8, heads=1, dim_head=8), torch.ones(SHAPE)
    with signatures_known():
        attention(states)
        attention.set_processor(OfTwo())  # type: ignore[arg-type]
        assert torch.equal(attention(states, scale=3.0), states * 3)
        assert torch.equal(attention(states, unheard_of=3.0), states)


def test_everything_else_of_inspect_is_pythons() -> None:
    with signatures_known():
        own: Any = attention_processor.inspect
        assert own.getmembers is inspect.getmembers
        assert own.signature(len) == inspect.signature(len)
        assert own.signature(OfTwo().__call__) == inspect.signature(OfTwo().__call__)
        assert own.signature(OfTwo.__call__) == inspect.signature(OfTwo.__call__)


def test_a_compiler_goes_through_it_in_one_piece() -> None:
    attention, states = Attention(8, heads=1, dim_head=8).eval(), torch.ones(SHAPE)
    with torch.no_grad(), signatures_known():
        expected = attention(states)
        compiled = torch.compile(attention, backend="eager", fullgraph=True)
        assert torch.equal(compiled(states), expected)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(states), expected)


def test_a_drawing_works_out_one_for_all_its_layers_and_steps(
    tiny_model: Path, worked_out: list[object]
) -> None:
    engine = Engine.load(tiny_model, device="cpu", dtype="float32")
    request = GenerationRequest(prompt="a", seed=1, width=64, height=64, num_inference_steps=3)
    worked_out.clear()
    engine.generate(request)
    asked_about = [type(getattr(each, "__self__", None)) for each in worked_out]
    processors = [each for each in asked_about if "AttnProcessor" in each.__name__]
    assert len(processors) == len(set(processors)) > 0
