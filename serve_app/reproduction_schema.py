"""`POST /v1/images/reproduce` on the wire: a picture or a receipt becomes what is to be drawn again.

Knows no routes, and not what came of the drawing.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.picture_input import source_picture
from serve_app.receipt import check_receipt, loras_of
from serve_app.reproduction import Given, compare, read_given
from zimage_engine.errors import InvalidRequest
from zimage_engine.types import GenerationRequest

PICTURES = ("image/png", "image/jpeg", "image/webp")
_FIELDS = frozenset({"image", "receipt", "source", "mask"})


class ReceiptDifference(BaseModel):
    """A part of how the picture was made that is not the same now."""

    name: str
    then: Any
    now: Any


class ReproductionResponse(BaseModel):
    """What came of drawing it again; `identical` is null where there were no pixels to compare with."""

    identical: bool | None
    changed_pixels: int | None
    message: str
    differences: list[ReceiptDifference]
    b64_json: str
    receipt: dict[str, Any]


class ReproductionRequest(schema.ImageGenerationRequest):
    """What a job keeps of a reproduction beside its files. All that is drawn stands in the receipt."""

    #: For the checks of all requests; what is drawn is the receipt's.
    prompt: str = "a picture once more"
    drawn_before: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Upload:
    """A checked body: what is to be drawn again, and the files that were sent."""

    given: Given
    picture: bytes | None = field(default=None, repr=False)
    source: bytes | None = field(default=None, repr=False)
    mask: bytes | None = field(default=None, repr=False)
    webhook: Any = None


def made_by(receipt: Mapping[str, Any]) -> object:
    """The name of the model that a receipt tells of, whatever stands there."""
    model = receipt.get("model")
    return model.get("id") if isinstance(model, Mapping) else None


def reproduction_to_engine(
    receipt: Mapping[str, Any], source: bytes | None, mask: bytes | None
) -> GenerationRequest:
    """The receipt in the engine's words, with all its LoRAs. Takes time where there is a source.

    Raises InvalidRequest for what nothing can be drawn from.
    """
    unpacked = None
    if source is not None:
        edit = receipt.get("edit")
        own_mask = isinstance(edit, Mapping) and bool(edit.get("masked"))
        unpacked = source_picture(source, mask, own_mask=own_mask)
    return replace(Given(receipt).request(unpacked), loras=loras_of(receipt))


def parse_reproduction(announced: str, body: bytes, takes_webhook: bool = False) -> Upload:
    """The checked body, announced as that Content-Type. Takes time: not for an event loop.

    The webhook is taken as it is, for a job alone.

    Raises RequestRefused and InvalidRequest.
    """
    media_type = announced.partition(";")[0].strip().lower()
    if media_type in PICTURES:
        return Upload(read_given(body), body)
    if media_type != "application/json":
        raise RequestRefused(
            f"Content-Type must be {', '.join(PICTURES)} or application/json, got {announced[:60] or '-'}.",
            None,
            "unsupported_media_type",
            415,
        )
    fields = schema.read_json(body)
    webhook = fields.pop("webhook", None) if takes_webhook else None
    if ("image" in fields) == ("receipt" in fields) or fields.keys() - _FIELDS:
        raise RequestRefused(
            "The body must have one of the fields image and receipt, of an edit also source and a mask, "
            "and no other.",
            "image",
        )
    source, mask = (_file_in(fields, name) if name in fields else None for name in ("source", "mask"))
    if "image" in fields:
        picture = _file_in(fields, "image")
        return Upload(read_given(picture), picture, source, mask, webhook)
    if not isinstance(fields["receipt"], dict):
        raise InvalidRequest("receipt must be an object, as an answer with receipt true tells it", "receipt")
    check_receipt(fields["receipt"])
    return Upload(Given(fields["receipt"]), None, source, mask, webhook)


def compared(given: Given, drawn: bytes) -> dict[str, Any]:
    """The body of `ReproductionResponse` but for the picture, which is the file `drawn`. Takes time."""
    came_of_it = compare(given, drawn)
    return {
        "identical": came_of_it.identical,
        "changed_pixels": came_of_it.changed_pixels,
        "message": came_of_it.sentence,
        "differences": [
            {"name": each.name, "then": each.then, "now": each.now} for each in came_of_it.differences
        ],
        "receipt": read_given(drawn).receipt,
    }


def _file_in(fields: Mapping[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(fields[name], validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidRequest(f"{name} must be a picture's file in base64", name) from error
