"""Spares a drawing the search for its denoiser's dtype, which stock pipelines ask for at every step.

diffusers looks through all modules for each answer, for hooks that may change it: with a small model a
thirtieth of a picture's time. While one picture is drawn nothing changes it. Of other modules, such as a VAE
that may be widened meanwhile, it is found anew each time, at less cost. Knows no pipeline.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.models import modeling_utils

from zimage_engine.sampling.module_walk import plain_dtype

#: The module that is drawn with in this context, and its dtype.
_known: ContextVar[tuple[torch.nn.Module, torch.dtype] | None] = ContextVar("known_dtype", default=None)


@contextmanager
def dtype_known(module: Any) -> Iterator[None]:
    """Within, `module.dtype` answers at once what it is now; whoever is not within searches as ever."""
    _look_there_first()
    token = _known.set((module, dtype_of(module)))
    try:
        yield
    finally:
        _known.reset(token)


def dtype_of(module: Any) -> torch.dtype:
    """What `module.dtype` is now, found at less cost where nothing but its first parameter decides."""
    found: torch.dtype = plain_dtype(module) or module.dtype
    return found


def _look_there_first() -> None:
    """Done once in a process: models find the function by its name in diffusers' module at every call."""
    stock = modeling_utils.get_parameter_dtype
    if hasattr(stock, "asks_first"):
        return

    @functools.wraps(stock)
    def get_parameter_dtype(parameter: torch.nn.Module) -> torch.dtype:
        known = _known.get()
        if known is None:
            return _searched(parameter)
        if known[0] is parameter:
            return known[1]
        return plain_dtype(parameter) or _searched(parameter)

    def _searched(parameter: torch.nn.Module) -> torch.dtype:
        found: torch.dtype = stock(parameter)
        return found

    vars(get_parameter_dtype)["asks_first"] = True
    modeling_utils.get_parameter_dtype = get_parameter_dtype
