"""Keeps what the text encoder answered, prompt by prompt, so that a prompt that returns is not read again.

Knows no pipeline and no guard: what is put in is for the caller to have judged.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True, slots=True)
class PromptKey:
    """Everything that an embedding depends on while the weights stay what they are.

    `role` is "prompt" or "negative_prompt", `max_tokens` how many of the text's are read. `encoder` tells one
    form of the text encoders' weights from another (dtypes, quantised or not).
    """

    text: str
    role: str
    max_tokens: int
    encoder: Hashable = None


@dataclass(frozen=True, slots=True)
class _Kept:
    states: Mapping[str, Any] = field(repr=False)
    devices: Mapping[str, Any] = field(repr=False)
    size_bytes: int


class EmbeddingCache:
    """The prompts met last, with at most `limit_bytes` of tensors and texts; the longest unused goes first.

    The copies lie in the host's memory wherever the model is. On a card they would be missing from the memory
    plan, and one small block in use keeps a whole segment of the allocator from being given back; the way
    there is short beside the text encoder's (Z-Image's longest prompt is 2.6 MB, PixArt's 2.5 MB, SDXL's
    0.3 MB). What goes in and what comes out are copies: nobody can write into what is kept.

    Its owner empties it when the text encoders' weights change. For one thread at a time.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"a cache of prompts must have 0 bytes or more, got {limit_bytes}; 0 keeps none")
        self.limit_bytes = limit_bytes
        self._kept: OrderedDict[PromptKey, _Kept] = OrderedDict()
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size_bytes(self) -> int:
        """What is kept now."""
        return self._size_bytes

    def find(self, key: PromptKey) -> dict[str, Any] | None:
        """A copy of what was put under `key`, on the devices that it came from; None where there is none."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._kept.move_to_end(key)
        return {name: tree_map(_copied_to, value, kept.devices[name]) for name, value in kept.states.items()}

    def put(self, key: PromptKey, states: Mapping[str, Any]) -> None:
        """Keep a copy of `states` (tensors, or lists and tuples of them, by name) in place of what was there.

        Others go until there is room; what is larger than the whole bound is not kept, and drives none out.
        """
        size_bytes = sys.getsizeof(key.text) + sum(leaf.nbytes for leaf in tree_leaves(dict(states)))
        if (before := self._kept.pop(key, None)) is not None:
            self._size_bytes -= before.size_bytes
        if size_bytes > self.limit_bytes:
            return
        while self._size_bytes + size_bytes > self.limit_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._size_bytes -= oldest.size_bytes
        self._kept[key] = _Kept(
            states={name: tree_map(_on_the_host, value) for name, value in states.items()},
            devices={name: tree_map(lambda tensor: tensor.device, value) for name, value in states.items()},
            size_bytes=size_bytes,
        )
        self._size_bytes += size_bytes

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._size_bytes = 0


def _on_the_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _copied_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, copy=True)
