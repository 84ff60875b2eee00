"""What the guard did, in sentences for the person whose picture it is; pure, knows no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zimage_engine.types import GuardTrace, GuardTrip, Notice

_WHERE: Mapping[str, str] = {
    "encode": "the text encoder's answer",
    "source": "the encoded picture to draw from",
    "denoise": "the denoiser's output",
    "decode": "the decoded picture",
}
_HOW: Mapping[str, str] = {
    "same_inputs": "done again from the same inputs it was sound: the picture is what it would have been",
    "lower_guidance": "drawn on from there with lower guidance it was sound",
    "plain_attention": "with attention computed without fused kernels it was sound",
    "float32": "computed in float32 it was sound",
    "rest_float32": "everything from there on was computed in float32",
    "tiled": "decoded in float32 and in pieces it was sound; look for seams",
}


def guard_notices(trace: GuardTrace, asked_guidance_scale: float) -> tuple[Notice, ...]:
    """What was recovered from, step by step where it is the same, lowered guidance and clipped values."""
    alike: dict[tuple[str, str, str], list[GuardTrip]] = {}
    for trip in trace.trips:
        if trip.stage in _WHERE and trip.recovered_by is not None:
            alike.setdefault((trip.stage, trip.finding, trip.recovered_by), []).append(trip)
    notices = [_recovered(trips) for trips in alike.values()]
    notices += [_redrawn() for trip in trace.trips if trip.stage == "picture" and trip.recovered_by]
    ended = trace.final_guidance_scale
    if ended is not None and ended < asked_guidance_scale:
        notices.append(
            Notice(
                "guidance_lowered",
                f"guidance was lowered from {asked_guidance_scale:g} to {ended:g} while drawing, "
                "because with more the values left what can be computed; ask for less, or another seed",
            )
        )
    if trace.clipped_values:
        notices.append(
            Notice(
                "values_clipped",
                f"{trace.clipped_values} values of the denoiser's output were far outside what it should "
                "give and were clipped; the picture may show it",
            )
        )
    return tuple(notices)


def _recovered(trips: Sequence[GuardTrip]) -> Notice:
    """One notice for faults of one kind that one rung helped against."""
    trip = trips[0]
    numbers = [str(each.step) for each in trips if each.step is not None]
    steps = f" at step{'s' * (len(numbers) > 1)} {', '.join(numbers)}" if numbers else ""
    what = {"nan": "was not a number", "inf": "was infinite"}.get(trip.finding, "was absurdly large")
    return Notice("guard_recovered", f"{_WHERE[trip.stage]}{steps} {what}; {_HOW[str(trip.recovered_by)]}")


def _redrawn() -> Notice:
    return Notice(
        "picture_redrawn",
        "the picture looked wrong, so it was drawn once more in float32, which is the one that you see",
    )
