"""Goes through a network's modules at a tenth of what torch's own walk costs, which names each of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Where diffusers notes hooks on a module, some of which change what dtype it computes in.
_HOOKS = "_diffusers_hook"


def modules_within(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """`module` and all below it, in no order that means anything; what is there twice comes twice."""
    open_ones = [module]
    while open_ones:
        each = open_ones.pop()
        yield each
        open_ones.extend(below for below in each._modules.values() if below is not None)


def tensors_within(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The parameters and buffers of `module` and of all below it, in no order that means anything."""
    for each in modules_within(module):
        for held in (each._parameters, each._buffers):
            yield from (tensor for tensor in held.values() if tensor is not None)


def plain_dtype(module: torch.nn.Module) -> torch.dtype | None:
    """What diffusers' `get_parameter_dtype` answers where that is simply the first parameter's dtype.

    None where hooks, layers kept in float32 or integers come first: there its own search is needed.
    """
    if getattr(module, "_keep_in_fp32_modules", None):
        return None
    open_ones = [module]
    for each in open_ones:  # which grows meanwhile; not `modules_within`, which is twice as slow here
        members = vars(each)
        if _HOOKS in members:
            return None
        if below := members["_modules"]:
            open_ones += [part for part in below.values() if part is not None]
    first = next(module.parameters(), None)
    return first.dtype if first is not None and first.is_floating_point() else None
