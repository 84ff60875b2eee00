"""Stock diffusers in a process of its own, given up where it takes too long or too much memory."""

from __future__ import annotations

import multiprocessing
import queue
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints.models import stock_picture
from zimage_engine import ModelLoaderAdapter

#: What may be taken for a tiny model, which needs some seconds and half a GiB.
MAX_SECONDS = 120
MAX_BYTES = 6 * 2**30


def stock_picture_within_bounds(path: Path, healthy: Path) -> np.ndarray | str:
    """The picture, the name of the error that stock diffusers raised, or "" where it was given up.

    `healthy` is the undamaged model, which tells the pipeline's class.
    """
    processes = multiprocessing.get_context("spawn")
    answers: Any = processes.Queue()
    process = processes.Process(target=_draw, args=(path, healthy, answers))
    process.start()
    last = time.monotonic() + MAX_SECONDS
    try:
        while time.monotonic() < last and process.is_alive() and _resident_bytes(process.pid) < MAX_BYTES:
            try:
                answer: np.ndarray | str = answers.get(timeout=0.2)
            except queue.Empty:
                continue
            return answer
        return ""
    finally:
        process.kill()
        process.join()


def _draw(path: Path, healthy: Path, answers: Any) -> None:
    try:
        answers.put(stock_picture(path, ModelLoaderAdapter(healthy)))
    except Exception as error:  # whatever the stock call raises is the finding
        answers.put(type(error).__name__)


def _resident_bytes(pid: int | None) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096
