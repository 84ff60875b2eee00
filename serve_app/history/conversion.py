"""Makes another kind of file of a picture that was kept, which tells the same of how it was drawn."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping

from serve_app.image_codec import (
    FileFormat,
    ImageEncoding,
    PictureFacts,
    encode,
    encode_preview,
    read_parameters,
    read_receipt,
)
from serve_app.parameters_text import read_text, take_lora_tags
from zimage_engine.types import LoraUse

#: As `parameters_text` writes it behind a LoRA's tag.
_MODULES = re.compile(r", (\d{1,9}) modules")


def as_file(png: bytes, file_format: FileFormat, quality: int) -> bytes:
    """The picture of a PNG file that was drawn here, in another format.

    Takes time: not for an event loop. Raises ValueError or OSError for what is no such file.
    """
    from PIL import Image

    encoding = ImageEncoding(file_format, quality)
    facts = _facts_of(png)
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        picture = image.convert("RGB")
    return encode_preview(picture, encoding) if facts is None else encode(picture, encoding, facts)


def _facts_of(png: bytes) -> PictureFacts | None:
    """What the file told when it was made; None for one that tells nothing."""
    text = read_parameters(png)
    if text is None:
        return None
    told = read_text(text)
    settings = told.settings
    width, _, height = settings.get("Size", "0x0").partition("x")
    receipt = read_receipt(png)
    # The receipt has them apart, where a text with a line like that of the other is read as two.
    prompts = {"prompt": told.prompt, "negative_prompt": told.negative_prompt, **(receipt or {})}
    return PictureFacts(
        prompt=str(prompts["prompt"]),
        negative_prompt=str(prompts["negative_prompt"]),
        seed=int(settings.get("Seed", 0)),
        steps=int(settings.get("Steps", 0)),
        guidance_scale=float(settings.get("CFG scale", 1)),
        width=int(width),
        height=int(height),
        model=settings.get("Model", ""),
        scheduler=settings.get("Sampler", ""),
        loras=tuple(_loras_in(settings)),
        refined=settings.get("Refined") == "yes",
        receipt=receipt,
    )


def _loras_in(settings: Mapping[str, str]) -> Iterator[LoraUse]:
    for name, value in settings.items():
        modules = _MODULES.search(value)
        _, tags = take_lora_tags(value)
        if name.startswith("Lora ") and tags and modules:
            yield LoraUse(tags[0].name, float(tags[0].weight), int(modules[1]))
