"""What a job can ask for: the same that a plain request can, from its kept body and files.

A row for each address that takes `Prefer: respond-async` and `Idempotency-Key`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from serve_app import edit_schema, picture_input, reproduction_schema
from serve_app import openai_schema as schema
from serve_app.jobs.tables import GENERATIONS
from serve_app.reproduction import Given, read_given
from zimage_engine.types import GenerationRequest, LoraChoice, ModelDescription, SourcePicture

EDITS, VARIATIONS, REPRODUCTIONS = "edits", "variations", "reproductions"
#: The names of the files that a job is drawn from; and the picture that a reproduction is compared with.
IMAGE, MASK, PICTURE = "image", "mask", "picture"

Files = Mapping[str, bytes]
#: The name in the operator's list of what goes by a name; None for the default model, and none.
ListedName = Callable[[object], str | None]


@dataclass(frozen=True)
class Operation:
    """`wire` checks the body; `request` is what the engine is asked for, and may take a second.

    `model_of` is the name of the model that draws a body, None: the default one. `told` is what is kept of
    the answer beside its pictures, from the picture that was drawn; it takes time too. `needs_files`: there
    is no such job without one. `forgives_loras`: what was drawn with a LoRA that is no more is drawn without.
    """

    wire: type[schema.ImageGenerationRequest]
    request: Callable[[Any, Files, ModelDescription, bool], GenerationRequest]
    model_of: Callable[[Any, ListedName], str | None] = lambda wire, listed_name: wire.model
    told: Callable[[Any, Files, bytes], dict[str, Any]] = lambda wire, files, drawn: {}
    needs_files: bool = False
    forgives_loras: bool = False


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


def _reproduction(
    wire: reproduction_schema.ReproductionRequest,
    files: Files,
    model: ModelDescription,
    enhance_by_default: bool,
) -> GenerationRequest:
    asked = reproduction_schema.reproduction_to_engine(wire.drawn_before, files.get(IMAGE), files.get(MASK))
    return replace(asked, model=wire.model)


def _model_of_reproduction(
    wire: reproduction_schema.ReproductionRequest, listed_name: ListedName
) -> str | None:
    return wire.model or listed_name(reproduction_schema.made_by(wire.drawn_before))


def _compared(wire: reproduction_schema.ReproductionRequest, files: Files, drawn: bytes) -> dict[str, Any]:
    given = read_given(files[PICTURE]) if PICTURE in files else Given(wire.drawn_before)
    return {"reproduction": reproduction_schema.compared(given, drawn)}


def _source(files: Files, own_mask: bool) -> SourcePicture:
    return picture_input.source_picture(files[IMAGE], files.get(MASK), own_mask=own_mask)


OPERATIONS: Mapping[str, Operation] = {
    GENERATIONS: Operation(schema.ImageGenerationRequest, _generation),
    EDITS: Operation(edit_schema.ImageEditRequest, _edit, needs_files=True),
    VARIATIONS: Operation(edit_schema.ImageEditRequest, _variation, needs_files=True),
    REPRODUCTIONS: Operation(
        reproduction_schema.ReproductionRequest,
        _reproduction,
        model_of=_model_of_reproduction,
        told=_compared,
        forgives_loras=True,
    ),
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


async def with_loras_left(
    operation: str,
    asked: GenerationRequest,
    loras_there: Callable[[tuple[LoraChoice, ...], str | None], Awaitable[tuple[LoraChoice, ...]]],
) -> GenerationRequest:
    """The request, of a reproduction without the LoRAs that are no more: its answer names them."""
    if not asked.loras or not OPERATIONS[operation].forgives_loras:
        return asked
    return replace(asked, loras=await loras_there(asked.loras, asked.model))


async def told_of(
    operation: str, wire: schema.ImageGenerationRequest, files: Files, drawn: bytes
) -> dict[str, Any]:
    """What is kept of the answer beside its pictures."""
    return await asyncio.to_thread(OPERATIONS[operation].told, wire, files, drawn)
