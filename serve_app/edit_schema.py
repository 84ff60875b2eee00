"""OpenAI's edits and variations on the wire: a form becomes the checked request, and that the engine's.

Knows no routes, and of pictures only that they are there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.multipart import Form
from zimage_engine.families import family_named
from zimage_engine.types import GenerationRequest, ModelDescription, SourcePicture

_WHOLE = re.compile(r"[+-]?\d{1,20}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
_TRUTHS = {"true": True, "false": False}
#: In a form all is text; these are not.
_WHOLE_NUMBERS = frozenset({"n", "output_compression", "partial_images", "num_inference_steps", "seed"})
_NUMBERS = frozenset({"strength", "guidance_scale", "guidance_until"})
_TRUE_OR_FALSE = frozenset({"stream", "enhance", "refine", "exact", "receipt"})

#: Clients that could send several pictures put brackets behind the name.
_IMAGE_NAMES = ("image", "image[]")


class ImageEditRequest(schema.ImageGenerationRequest):
    """The texts of `POST /v1/images/edits`."""

    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="How much is drawn anew, above 0 to 1: that share of the steps is run. Left out: what "
        "suits the model.",
    )


#: What of it a variation takes, which has no prompt.
VARIATION_FIELDS = (
    "model",
    "n",
    "size",
    "response_format",
    "output_format",
    "output_compression",
    "user",
    "strength",
    "num_inference_steps",
    "seed",
    "exact",
    "loras",
    "receipt",
)


@dataclass(frozen=True, slots=True)
class Upload:
    """A checked form: the texts, and the bytes of the picture and of the mask if there is one."""

    wire: ImageEditRequest
    image: bytes
    mask: bytes | None = None


def parse_edit(form: Form) -> Upload:
    """What an edit asks for; raises RequestRefused with one sentence on the first thing that is wrong."""
    files = _files(form, (*_IMAGE_NAMES, "mask"), ImageEditRequest.model_fields)
    wire = schema.parse_as(ImageEditRequest, _typed(form.texts))
    return Upload(wire, _the_image(files), _only_one("mask", files.get("mask", [])))


def parse_variation(form: Form) -> Upload:
    """What a variation asks for; raises as `parse_edit`."""
    files = _files(form, _IMAGE_NAMES, VARIATION_FIELDS)
    for name in form.texts:
        if name not in VARIATION_FIELDS:
            sentence = schema.unknown_field(name, ["image", *VARIATION_FIELDS])
            raise RequestRefused(sentence, name, "unknown_parameter")
    # The checks are those of an edit; what stands for its prompt is never drawn.
    wire = schema.parse_as(ImageEditRequest, {**_typed(form.texts), "prompt": "variation"})
    return Upload(wire, _the_image(files))


def edit_to_engine(
    wire: ImageEditRequest, source: SourcePicture, enhance_by_default: bool
) -> GenerationRequest:
    """The edit in the engine's words."""
    asked = schema.to_engine(wire, enhance_by_default)
    return replace(asked, image=source, strength=wire.strength)


def variation_to_engine(
    wire: ImageEditRequest, source: SourcePicture, model: ModelDescription
) -> GenerationRequest:
    """Another picture like it in the engine's words: drawn without a prompt, so without guidance."""
    editing = family_named(model.family).editing
    default = None if editing is None else editing.variation_strength
    return replace(
        schema.to_engine(wire),
        prompt="",
        negative_prompt=None,
        guidance_scale=1.0,
        enhance=False,
        image=source,
        strength=default if wire.strength is None else wire.strength,
    )


def form_in_docs(fields: Collection[str], files: Mapping[str, str]) -> dict[str, Any]:
    """The form as a schema: texts, and files with what is said of them; the first file is needed."""
    whole = ImageEditRequest.model_json_schema()
    texts = {name: _without_null(whole["properties"][name]) for name in fields}
    if "loras" in texts:
        told = f'{texts["loras"]["description"]} Here as JSON, such as ["style=0.8"].'
        texts["loras"] = {"type": "string", "description": told}
    needed = [next(iter(files)), *(name for name in whole["required"] if name in fields)]
    binary = {
        name: {"type": "string", "format": "binary", "description": said} for name, said in files.items()
    }
    return {
        "type": "object",
        "properties": {**binary, **texts},
        "required": needed,
        "additionalProperties": False,
    }


def _without_null(described: Mapping[str, Any]) -> dict[str, Any]:
    """A text's schema: a form has no null, and says nothing by leaving a field out."""
    kept = {name: value for name, value in described.items() if name not in ("anyOf", "default")}
    choices = [choice for choice in described.get("anyOf", ()) if choice != {"type": "null"}]
    merged = {**(choices[0] if len(choices) == 1 else {"anyOf": choices} if choices else {}), **kept}
    if "enum" in merged:
        merged["enum"] = [value for value in merged["enum"] if value is not None]
    return merged


def _typed(texts: Mapping[str, str]) -> dict[str, Any]:
    """The texts with numbers and truths as such; what is none stays text, and is refused as that."""
    return {name: _value(name, text) for name, text in texts.items()}


def _value(name: str, text: str) -> Any:
    stripped = text.strip()
    if name in _WHOLE_NUMBERS and _WHOLE.fullmatch(stripped):
        return int(stripped)
    if name in _NUMBERS and _NUMBER.fullmatch(stripped):
        return float(stripped)
    if name in _TRUE_OR_FALSE:
        return _TRUTHS.get(stripped.lower(), text)
    if name == "loras":
        return _listed(text)
    return text


def _listed(text: str) -> Any:
    """A list in JSON; what is none stays text, and is refused as that."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) else text


def _files(form: Form, known: tuple[str, ...], texts: Collection[str]) -> dict[str, list[bytes]]:
    """The files by the names of a form; raises RequestRefused where a text is sent as one, or the reverse."""
    for name in form.files:
        if name in texts:
            raise RequestRefused(f"{name} must be a text of the form, got a file.", name)
        if name not in known:
            raise RequestRefused(schema.unknown_field(name, [*known, *texts]), name, "unknown_parameter")
    for name in form.texts:
        if name in known:
            raise RequestRefused(
                f"{name} must be a file of the form, got a text; give the part a file name, as "
                "curl -F image=@picture.png does.",
                name,
                "invalid_image",
            )
    return form.files


def _the_image(files: Mapping[str, list[bytes]]) -> bytes:
    image = _only_one("image", [content for name in _IMAGE_NAMES for content in files.get(name, ())])
    if image is None:
        raise RequestRefused(
            "image is required; send the picture as a file of the form.",
            "image",
            "missing_required_parameter",
        )
    return image


def _only_one(name: str, contents: list[bytes]) -> bytes | None:
    if len(contents) > 1:
        raise RequestRefused(
            f"{name} must be one file, got {len(contents)}: the models here draw from one picture.", name
        )
    return contents[0] if contents else None
