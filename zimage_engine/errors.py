"""The engine's errors: one class for each thing a caller may want to catch.

    EngineError
    +-- InvalidRequest            the caller can mend it; `parameter` names the field
    |   +-- InvalidSize
    |   +-- DtypeRefused          the checkpoint would overflow in the dtype asked for
    +-- CheckpointError           the files cannot be used as they are
    |   +-- CheckpointNotFound
    |   +-- UnknownFamily
    |   +-- CheckpointDamaged
    +-- DownloadError             the hub could not give what was asked
    |   +-- DownloadIncomplete
    +-- CacheFull                 no room on the disk for a repaired view
    +-- GenerationCancelled       stopped on request
    |   +-- DeadlineExceeded      stopped because its time was over
    +-- GuardExhausted            a bad value came back whatever was tried; there is no picture
    +-- ScheduleInvalid           the scheduler's timesteps cannot be drawn with
    +-- DeviceUnavailable
    +-- DeviceFailed              the device was lost on the way; the process can use it no more
    +-- OutOfMemory               the device's memory was used up whatever was moved off it
    +-- LeverFailed               something that would draw quicker cannot act here; drawing goes on without
    +-- DoesNotFit                the picture needs more memory than there is; names the size that fits

Fields are positional, because exceptions travel between processes pickled, and a keyword-only
field does not survive that. Messages are sentences: expected, got, what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zimage_engine.types import GuardTrip


class EngineError(Exception):
    """Base of everything that the engine raises on purpose."""


class InvalidRequest(EngineError):
    """A value of the request cannot be used; `parameter` is the field's name."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message, parameter)
        self.message = message
        self.parameter = parameter

    def __str__(self) -> str:
        return self.message


class InvalidSize(InvalidRequest):
    """Width or height does not fit the model's grid."""


class DtypeRefused(InvalidRequest):
    """The checkpoint is not known to draw in the dtype that was asked for."""


class CheckpointError(EngineError):
    """The files of a model cannot be used as they are."""


class CheckpointNotFound(CheckpointError):
    """There is nothing at the path or under the id."""


class UnknownFamily(CheckpointError):
    """No family, or more than one, recognises the files."""


class CheckpointDamaged(CheckpointError):
    """A family recognises the files, but they would not draw what they should."""


class DownloadError(EngineError):
    """The hub could not give what was asked."""


class DownloadIncomplete(DownloadError):
    """What arrived is not what the hub announced; nothing of it is offered as a model."""


class CacheFull(EngineError):
    """The disk has no room for what had to be written into the cache."""


class GenerationCancelled(EngineError):
    """The drawing was stopped on request before it was done."""


class DeadlineExceeded(GenerationCancelled):
    """The drawing was not done when its time was over."""


class GuardExhausted(EngineError):
    """A bad value (not finite, or absurdly large) came back whatever was tried; there is no picture.

    `trips` are all that the guard met on the way, the last the one that nothing helped against.
    """

    def __init__(self, message: str, trips: tuple[GuardTrip, ...] = ()) -> None:
        super().__init__(message, trips)
        self.message = message
        self.trips = trips

    def __str__(self) -> str:
        return self.message


class ScheduleInvalid(EngineError):
    """The scheduler gave timesteps that are not finite, do not fall, or leave the range it was trained on."""


class DeviceUnavailable(EngineError):
    """The device that was asked for is not there."""


class DeviceFailed(EngineError):
    """The device was lost while it worked: a kernel's fault, its memory, its driver.

    The process that raises it can use the device no more; another one may.
    """


class LeverFailed(EngineError):
    """Something that makes drawing quicker could not be made to act: none acts, and drawing goes on."""


class DoesNotFit(EngineError):
    """The picture needs more memory than may be used, whatever is offloaded.

    `largest_size` is (width, height) in pixels of the largest picture of the same shape that fits, None where
    none does; `needed_bytes` is what the leanest way would have taken of the device, `budget_bytes` what it
    might take.
    """

    def __init__(
        self,
        message: str,
        largest_size: tuple[int, int] | None = None,
        needed_bytes: int | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        super().__init__(message, largest_size, needed_bytes, budget_bytes)
        self.message = message
        self.largest_size = largest_size
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes

    def __str__(self) -> str:
        return self.message


class OutOfMemory(EngineError):
    """The device's memory was used up while drawing, whatever was moved off it; the next request may do.

    `stage` is "encode", "denoise" or "decode"; `largest_size` (width, height) in pixels is the largest
    picture of the same shape that should fit, None where none is known to.
    """

    def __init__(
        self, message: str, stage: str | None = None, largest_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(message, stage, largest_size)
        self.message = message
        self.stage = stage
        self.largest_size = largest_size

    def __str__(self) -> str:
        return self.message
