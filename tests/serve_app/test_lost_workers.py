"""Which requests are the same as one that ended workers, for how long, and how many are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app import lost_workers
from serve_app.lost_workers import MOST_REFUSED, REFUSED_SECONDS, RefusedRequests, named_request
from tests.serve_app.test_openai_schema import MODEL
from zimage_engine.sampling.plan import resolve
from zimage_engine.types import GenerationRequest

REQUEST = GenerationRequest("a red circle", seed=1)


class Known(RefusedRequests):
    def __init__(self) -> None:
        self.seconds = 0.0
        super().__init__(lambda: self.seconds)

    def note(self, request: GenerationRequest, request_id: str = "req-1") -> None:
        plan = resolve(request, MODEL)
        self.add(request, plan, named_request(request_id, plan))

    def has(self, request: GenerationRequest) -> bool:
        return self.find(request, resolve(request, MODEL)) is not None


@pytest.mark.parametrize(
    ("changed", "is_same"),
    [
        ({"seed": 2}, True),
        ({"seed": None}, True),
        ({"prompt": "a blue circle"}, False),
        ({"negative_prompt": "text"}, False),
        ({"width": 128}, False),
        ({"height": 128}, False),
        ({"num_inference_steps": 3}, False),
        ({"guidance_scale": 1.0}, False),
        ({"n": 2}, False),
        ({"enhance": False}, False),
        # What ended a worker may have been what was quicker.
        ({"exact": True}, False),
    ],
)
def test_all_that_is_drawn_from_counts_but_the_seed(changed: dict[str, object], is_same: bool) -> None:
    known = Known()
    known.note(REQUEST)
    assert known.has(replace(REQUEST, **changed)) is is_same  # type: ignore[arg-type]


def test_it_is_known_for_an_hour() -> None:
    known = Known()
    known.note(REQUEST)
    known.seconds = REFUSED_SECONDS - 1
    assert known.has(REQUEST)
    known.seconds = REFUSED_SECONDS
    assert not known.has(REQUEST)


def test_the_oldest_is_forgotten_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_REFUSED >= 100
    monkeypatch.setattr(lost_workers, "MOST_REFUSED", 2)
    known = Known()
    requests = [replace(REQUEST, prompt=f"circle {number}") for number in range(3)]
    for request in requests:
        known.note(request)
    assert [known.has(request) for request in requests] == [False, True, True]


def test_a_request_is_named_without_its_words() -> None:
    named = str(named_request("req-7", resolve(REQUEST, MODEL)))
    assert named == "request req-7: 256x256, 8 steps, n 1"
