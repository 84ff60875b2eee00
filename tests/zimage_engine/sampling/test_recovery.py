"""The ladder as a table: what each rung offers or why it cannot help, in which order, and how it ends."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace

import pytest

from zimage_engine.errors import EngineError, GuardExhausted
from zimage_engine.families import FAMILIES
from zimage_engine.sampling.recovery import GUIDANCE_SHARES, RUNGS, Facts, Measures, Trip

GUIDED = Measures(guidance_scale=4.0)
OFF = Measures()
LADDER = ("same_inputs", "lower_guidance", "plain_attention", "float32", "rest_float32")

#: rung, facts, what it offers or why it does not.
OFFERS: dict[str, tuple[str, Facts, tuple[Measures, ...] | str]] = {
    "the same once more": ("same_inputs", Facts(GUIDED), (GUIDED,)),
    "the same, in whatever it was": (
        "same_inputs",
        Facts(Measures(2.0, float32=True, lasting=True)),
        (Measures(2.0, float32=True, lasting=True),),
    ),
    "guidance in stages down to off": (
        "lower_guidance",
        Facts(GUIDED),
        (Measures(3.0), Measures(2.0), Measures(1.0)),
    ),
    "guidance that is off": ("lower_guidance", Facts(OFF), "guidance is off"),
    "guidance below off": ("lower_guidance", Facts(Measures(0.5)), "guidance is off"),
    "plain attention keeps the guidance": (
        "plain_attention",
        Facts(GUIDED),
        (Measures(4.0, plain_attention=True),),
    ),
    "attention that is plain": (
        "plain_attention",
        Facts(Measures(plain_attention=True)),
        "attention is plain already",
    ),
    "float32 has plain attention": (
        "plain_attention",
        Facts(Measures(float32=True)),
        "attention is plain already",
    ),
    "one step in float32": ("float32", Facts(GUIDED), (Measures(4.0, float32=True),)),
    "weights in float32": ("float32", Facts(GUIDED, is_float32=True), "it is float32 already"),
    "drawn in float32": ("float32", Facts(Measures(float32=True)), "it is float32 already"),
    "float32 that helped before": (
        "float32",
        Facts(GUIDED, helped={"float32": 3}),
        "it helped at step 3: the rest is drawn so at once",
    ),
    "the rest in float32": (
        "rest_float32",
        Facts(GUIDED, helped={"float32": 3}),
        (Measures(4.0, float32=True, lasting=True),),
    ),
    "the rest where this step alone did not help": (
        "rest_float32",
        Facts(GUIDED, failed_here=frozenset({"float32"})),
        "this step in float32 has just failed",
    ),
    "the rest where weights are float32": (
        "rest_float32",
        Facts(GUIDED, is_float32=True),
        "it is float32 already",
    ),
    "in pieces": ("tiled", Facts(OFF, can_tile=True), (Measures(float32=True, tiled=True),)),
    "in pieces with float32 weights": (
        "tiled",
        Facts(OFF, is_float32=True, can_tile=True),
        (Measures(tiled=True),),
    ),
    "too small for pieces": ("tiled", Facts(OFF), "the picture is too small for pieces"),
}


@pytest.mark.parametrize(("rung", "facts", "offered"), OFFERS.values(), ids=OFFERS)
def test_a_rung_offers_measures_or_says_why_not(
    rung: str, facts: Facts, offered: tuple[Measures, ...] | str
) -> None:
    measures = RUNGS[rung].measures(facts)
    if isinstance(offered, str):
        assert measures == offered
    else:
        assert isinstance(measures, tuple)
        assert [replace(each, guidance_scale=round(each.guidance_scale, 6)) for each in measures] == [
            *offered
        ]


def test_guidance_is_lowered_to_off_and_never_raised() -> None:
    offered = RUNGS["lower_guidance"].measures(Facts(GUIDED))
    assert isinstance(offered, tuple)
    scales = [each.guidance_scale for each in offered]
    assert scales == sorted(scales, reverse=True)
    assert scales[0] < GUIDED.guidance_scale and scales[-1] == 1.0
    assert len(scales) == len(GUIDANCE_SHARES)


def ticking() -> itertools.count[float]:
    return itertools.count(0.0, 0.5)


def trip(rungs: tuple[str, ...] = LADDER, step: int | None = 4, stage: str = "denoise") -> Trip:
    clock = ticking()
    return Trip(stage, step, "nan", rungs, lambda: next(clock))


def climbed(trip: Trip, facts: Facts) -> tuple[list[Measures], GuardExhausted]:
    """Everything that is tried where nothing helps."""
    tried: list[Measures] = []
    with pytest.raises(GuardExhausted) as exhausted:
        while True:
            tried.append(trip.next_measures(facts, "inf"))
    return tried, exhausted.value


def told(trip: Trip) -> list[tuple[str, str, str]]:
    return [(attempt.rung, attempt.outcome, attempt.because) for attempt in trip.report.attempts]


#: facts, and each attempt of a trip from which nothing helps.
LADDERS: dict[str, tuple[Facts, list[tuple[str, str, str]]]] = {
    "guidance on": (
        Facts(GUIDED),
        [
            ("same_inputs", "failed", "inf"),
            ("lower_guidance", "failed", "inf"),
            ("lower_guidance", "failed", "inf"),
            ("lower_guidance", "failed", "inf"),
            ("plain_attention", "failed", "inf"),
            ("float32", "failed", "inf"),
            ("rest_float32", "skipped", "this step in float32 has just failed"),
        ],
    ),
    "guidance off": (
        Facts(OFF),
        [
            ("same_inputs", "failed", "inf"),
            ("lower_guidance", "skipped", "guidance is off"),
            ("plain_attention", "failed", "inf"),
            ("float32", "failed", "inf"),
            ("rest_float32", "skipped", "this step in float32 has just failed"),
        ],
    ),
    "float32 weights": (
        Facts(OFF, is_float32=True),
        [
            ("same_inputs", "failed", "inf"),
            ("lower_guidance", "skipped", "guidance is off"),
            ("plain_attention", "failed", "inf"),
            ("float32", "skipped", "it is float32 already"),
            ("rest_float32", "skipped", "it is float32 already"),
        ],
    ),
    "what failed at an earlier step is not tried again, the same inputs are": (
        Facts(GUIDED, failed={"same_inputs": 2, "lower_guidance": 2, "plain_attention": 2}),
        [
            ("same_inputs", "failed", "inf"),
            ("lower_guidance", "skipped", "it did not help at step 2"),
            ("plain_attention", "skipped", "it did not help at step 2"),
            ("float32", "failed", "inf"),
            ("rest_float32", "skipped", "this step in float32 has just failed"),
        ],
    ),
    "float32 helped once: the rest is drawn so": (
        Facts(OFF, failed={"same_inputs": 2, "plain_attention": 2}, helped={"float32": 2}),
        [
            ("same_inputs", "failed", "inf"),
            ("lower_guidance", "skipped", "guidance is off"),
            ("plain_attention", "skipped", "it did not help at step 2"),
            ("float32", "skipped", "it helped at step 2: the rest is drawn so at once"),
            ("rest_float32", "failed", "inf"),
        ],
    ),
}


@pytest.mark.parametrize(("facts", "attempts"), LADDERS.values(), ids=LADDERS)
def test_the_way_up_the_ladder(facts: Facts, attempts: list[tuple[str, str, str]]) -> None:
    going = trip()
    tried, exhausted = climbed(going, facts)

    assert told(going) == attempts
    assert len(tried) == sum(outcome == "failed" for _, outcome, _ in attempts)
    assert exhausted.trips == (going.report,)


def test_the_order_is_the_one_that_the_family_lists() -> None:
    going = trip(("float32", "same_inputs"))
    climbed(going, Facts(OFF))
    assert [rung for rung, *_ in told(going)] == ["float32", "same_inputs"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_list_rungs_that_there_are_and_begin_with_the_cheapest(family: object) -> None:
    for rungs in (family.encode_rungs, family.denoise_rungs, family.decode_rungs):  # type: ignore[attr-defined]
        assert rungs[0] == "same_inputs"
        assert set(rungs) <= set(RUNGS)
        assert len(set(rungs)) == len(rungs)


def test_recovery_is_told_with_what_failed_before_and_the_time_of_each() -> None:
    going = trip()
    assert going.next_measures(Facts(GUIDED), "nan") == GUIDED
    assert going.tried == "same_inputs"
    assert going.next_measures(Facts(GUIDED), "inf").guidance_scale == pytest.approx(3.0)
    assert going.tried == "lower_guidance"
    going.recovered()

    report = going.report
    assert going.tried is None
    assert (report.stage, report.step, report.finding) == ("denoise", 4, "nan")
    assert report.recovered_by == "lower_guidance"
    assert told(going) == [("same_inputs", "failed", "inf"), ("lower_guidance", "recovered", "")]
    assert [attempt.seconds for attempt in report.attempts] == [0.5, 0.5]


def test_facts_of_the_first_call_hold_for_the_whole_trip() -> None:
    going = trip()
    going.next_measures(Facts(GUIDED), "nan")
    lowered = [going.next_measures(Facts(OFF), "nan").guidance_scale for _ in GUIDANCE_SHARES]
    assert lowered == pytest.approx([3.0, 2.0, 1.0])


def test_a_recovered_trip_counts_nothing_more() -> None:
    going = trip()
    going.next_measures(Facts(OFF), "nan")
    going.recovered()
    going.recovered()
    assert len(going.report.attempts) == 1


@pytest.mark.parametrize(
    ("stage", "step", "where"),
    [
        ("denoise", 4, "the denoiser's output at step 4 held nan"),
        ("encode", None, "the text encoder's answer held nan"),
        ("decode", None, "the decoded picture held nan"),
    ],
)
def test_exhausted_is_a_sentence_with_fields_that_survive_pickling(
    stage: str, step: int | None, where: str
) -> None:
    _, exhausted = climbed(trip(("same_inputs", "float32", "tiled"), step, stage), Facts(OFF))
    travelled = pickle.loads(pickle.dumps(exhausted))

    for each in (exhausted, travelled):
        assert isinstance(each, EngineError)
        (told_trip,) = each.trips
        assert (told_trip.stage, told_trip.step, told_trip.recovered_by) == (stage, step, None)
        assert [(attempt.rung, attempt.outcome) for attempt in told_trip.attempts] == [
            ("same_inputs", "failed"),
            ("float32", "failed"),
            ("tiled", "skipped"),
        ]
        assert str(each).startswith(where)
        assert "(tried: same_inputs, float32); no picture was made" in str(each)
        assert "draw again" in str(each)


def test_exhausted_where_nothing_could_be_tried_says_so() -> None:
    _, exhausted = climbed(trip(("lower_guidance",)), Facts(OFF))
    assert "(tried: nothing could be)" in str(exhausted)
    (told_trip,) = exhausted.trips
    assert [(attempt.rung, attempt.outcome) for attempt in told_trip.attempts] == [
        ("lower_guidance", "skipped")
    ]
