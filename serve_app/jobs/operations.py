"""What a job can ask for: the same that a plain request can, from its kept body and files.

A row for each address that takes `Prefer: respond-async` and `Idempotency-Key`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from serve_app import edit_schema, picture_input
from serve_app import openai_schema as schema
from serve_app.jobs.tables import GENERATIONS
from zimage_engine.types import GenerationRequest, ModelDescription, SourcePicture

EDITS, VARIATIONS = "edits", "variations"
#: The names of the files that a job is drawn from.
IMAGE, MASK = "image", "mask"

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Operation:
    """`wire` checks the body; `request` is what the engine is asked for, and may take a second."""

    wire: type[schema.ImageGenerationRequest]
    request: Callable[[Any, Files, ModelDescription, bool], GenerationRequest]


def _generation(
    wire: schema.ImageGenerationRequest, files: Files, model: ModelDescription, enhance_by_default: bool
) -> GenerationRequest:
    return schema.to_engine(wire, enhance_by_default)


def _edit(
    wire: edit_schema.ImageEditRequest, files: Files, model: ModelDescription, enhance_by_default: bool
) -> GenerationRequest:
    return edit_schema.edit_to_engine(wire, _source(files, own_mask=True), enhance_by_default)


def _variation(
    wire: edit_schema.ImageEditRequest, files: Files, model: ModelDescription, enhance_by_default: bool
) -> GenerationRequest:
    return edit_schema.variation_to_engine(wire, _source(files, own_mask=False), model)


def _source(files: Files, own_mask: bool) -> SourcePicture:
    return picture_input.source_picture(files[IMAGE], files.get(MASK), own_mask=own_mask)


OPERATIONS: Mapping[str, Operation] = {
    GENERATIONS: Operation(schema.ImageGenerationRequest, _generation),
    EDITS: Operation(edit_schema.ImageEditRequest, _edit),
    VARIATIONS: Operation(edit_schema.ImageEditRequest, _variation),
}


def wire_of(operation: str, payload: Mapping[str, Any]) -> schema.ImageGenerationRequest:
    """The checked body. Raises RequestRefused."""
    return schema.parse_as(OPERATIONS[operation].wire, payload)


async def request_of(
    operation: str,
    wire: schema.ImageGenerationRequest,
    files: Files,
    model: ModelDescription,
    enhance_by_default: bool = True,
) -> GenerationRequest:
    """The same in the engine's words; pictures are unpacked in threads. Raises RequestRefused."""
    request = partial(OPERATIONS[operation].request, wire, files, model, enhance_by_default)
    if not files:
        return request()
    return await asyncio.get_running_loop().run_in_executor(picture_input.unpackers(), request)
