"""Spares a drawing the search for the signature of an attention's processor, asked for at every call of it.

diffusers' `Attention` has Python work it out anew each time, to see which arguments the processor takes: with
a small model a fiftieth of a picture's time. A function's signature stays what it is. Knows no pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from diffusers.models import attention_processor

#: The signatures that this drawing has met, by the functions whose methods were asked about.
_met: ContextVar[dict[FunctionType, inspect.Signature] | None] = ContextVar("known_signatures", default=None)


@contextmanager
def signatures_known() -> Iterator[None]:
    """Within, diffusers' attention learns each processor's signature once; others learn it every time."""
    _look_there_first()
    token = _met.set({})
    try:
        yield
    finally:
        _met.reset(token)


def _look_there_first() -> None:
    """Done once in a process: diffusers' module gets an `inspect` of its own; others keep Python's."""
    if attention_processor.inspect is not inspect:
        return
    own = ModuleType(inspect.__name__, inspect.__doc__)
    vars(own).update(vars(inspect), signature=_signature)
    attention_processor.inspect = own


def _signature(asked: Callable[..., Any], **options: Any) -> inspect.Signature:
    # A compiler that traces this has its own way with Python's.
    if torch.compiler.is_compiling():
        return inspect.signature(asked, **options)
    met = _met.get()
    if met is None or options or type(asked) is not MethodType or type(asked.__func__) is not FunctionType:
        return inspect.signature(asked, **options)
    known = met.get(asked.__func__)
    if known is None:
        known = met[asked.__func__] = inspect.signature(asked)
    return known
