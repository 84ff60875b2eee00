"""Looks for NaN and infinite values among weights, and remembers where it has; knows no pipeline."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch

from zimage_engine.checkpoint.tensors import WeightFile
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading.view_key import content_of

#: A note is some hundred bytes; the oldest go when there are more.
MOST_NOTES = 500


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; numbers without a fraction always are finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # NaN goes through aminmax, which reads as fast as memory gives and makes no copy; isfinite took 70
    # times as long in bfloat16 on a CPU.
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least)) and bool(torch.isfinite(greatest))


def not_finite(component: str, tensor_name: str) -> CheckpointDamaged:
    """What to raise for a tensor with such a value."""
    return CheckpointDamaged(
        f"{component}: {tensor_name} holds NaN or infinite values, which draw black pictures; "
        "fetch the weight files again"
    )


class FiniteNotes:
    """Which weight files were found finite, by their content and the dtype they were loaded as.

    Stock diffusers maps a bfloat16 file and reads none of it, so to look through the values is most of what
    a load costs here: it is done once for a content (`view_key.content_of` says what counts as the same)
    and noted. What a disk loses afterwards is met when a picture is drawn. A note that cannot be read or
    written is one that is not there.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is made when the first note is written."""
        self._folder = folder

    def knows(self, files: Sequence[WeightFile], dtype: str) -> bool:
        return self._note(files, dtype).is_file()

    def remember(self, files: Sequence[WeightFile], dtype: str) -> None:
        """Note that all values of `files`, loaded as `dtype`, are finite."""
        note = self._note(files, dtype)
        unfinished = note.with_name(f".{note.name}.{secrets.token_hex(4)}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps({"dtype": dtype, "files": [file.name for file in files]}))
            unfinished.replace(note)
            self._forget_the_oldest()
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def _note(self, files: Sequence[WeightFile], dtype: str) -> Path:
        content = sorted(content_of(file.path) for file in files)
        return self._folder / hashlib.sha256(json.dumps([dtype, content]).encode()).hexdigest()[:32]

    def _forget_the_oldest(self) -> None:
        notes = [entry for entry in os.scandir(self._folder) if entry.is_file()]
        for entry in sorted(notes, key=lambda entry: entry.stat().st_mtime)[:-MOST_NOTES]:
            Path(entry.path).unlink(missing_ok=True)
