"""The engine that the settings describe, in this process, for commands that need no server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.settings import Settings, allocator_environment
from zimage_engine.loading.adapter import ModelLoaderAdapter
from zimage_engine.loading.collector import collector_at_rest
from zimage_engine.reading_ahead import ReadingAhead

if TYPE_CHECKING:
    from zimage_engine import Engine


def read_ahead(settings: Settings) -> ReadingAhead:
    """Begin to bring the default model's files into memory, as far as there is room for them.

    Of a model that is still to be fetched nothing is read, nor of the demo model, which is small.
    """

    def files() -> tuple[Path, ...]:
        if settings.model is None:
            return ()
        return ModelLoaderAdapter(
            settings.model,
            settings.family,
            base=settings.base,
            text_encoder=settings.text_encoder,
            vae=settings.vae,
            dtype=None if settings.dtype == "auto" else settings.dtype,
            fetch=False,
        ).weight_files

    return ReadingAhead(files)


def load_engine(settings: Settings, may_compile: bool = True) -> Engine:
    """The model of the settings, loaded; `may_compile` and errors are those of `Engine.load`."""
    # Torch reads it once, when a card is first used.
    os.environ.update(allocator_environment())
    # The disk has something to do while torch is imported.
    read_ahead(settings)
    with collector_at_rest():
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
        exact=settings.exact,
        may_compile=may_compile,
    )
