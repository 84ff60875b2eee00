"""What an image worker hands to the ingress; knows nothing of either."""

from __future__ import annotations

from dataclasses import dataclass, field

from zimage_engine.types import GenerationReport


@dataclass(frozen=True)
class WorkerReply:
    """Finished pictures as the bytes of their files, in the order asked, and how they were made.

    `encode_file_seconds` is what packing all of them into files took.
    """

    pictures: tuple[bytes, ...] = field(repr=False)
    report: GenerationReport
    encode_file_seconds: float = 0.0
