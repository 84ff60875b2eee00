"""What an image worker hands to the ingress; knows nothing of either."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from zimage_engine.types import GenerationReport, StepProgress

#: How many previews of a drawing are wanted: so many of the size and quality that the picture's own decoder
#: gives, or EVERY_STEP, small and coarse ones that cost next to nothing, for a page that follows the drawing.
PreviewsWanted = int | Literal["every step"]
EVERY_STEP: Literal["every step"] = "every step"


@dataclass(frozen=True)
class WorkerTimes:
    """When a worker did its parts, in seconds since 1970 by its own clock, and its name.

    `steps` has (picture, step, when it ended), both counted from 1; `encoded_at` is when the files were done.
    """

    worker: str
    began_at: float
    steps: tuple[tuple[int, int, float], ...]
    encoded_at: float


@dataclass(frozen=True)
class DrawingBegan:
    """The worker of that name has begun with this request; what happens to it now happens to its drawing."""

    worker: str = ""


class WorkerUnfit(Exception):
    """The worker's device has failed before, and it has begun with nothing; another worker can be asked."""


@dataclass(frozen=True)
class Preview:
    """What a picture looked like after a step, as the bytes of a file; sizes are pixels of this file."""

    progress: StepProgress
    file: bytes = field(repr=False)
    width: int
    height: int


@dataclass(frozen=True)
class WorkerReply:
    """Finished pictures as the bytes of their files, in the order asked, and how they were made.

    `encode_file_seconds` is what packing all of them into files took. `times` is there where the request is
    traced. `queue_seconds` is what the request waited for its turn, which the ingress knows.
    """

    pictures: tuple[bytes, ...] = field(repr=False)
    report: GenerationReport
    encode_file_seconds: float = 0.0
    times: WorkerTimes | None = None
    queue_seconds: float = 0.0
