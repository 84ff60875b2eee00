"""A picture that looks wrong though nothing was found is drawn once more, in float32; knows no requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from zimage_engine import quality
from zimage_engine.errors import GuardExhausted
from zimage_engine.sampling.device_failure import raise_if_failed
from zimage_engine.sampling.pipeline import DrawnPicture
from zimage_engine.types import GuardAttempt, GuardTrip, Notice

#: Draws the picture, as planned or, with True, all of it in float32.
Draw = Callable[[bool], DrawnPicture]


def drawn_and_looked_at(
    draw: Draw, is_float32: bool, clock: Callable[[], float]
) -> tuple[DrawnPicture, tuple[Notice, ...]]:
    """The picture to hand over, and notices of how it looks where it looks wrong.

    If the second drawing comes out the same, it may be what was asked for, and the first is returned. Where
    the first `is_float32` there is no second.
    """
    picture = draw(False)
    measured = quality.measure(picture.image)
    looks = quality.notices(measured)
    if not looks or is_float32:
        return picture, looks
    started = clock()
    try:
        again = draw(True)
    except (GuardExhausted, RuntimeError) as error:  # the first picture is whole, and is kept
        raise_if_failed(error)
        because = f"it could not be drawn: {error}"
        attempt = GuardAttempt("float32", "failed", clock() - started, because)
        return _told(picture, getattr(error, "trips", ()), looks, attempt), looks
    measured_again = quality.measure(again.image)
    seconds = clock() - started
    if quality.same_finding(measured, measured_again):
        because = "it came out the same, so it may be what was asked for"
        attempt = GuardAttempt("float32", "failed", seconds, because)
        return _told(picture, again.trace.trips, looks, attempt), looks
    both = replace(
        again,
        denoise_seconds=picture.denoise_seconds + again.denoise_seconds,
        decode_seconds=picture.decode_seconds + again.decode_seconds,
    )
    attempt = GuardAttempt("float32", "recovered", seconds)
    return _told(both, picture.trace.trips, looks, attempt), quality.notices(measured_again)


def _told(
    kept: DrawnPicture,
    trips_of_the_other: tuple[GuardTrip, ...],
    looks: tuple[Notice, ...],
    attempt: GuardAttempt,
) -> DrawnPicture:
    """The drawing that is kept, with what was met in the other one, and with why there were two."""
    trip = GuardTrip("picture", None, looks[0].code, (attempt,))
    return replace(kept, trace=replace(kept.trace, trips=(*kept.trace.trips, *trips_of_the_other, trip)))
