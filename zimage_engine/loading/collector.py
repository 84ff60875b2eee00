"""Has Python's garbage collector rest while what is made is there to stay. Knows no model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """To import torch and the libraries of models, and to load one, makes a million objects, none of them
    garbage, and each further ten thousand have the collector look through all that are there: a fifth of what
    the imports take, and more than half of loading a published vocabulary."""
    was_at_work = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_at_work:
            gc.enable()
