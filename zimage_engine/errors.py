"""The engine's errors: one class for each thing a caller may want to catch.

    EngineError
    +-- InvalidRequest            the caller can mend it; `parameter` names the field
    |   +-- InvalidSize
    +-- CheckpointError           the files cannot be used as they are
    |   +-- CheckpointNotFound
    |   +-- UnknownFamily
    |   +-- CheckpointDamaged
    +-- DownloadError             the hub could not give what was asked
    |   +-- DownloadIncomplete
    +-- CacheFull                 no room on the disk for a repaired view
    +-- GenerationCancelled       stopped on request
    +-- DeviceUnavailable

Fields are positional, because exceptions travel between processes pickled, and a keyword-only
field does not survive that. Messages are sentences: expected, got, what to do.
"""

from __future__ import annotations


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


class DeviceUnavailable(EngineError):
    """The device that was asked for is not there."""
