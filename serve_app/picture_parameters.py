"""Reads out of a picture's file what draws it again: of this program, AUTOMATIC1111, Forge and ComfyUI.

The files come from strangers: nothing is unpacked, every value is checked, and what cannot be used is named
with its reason. Knows no HTTP, and not which models and LoRAs there are.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from serve_app.error_mapping import RequestRefused
from serve_app.image_codec import PILLOW_FORMATS, read_parameters, read_receipt
from serve_app.openai_schema import LORA_NAME_CHARACTERS, LORA_WEIGHT, PROMPT_CHARACTERS
from serve_app.parameters_text import DrawnText, read_text, take_lora_tags
from serve_app.receipt import check_receipt, is_of_edit
from zimage_engine.loading.lora_choice import MOST_LORAS
from zimage_engine.sampling.plan import MAX_GUIDANCE_SCALE, MAX_SEED

Source = Literal["zimage-turbo", "automatic1111", "comfyui"]

#: The sides of most models' pictures are multiples of it.
GRID_PX = 16
MAX_SIDE_PX = 99_999
MAX_STEPS = 100
#: Longer is no text that a program wrote about one picture.
TEXT_CHARACTERS = 500_000
#: More of what is not used would tell nobody anything.
MOST_IGNORED = 40
SHOWN_CHARACTERS = 120
#: ComfyUI's WebP files have its JSON as the camera's model, a tag of EXIF, behind this word.
_MODEL_TAG, _COMFY_WORD = 0x0110, "prompt:"


@dataclass(frozen=True, slots=True)
class Ignored:
    """What the file tells and is not used, or not as it stands."""

    field: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class PictureParameters:
    """`parameters` are fields of POST /v1/images/generations."""

    parameters: dict[str, Any]
    source: Source
    ignored: tuple[Ignored, ...]


@dataclass(slots=True)
class _Sheet:
    """What has been read so far."""

    grid_px: int
    parameters: dict[str, Any] = field(default_factory=dict)
    ignored: list[Ignored] = field(default_factory=list)

    def ignore(self, name: str, value: object, reason: str) -> None:
        if len(self.ignored) < MOST_IGNORED:
            self.ignored.append(Ignored(_clean(name)[:SHOWN_CHARACTERS], _shown(value), reason))

    def put(self, name: str, value: object, read: Callable[[Any], Any]) -> None:
        """The value as `read` reads it, or, where that raises ValueError, its reason not to."""
        try:
            self.parameters[name] = read(value)
        except ValueError as reason:
            self.ignore(name, value, str(reason))

    def put_prompt(self, name: str, text: str) -> None:
        text = _clean(text)
        if len(text) > PROMPT_CHARACTERS:
            self.ignore(name, text[PROMPT_CHARACTERS:], f"only {PROMPT_CHARACTERS} characters are read")
        # Blank, it asks for nothing; an empty negative prompt asks for none.
        if text.strip() or name != "prompt":
            self.parameters[name] = text[:PROMPT_CHARACTERS]

    def put_size(self, width: object, height: object) -> None:
        """On the grid, where another program's is not."""
        try:
            asked = (_whole(1, MAX_SIDE_PX)(width), _whole(1, MAX_SIDE_PX)(height))
        except ValueError as reason:
            self.ignore("size", f"{_shown(width)}x{_shown(height)}", str(reason))
            return
        grid = self.grid_px
        taken = "x".join(str(max(grid, round(side / grid) * grid)) for side in asked)
        told = "x".join(map(str, asked))
        if taken != told:
            self.ignore("size", told, f"sides are multiples of {grid} here: {taken} is taken")
        self.parameters["size"] = taken

    def put_loras(self, loras: list[tuple[object, object]]) -> None:
        taken: list[dict[str, Any]] = []
        for name, weight in loras:
            try:
                if not isinstance(name, str) or not 0 < len(name) <= LORA_NAME_CHARACTERS:
                    raise ValueError(f"a LoRA's name has up to {LORA_NAME_CHARACTERS} characters")
                if len(taken) == MOST_LORAS:
                    raise ValueError(f"at most {MOST_LORAS} LoRAs are taken")
                number = _number(-LORA_WEIGHT, LORA_WEIGHT)(1.0 if weight == "" else weight)
                taken.append({"name": _clean(name), "weight": number})
            except ValueError as reason:
                self.ignore("loras", name, str(reason))
        if taken:
            self.parameters["loras"] = taken

    def as_it_stands(self) -> None:
        """The prompt is the drawn one: to add to it, or to sharpen, would draw another picture."""
        self.parameters |= {"enhance": False, "refine": False}


def parameters_in(content: bytes, grid_px: int = GRID_PX) -> PictureParameters:
    """What draws the picture again, of other programs in a size on the grid. Takes time: not for an event
    loop.

    Of a picture that was drawn here they draw the identical one, where the model and its LoRAs are the same:
    the prompt is the one that was drawn, and `enhance` is false so that nothing is added to it again.
    Raises RequestRefused (400) for a file that is no picture, or has no parameters in it, and InvalidRequest
    for one whose receipt nothing can be drawn from.
    """
    found = _read(content)
    sheet = _Sheet(grid_px)
    source: Source
    if found.receipt is not None:
        source = "zimage-turbo"
        _from_receipt(sheet, found.receipt, found.text)
    elif found.text is not None:
        source = "automatic1111"
        _from_text(sheet, read_text(found.text))
    else:
        source = "comfyui"
        _from_graph(sheet, found.graph)
    if not sheet.parameters.keys() - {"enhance", "refine"}:
        _refuse_empty()
    return PictureParameters(sheet.parameters, source, tuple(sheet.ignored))


@dataclass(frozen=True, slots=True)
class _Found:
    """What the file has; one of them is there."""

    receipt: Mapping[str, Any] | None
    text: str | None
    graph: Mapping[str, Any]


def _read(content: bytes) -> _Found:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
            told, is_png = dict(image.info), image.format == "PNG"
            tag = None if is_png else image.getexif().get(_MODEL_TAG)
        receipt = read_receipt(content)
        # Of a PNG without either the whole picture would be unpacked to look for it.
        has_text = not is_png or "parameters" in told or "exif" in told
        text = read_parameters(content) if has_text else None
    except MemoryError:
        raise
    except Exception as error:  # a decoder's ways to fail on damaged files have no common class
        raise RequestRefused(
            "image is no picture that can be read: give a whole PNG, JPEG or WebP file, with no more text in "
            "it than programs write about a picture.",
            "image",
            "invalid_image",
        ) from error
    graph = told.get("prompt")
    if graph is None and isinstance(tag, str) and tag.startswith(_COMFY_WORD):
        graph = tag.removeprefix(_COMFY_WORD)
    if any(isinstance(each, str) and len(each) > TEXT_CHARACTERS for each in (text, graph)):
        raise RequestRefused(
            f"image has a text of more than {TEXT_CHARACTERS:,} characters in it, which no program writes "
            "about one picture.",
            "image",
            "invalid_image",
        )
    nodes = _nodes_in(graph)
    if receipt is None and not (text and text.strip()) and not nodes:
        _refuse_empty()
    return _Found(receipt, text if text and text.strip() else None, nodes)


def _refuse_empty() -> NoReturn:
    raise RequestRefused(
        "image has no parameters in it that can be drawn from: it was not drawn here, by AUTOMATIC1111 or by "
        "a plain workflow of ComfyUI, or another program has saved it since. Give the original file.",
        "image",
        "no_parameters",
    )


# --- this program ----------------------------------------------------------------------------------------


def _from_receipt(sheet: _Sheet, receipt: Mapping[str, Any], text: str | None) -> None:
    if receipt.get("cut") and text is not None:
        told = read_text(text)
        sheet.ignore("prompt", told.prompt, "it was too long for the file, a JPEG, and may be cut at its end")
        receipt = {**receipt, "prompt": told.prompt, "negative_prompt": told.negative_prompt, "cut": False}
    check_receipt(receipt)
    sheet.put_prompt("prompt", receipt["prompt"])
    sheet.put_prompt("negative_prompt", receipt["negative_prompt"])
    # Not brought onto a grid: it is on its model's.
    sheet.parameters["size"] = f"{receipt['width']}x{receipt['height']}"
    sheet.put("num_inference_steps", receipt["steps"], _whole(1, MAX_STEPS))
    sheet.put("guidance_scale", receipt["guidance_scale"], _number(0, MAX_GUIDANCE_SCALE))
    if "guidance_until" in receipt:
        sheet.put("guidance_until", receipt["guidance_until"], _number(0, 1))
    sheet.put("seed", receipt["seed"], _whole(0, MAX_SEED))
    if receipt.get("guidance_until") is not None:
        sheet.put("guidance_until", receipt["guidance_until"], _number(0, 1))
    sheet.as_it_stands()
    sheet.parameters["refine"] = receipt["refined"]
    if not receipt.get("accelerated_by"):
        # What has been found to be quicker since would draw other last bits.
        sheet.parameters["exact"] = True
    model, loras = receipt.get("model"), receipt.get("loras")
    if isinstance(model, Mapping) and isinstance(model.get("id"), str):
        sheet.parameters["model"] = _clean(model["id"])
    # Without any the server would draw with those that it was started with.
    sheet.parameters["loras"] = []
    if isinstance(loras, list):
        named = [each for each in loras if isinstance(each, Mapping)]
        sheet.put_loras([(each.get("name"), each.get("weight")) for each in named])
    if is_of_edit(receipt):
        sheet.ignore(
            "edit", receipt["edit"], "it was drawn from another picture, which its file does not hold"
        )


# --- AUTOMATIC1111 and Forge -----------------------------------------------------------------------------


def _from_text(sheet: _Sheet, told: DrawnText) -> None:
    prompt, tags = take_lora_tags(told.prompt)
    sheet.put_prompt("prompt", prompt)
    sheet.put_prompt("negative_prompt", told.negative_prompt)
    sheet.as_it_stands()
    for name, value in told.settings.items():
        if name in _SETTINGS:
            ours, read = _SETTINGS[name]
            sheet.put(ours, value, read)
        elif name == "Size":
            width, _, height = value.partition("x")
            sheet.put_size(width, height)
        elif name == "Model":
            sheet.parameters["model"] = _clean(value)
        elif name == "Refined":
            sheet.parameters["refine"] = value == "yes"
        elif name.startswith("Lora ") and "<lora:" in value:
            tags += take_lora_tags(value)[1]
        else:
            sheet.ignore(name, value, "there is no such setting here")
    sheet.put_loras([(tag.name, tag.weight) for tag in tags])


# --- ComfyUI ---------------------------------------------------------------------------------------------

#: Inputs of nodes through which another one's conditioning, model or latents come.
_THROUGH = ("conditioning", "conditioning_1", "conditioning_to", "samples", "latent", "model")
_SAMPLERS = ("KSampler", "KSamplerAdvanced")
MOST_LINKS = 50


def _nodes_in(graph: object) -> Mapping[str, Any]:
    try:
        nodes = json.loads(graph) if isinstance(graph, str) else None
    except (ValueError, RecursionError):
        return {}
    if not isinstance(nodes, dict):
        return {}
    return {
        id: node
        for id, node in nodes.items()
        if isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
    }


def _from_graph(sheet: _Sheet, nodes: Mapping[str, Any]) -> None:
    samplers = [node["inputs"] for node in nodes.values() if node["class_type"] in _SAMPLERS]
    if not samplers:
        return
    # Of several the first is the one that begins with nothing; the others work on its picture.
    with_size = [
        (sampler, size) for sampler in samplers if (size := _sized(nodes, sampler.get("latent_image")))
    ]
    sampler, size = with_size[0] if with_size else (samplers[0], None)
    if len(samplers) > 1:
        sheet.ignore(
            "KSampler", len(samplers), "the workflow draws in several passes; only the first is taken"
        )
    sheet.put_prompt("prompt", _text_of(nodes, sampler.get("positive")) or "")
    sheet.put_prompt("negative_prompt", _text_of(nodes, sampler.get("negative")) or "")
    if size is not None:
        sheet.put_size(size["width"], size["height"])
    sheet.as_it_stands()
    for name, value in sampler.items():
        if name in _INPUTS:
            ours, read = _INPUTS[name]
            sheet.put(ours, _plain(nodes, value), read)
        elif not isinstance(value, list):
            sheet.ignore(name, value, "there is no such setting here")
    loras: list[tuple[object, object]] = []
    for node in _along(nodes, sampler.get("model")):
        if "lora_name" in node:
            loras.append((node["lora_name"], node.get("strength_model", 1.0)))
        model = node.get("ckpt_name", node.get("unet_name"))
        if isinstance(model, str):
            sheet.parameters["model"] = _clean(model)
    sheet.put_loras(loras[::-1])


def _node_at(nodes: Mapping[str, Any], link: object) -> Mapping[str, Any] | None:
    """The inputs of the node that a link leads to: a list of its id and the number of an output."""
    if not (isinstance(link, list) and len(link) == 2 and isinstance(link[0], (str, int))):
        return None
    node = nodes.get(str(link[0]))
    return None if node is None else node["inputs"]


def _along(nodes: Mapping[str, Any], link: object) -> Iterator[Mapping[str, Any]]:
    """The nodes from that link on backwards, the nearest first; a ring has no end, so there is one here."""
    for _ in range(MOST_LINKS):
        node = _node_at(nodes, link)
        if node is None:
            return
        yield node
        link = next((node[name] for name in _THROUGH if isinstance(node.get(name), list)), None)


def _text_of(nodes: Mapping[str, Any], link: object) -> str | None:
    for node in _along(nodes, link):
        text = _plain(nodes, node.get("text"))
        if isinstance(text, str):
            return text
    return None


def _sized(nodes: Mapping[str, Any], link: object) -> dict[str, object] | None:
    for node in _along(nodes, link):
        if "width" in node and "height" in node:
            return {name: _plain(nodes, node[name]) for name in ("width", "height")}
        if "pixels" in node or "image" in node:
            return None
    return None


def _plain(nodes: Mapping[str, Any], value: object) -> object:
    """The value, or where it is a link the one that a plain node behind it holds."""
    for _ in range(MOST_LINKS):
        node = _node_at(nodes, value)
        if node is None:
            return value
        value = next(
            (node[name] for name in ("value", "text", "string", "seed", "int") if name in node), None
        )
    return None


# --- values ----------------------------------------------------------------------------------------------


def _whole(least: int, most: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = _number(least, most)(value)
        if number != int(number):
            raise ValueError(f"it must be a whole number from {least} to {most}")
        return int(number)

    return read


def _number(least: float, most: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        try:
            # float() would take long for the longest, and bool is an int.
            if isinstance(value, bool) or (isinstance(value, str) and len(value) > 40):
                raise ValueError
            number = float(value)
        except (ValueError, TypeError, OverflowError):
            number = math.nan
        if not least <= number <= most:
            raise ValueError(f"it must be a number from {least:g} to {most:g}")
        return number

    return read


#: What is called so elsewhere, and here.
_SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "Steps": ("num_inference_steps", _whole(1, MAX_STEPS)),
    "CFG scale": ("guidance_scale", _number(0, MAX_GUIDANCE_SCALE)),
    "Seed": ("seed", _whole(0, MAX_SEED)),
}
_INPUTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "steps": ("num_inference_steps", _whole(1, MAX_STEPS)),
    "cfg": ("guidance_scale", _number(0, MAX_GUIDANCE_SCALE)),
    "seed": ("seed", _whole(0, MAX_SEED)),
    "noise_seed": ("seed", _whole(0, MAX_SEED)),
}


def _clean(text: str) -> str:
    """Without NUL, which no request may hold, and halves of characters, which no answer can."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _shown(value: object) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        text = type(value).__name__
    text = _clean(text)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
