"""The engine that the settings describe, in this process, for commands that need no server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from serve_app.settings import Settings, allocator_environment

if TYPE_CHECKING:
    from zimage_engine import Engine


def load_engine(settings: Settings) -> Engine:
    """The model of the settings, loaded. Raises as `Engine.load`."""
    # Torch reads it once, when a card is first used.
    os.environ.update(allocator_environment())
    from zimage_engine import Engine

    return Engine.load(
        settings.model,
        settings.device,
        family=settings.family,
        base=settings.base,
        text_encoder=settings.text_encoder,
        vae=settings.vae,
        loras=settings.loras,
        lora_folder=settings.lora_folder,
        dtype=settings.dtype,
        memory=settings.memory,
        embedding_cache_bytes=settings.embedding_cache,
        threads=settings.cpu_threads,
    )
