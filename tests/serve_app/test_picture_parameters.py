"""What is read out of pictures' files: ours, other programs', and hostile ones."""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import time
import zlib
from collections.abc import Mapping
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from serve_app.error_mapping import RequestRefused
from serve_app.image_codec import ImageEncoding, PictureFacts, encode
from serve_app.openai_schema import ImageGenerationRequest
from serve_app.picture_parameters import PictureParameters, parameters_in
from zimage_engine.errors import InvalidRequest
from zimage_engine.types import LoraUse

AS_DRAWN = {"enhance": False, "refine": False}


def png_with(**texts: str) -> bytes:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def png_of(*chunks: bytes, size: tuple[int, int] = (16, 16)) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + rows + chunk(b"IEND", b"")


def facts(**changed: Any) -> PictureFacts:
    receipt = {
        "receipt": 1,
        "model": {"id": "disc-painter"},
        "loras": [{"name": "ink.safetensors", "weight": 0.5, "digest": ""}],
        "prompt": "a fox\nNegative prompt: is what it says",
        "negative_prompt": "",
        "seed": 2**32 - 1,
        "steps": 9,
        "guidance_scale": 1.85,
        "width": 72,
        "height": 40,
        "refined": True,
        **changed,
    }
    return PictureFacts(
        prompt=str(receipt["prompt"]),
        negative_prompt=str(receipt["negative_prompt"]),
        seed=0,
        steps=9,
        guidance_scale=1.85,
        width=72,
        height=40,
        model="disc-painter",
        scheduler="Euler",
        loras=(LoraUse("ink.safetensors", 0.5, 3),),
        receipt=receipt,
    )


def drawn_here(file_format: Any = "png", **changed: Any) -> bytes:
    return encode(Image.new("RGB", (72, 40)), ImageEncoding(file_format), facts(**changed))


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_a_picture_of_ours_tells_what_draws_it_in_every_format(file_format: str) -> None:
    assert parameters_in(drawn_here(file_format)) == PictureParameters(
        {
            "prompt": "a fox\nNegative prompt: is what it says",
            "negative_prompt": "",
            # Of a model with a grid of 8; it is not moved.
            "size": "72x40",
            "num_inference_steps": 9,
            "guidance_scale": 1.85,
            "seed": 2**32 - 1,
            "enhance": False,
            "refine": True,
            "exact": True,
            "model": "disc-painter",
            "loras": [{"name": "ink.safetensors", "weight": 0.5}],
        },
        "zimage-turbo",
        (),
    )


def test_of_a_jpeg_without_room_for_the_prompt_its_beginning_is_told() -> None:
    found = parameters_in(drawn_here("jpeg", prompt="一只狐狸，" * 6_000))
    assert found.parameters["prompt"] == "一只狐狸，" * 6_000 and found.parameters["seed"] == 2**32 - 1
    assert [each.field for each in found.ignored] == ["prompt"]
    assert "cut" in found.ignored[0].reason


def test_that_it_was_drawn_from_a_picture_is_told() -> None:
    (ignored,) = parameters_in(drawn_here(edit={"strength": 0.5})).ignored
    assert ignored.field == "edit" and "another picture" in ignored.reason


WEBUI = """masterpiece, a (red:1.2) fox <lora:ink_style:0.8>,
in the snow <lora:detail>
Negative prompt: lowres, bad hands,
text
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 1234567890, Size: 512x770, \
Model hash: 6ce0161689, Model: v1-5, Lora hashes: "ink_style: 1, detail: 2", Version: v1.9.4"""


def test_the_text_of_automatic1111_is_read() -> None:
    found = parameters_in(png_with(parameters=WEBUI))
    assert found.source == "automatic1111"
    assert found.parameters == {
        "prompt": "masterpiece, a (red:1.2) fox ,\nin the snow",
        "negative_prompt": "lowres, bad hands,\ntext",
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "seed": 1234567890,
        "size": "512x768",
        "model": "v1-5",
        "loras": [{"name": "ink_style", "weight": 0.8}, {"name": "detail", "weight": 1.0}],
        **AS_DRAWN,
    }
    assert {each.field: each.value for each in found.ignored} == {
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "size": "512x770",
        "Model hash": "6ce0161689",
        "Lora hashes": "ink_style: 1, detail: 2",
        "Version": "v1.9.4",
    }
    ImageGenerationRequest.model_validate(found.parameters)


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_the_text_of_automatic1111_is_read_out_of_exif(file_format: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + WEBUI.encode("utf-16-be")
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, file_format, exif=exif)
    assert parameters_in(file.getvalue()) == parameters_in(png_with(parameters=WEBUI))


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        ("Steps: 150, CFG scale: 2", "num_inference_steps", "from 1 to 100"),
        ("Steps: 8, Seed: -1", "seed", "from 0 to"),
        ("Steps: 8, Seed: 1.5", "seed", "whole number"),
        (f"Steps: 8, Seed: {'9' * 9999}", "seed", "from 0 to"),
        ("Steps: 8, CFG scale: nan", "guidance_scale", "from 0 to 20"),
        ("Steps: 8, CFG scale: many", "guidance_scale", "from 0 to 20"),
        ("Steps: 8, Size: 512", "size", "from 1 to"),
        ("Steps: 8, Size: 0x0", "size", "from 1 to"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_the_reason(line: str, field: str, reason: str) -> None:
    found = parameters_in(png_with(parameters=f"a fox\n{line}"))
    assert found.parameters["prompt"] == "a fox" and field not in found.parameters
    (ignored,) = found.ignored
    assert ignored.field == field and reason in ignored.reason and len(ignored.value) < 200


def test_more_loras_than_may_be_and_weights_that_are_none_are_named() -> None:
    tags = "".join(f"<lora:l{number}:1>" for number in range(9)) + "<lora:heavy:1e9>"
    found = parameters_in(png_with(parameters=f"a fox {tags}"))
    assert [each["name"] for each in found.parameters["loras"]] == [f"l{number}" for number in range(8)]
    assert [each.value for each in found.ignored] == ["l8", "heavy"]


def workflow(**changed: Any) -> dict[str, Any]:
    return {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 42,
                "steps": 8,
                "cfg": 1.5,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
                "model": ["11", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
                **changed,
            },
        },
        "4": {"class_type": "UNETLoader", "inputs": {"unet_name": "z_image_turbo_bf16.safetensors"}},
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": ["20", 0], "height": 768}},
        "6": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["8", 0]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["10", 0]}},
        "8": {"class_type": "CLIPTextEncode", "inputs": {"text": ["21", 0], "clip": ["10", 0]}},
        "11": {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["4", 0], "lora_name": "ink.safetensors", "strength_model": 0.7},
        },
        "20": {"class_type": "PrimitiveInt", "inputs": {"value": 1024}},
        "21": {"class_type": "PrimitiveString", "inputs": {"value": "雪中的狐狸"}},
    }


def test_a_plain_workflow_of_comfyui_is_read() -> None:
    found = parameters_in(png_with(prompt=json.dumps(workflow()), workflow="{}"))
    assert found == PictureParameters(
        {
            "prompt": "雪中的狐狸",
            "negative_prompt": "blurry",
            "size": "1024x768",
            "seed": 42,
            "num_inference_steps": 8,
            "guidance_scale": 1.5,
            "model": "z_image_turbo_bf16.safetensors",
            "loras": [{"name": "ink.safetensors", "weight": 0.7}],
            **AS_DRAWN,
        },
        "comfyui",
        found.ignored,
    )
    assert [each.field for each in found.ignored] == ["sampler_name", "scheduler", "denoise"]
    ImageGenerationRequest.model_validate(found.parameters)


def test_of_several_passes_the_one_that_begins_with_nothing_is_taken() -> None:
    nodes = workflow()
    second = {**nodes["3"]["inputs"], "seed": 9, "latent_image": ["3", 0], "positive": ["7", 0]}
    nodes = {"1": {"class_type": "KSampler", "inputs": {**second, "latent_image": ["40", 0]}}, **nodes}
    found = parameters_in(png_with(prompt=json.dumps(nodes)))
    assert (found.parameters["seed"], found.parameters["prompt"]) == (42, "雪中的狐狸")
    assert found.ignored[0].field == "KSampler"


def test_a_ring_of_nodes_has_an_end() -> None:
    ring = {
        "class_type": "Reroute",
        "inputs": {"conditioning": ["6", 0], "model": ["6", 0], "value": ["6", 0]},
    }
    nodes = {**workflow(seed=["6", 0], positive=["6", 0], model=["6", 0], latent_image=["6", 0]), "6": ring}
    found = parameters_in(png_with(prompt=json.dumps(nodes)))
    assert "prompt" not in found.parameters and "seed" in {each.field for each in found.ignored}


EMPTY = (
    png_with(),
    png_with(parameters=" \n "),
    png_with(prompt="a fox"),
    png_with(prompt="{}"),
    png_with(prompt="[" * 100_000),
    png_with(prompt='{"1": {"class_type": "SaveImage", "inputs": {}}}'),
    png_with(prompt='{"1": {"class_type": 3, "inputs": []}, "2": null}'),
    png_with(**{"zimage-turbo": "[1"}),
    # Nobody unpacks this to look for more.
    png_of(size=(9000, 9000)),
)
BROKEN = (
    b"",
    b"no picture",
    drawn_here()[:40],
    b"\x89PNG\r\n\x1a\n" + b"\xff" * 100,
    # What unpacks to more than a text may have.
    png_of(chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * 50_000_000))),
    png_of(chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(b"a" * 50_000_000))),
    png_of(*[chunk(b"zTXt", b"k%d\0\0" % each + zlib.compress(b"a" * 900_000)) for each in range(90)]),
    png_with(parameters="a" * 600_000),
    png_with(prompt="a" * 600_000),
    png_of(size=(60_000, 60_000)),
)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        *(pytest.param(each, "no_parameters", id=f"empty-{at}") for at, each in enumerate(EMPTY)),
        *(pytest.param(each, "invalid_image", id=f"broken-{at}") for at, each in enumerate(BROKEN)),
    ],
)
def test_what_tells_nothing_is_refused_at_once(content: bytes, code: str) -> None:
    began = time.process_time()
    with pytest.raises(RequestRefused) as refused:
        parameters_in(content)
    assert (refused.value.status, refused.value.code) == (400, code)
    assert time.process_time() - began < 1


WRONG_RECEIPTS: tuple[Mapping[str, Any], ...] = (
    {"receipt": 99},
    {"seed": "7"},
    {"seed": True},
    {"prompt": None},
    {"width": 1.5},
    {"guidance_scale": float("inf")},
    {"edit": 3},
)


@pytest.mark.parametrize("changed", WRONG_RECEIPTS, ids=str)
def test_a_receipt_with_wrong_types_is_refused(changed: Mapping[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        parameters_in(drawn_here(**changed))


def test_what_a_receipt_tells_beyond_the_limits_is_left_out() -> None:
    wrong = {
        "seed": 10**30,
        "steps": -5,
        "guidance_scale": 1e300,
        "loras": [3, {"name": 3}, {"name": "x" * 999}],
    }
    found = parameters_in(drawn_here(**wrong))
    assert not found.parameters.keys() & {"seed", "num_inference_steps", "guidance_scale"}
    assert found.parameters["loras"] == [] and len(found.ignored) == 5


@pytest.mark.parametrize(
    "text",
    [
        "Steps: 1" + ":" * 400_000,
        "Steps: 1, " + '"' * 400_000,
        "Steps: 1, " + 'a: "' * 100_000,
        "Steps: 1, " + "a" * 400_000,
        "<lora:" * 70_000,
        "<lora:a:" + "1" * 400_000,
        "<lora:" + "a" * 300 + ":" * 400_000,
        "\n" * 400_000 + "a",
    ],
    ids=lambda text: text[:12] + text[-4:],
)
def test_long_texts_take_no_long_time(text: str) -> None:
    began = time.process_time()
    with contextlib.suppress(RequestRefused):
        parameters_in(png_with(parameters=text))
    assert time.process_time() - began < 2


def test_what_no_request_may_hold_is_taken_out_of_a_prompt() -> None:
    nodes = {"1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0]}}}
    nodes["2"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "a \ud800fox\0" + "x" * 40_000}}
    found = parameters_in(png_with(prompt=json.dumps(nodes)))
    assert found.parameters["prompt"].startswith("a ?fox") and len(found.parameters["prompt"]) == 32_000
    assert [each.field for each in found.ignored] == ["prompt"]


def test_damaged_files_are_refused_and_nothing_else_happens() -> None:
    whole = (drawn_here("png"), drawn_here("jpeg"), drawn_here("webp"), png_with(parameters=WEBUI))
    dice = random.Random(9)
    for _ in range(400):
        damaged = bytearray(dice.choice(whole))
        for _ in range(dice.randint(1, 20)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        try:
            found = parameters_in(bytes(damaged[: dice.randint(1, len(damaged))]))
        except (RequestRefused, InvalidRequest):
            continue
        json.dumps(found.parameters, ensure_ascii=False).encode()


@pytest.mark.parametrize(("told", "asked"), [(0.4, 0.4), (0, 0), (None, None), (1.5, None), ("half", None)])
def test_how_far_guidance_acted_is_told_where_it_did_not_act_to_the_end(told: object, asked: object) -> None:
    assert parameters_in(drawn_here(guidance_until=told)).parameters.get("guidance_until") == asked


@pytest.mark.parametrize(
    ("told", "asked"),
    [({}, True), ({"accelerated_by": []}, True), ({"accelerated_by": ["compiled"]}, None)],
    ids=["before there was anything quicker", "plain", "accelerated"],
)
def test_what_is_quicker_now_is_kept_from_pictures_of_the_plain_path(told: Any, asked: bool | None) -> None:
    assert parameters_in(drawn_here(**told)).parameters.get("exact") is asked
