"""The wire format by itself: what becomes of good fields, and how the bad ones are told."""

from __future__ import annotations

import base64
import json
import re

import pytest
from openai.types import ImagesResponse as OpenAIImagesResponse

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.image_codec import ImageEncoding
from tests.serve_app.wrong_inputs import OF_THE_BODY, WrongInput
from zimage_engine.types import (
    EnhancedPrompt,
    GenerationReport,
    GenerationRequest,
    LoraUse,
    ModelDescription,
    Notice,
    PictureReport,
)

MODEL = ModelDescription(
    id="tiny",
    family="z-image-turbo",
    device="cpu",
    dtype="bfloat16",
    native_width=256,
    native_height=256,
    size_multiple=32,
    default_steps=8,
    default_guidance_scale=1.8,
    token_limit=512,
)


def parsed(**fields: object) -> schema.ImageGenerationRequest:
    return schema.parse({"prompt": "a red circle"} | fields)


def test_a_prompt_alone_leaves_everything_to_the_model() -> None:
    assert schema.to_engine(parsed()) == GenerationRequest(prompt="a red circle")
    assert schema.to_encoding(parsed()) == ImageEncoding("png", 100)


def test_null_is_the_same_as_left_out() -> None:
    names = [name for name in schema.ImageGenerationRequest.model_fields if name != "prompt"]
    wire = parsed(**dict.fromkeys(names))
    assert schema.to_engine(wire) == schema.to_engine(parsed())
    assert schema.to_encoding(wire) == schema.to_encoding(parsed())


@pytest.mark.parametrize(
    ("fields", "steps", "guidance_scale"),
    [
        ({"quality": "low"}, 4, 1.0),
        ({"quality": "medium"}, 8, 1.0),
        ({"quality": "high"}, None, None),
        ({"quality": "auto"}, None, None),
        ({"quality": "low", "num_inference_steps": 6}, 6, 1.0),
        ({"quality": "low", "guidance_scale": 2.0}, 4, 2.0),
        ({"quality": "low", "guidance_scale": 0}, 4, 0),
        ({"num_inference_steps": 12, "guidance_scale": 2}, 12, 2),
    ],
)
def test_quality_chooses_steps_and_guidance_and_explicit_values_win(
    fields: dict[str, object], steps: int | None, guidance_scale: float | None
) -> None:
    request = schema.to_engine(parsed(**fields))
    assert (request.num_inference_steps, request.guidance_scale) == (steps, guidance_scale)


def test_every_field_of_the_engine_is_reached() -> None:
    wire = parsed(
        n=3,
        size="512x256",
        negative_prompt="blurry",
        num_inference_steps=6,
        guidance_scale=1.5,
        seed=7,
        enhance=False,
    )
    assert schema.to_engine(wire) == GenerationRequest(
        prompt="a red circle",
        negative_prompt="blurry",
        width=512,
        height=256,
        num_inference_steps=6,
        guidance_scale=1.5,
        seed=7,
        n=3,
        enhance=False,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"background": "auto"},
        {"background": "opaque"},
        {"moderation": "auto"},
        {"moderation": "low"},
        {"stream": False},
        {"partial_images": 0},
        {"response_format": "b64_json"},
        {"user": "someone"},
        {"size": "auto"},
        {"output_compression": 100},
    ],
)
def test_defaults_of_openai_that_ask_for_nothing_are_taken(fields: dict[str, object]) -> None:
    assert schema.to_engine(parsed(**fields)) == schema.to_engine(parsed())


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_the_lossy_formats_take_a_compression(output_format: str) -> None:
    encoding = schema.to_encoding(parsed(output_format=output_format, output_compression=40))
    assert (encoding.format, encoding.compression) == (output_format, 40)


@pytest.mark.parametrize("name", ["tiny", "zimage-turbo", "default", None])
def test_the_loaded_model_goes_by_its_id_and_by_two_names(name: str | None) -> None:
    schema.check_model(parsed(model=name), MODEL)


def test_another_model_is_a_404_that_names_the_loaded_one() -> None:
    with pytest.raises(RequestRefused) as refused:
        schema.check_model(parsed(model="gpt-image-1"), MODEL)
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    assert "'tiny'" in refused.value.message


@pytest.mark.parametrize("row", OF_THE_BODY, ids=lambda row: row.name)
def test_wrong_bodies_are_told_in_one_sentence(row: WrongInput) -> None:
    with pytest.raises(RequestRefused) as refused:
        schema.parse(schema.read_json(row.body))
    assert row.phrase in refused.value.message
    assert refused.value.param == row.param
    assert_readable(refused.value.message)


def assert_readable(message: str) -> None:
    assert len(message) < 400
    assert "\n" not in message
    assert not re.search(r"pydantic|https?://|Traceback|loc=|input_value|type=", message)


def test_a_good_body_in_utf_8_with_a_mark_is_read() -> None:
    body = json.dumps({"prompt": "红色圆形"}, ensure_ascii=False).encode("utf-8-sig")
    assert schema.read_json(body) == {"prompt": "红色圆形"}


def test_the_response_is_one_that_openais_client_reads() -> None:
    notice, late = Notice("few_steps", "few steps"), Notice("flat", "the picture is flat")
    report = GenerationReport(
        model="tiny",
        family="z-image-turbo",
        device="cpu",
        dtype="bfloat16",
        prompt="a red circle, best quality",
        negative_prompt="blurry",
        enhancement=EnhancedPrompt("a red circle, best quality", "blurry"),
        width=256,
        height=320,
        num_inference_steps=3,
        guidance_scale=1.8,
        scheduler="FlowMatchEulerDiscreteScheduler",
        seconds=2.0,
        pictures=(
            PictureReport(7, 1.23456, 0.1, 1.0, 0.1),
            PictureReport(8, 1.0, 0.0, 0.9, 0.1, warnings=(late,)),
        ),
        warnings=(notice,),
        loras=(LoraUse("style.safetensors", 0.8, 34),),
    )
    wire = parsed(n=2)
    body = schema.to_response(wire, ImageEncoding("png"), (b"one", b"two"), report, count_tokens=len)
    schema.ImagesResponse.model_validate(body)
    read = OpenAIImagesResponse.model_validate(body)
    assert read.data is not None
    assert [base64.b64decode(picture.b64_json or "") for picture in read.data] == [b"one", b"two"]
    assert read.usage is not None
    text = len("a red circle, best quality") + len("blurry")
    assert (read.usage.input_tokens, read.usage.input_tokens_details.text_tokens) == (text, text)
    assert (read.usage.output_tokens, read.usage.total_tokens) == (2 * 16 * 20, text + 2 * 16 * 20)
    assert read.data[0].revised_prompt == "a red circle, best quality"
    assert (body["size"], body["quality"], body["output_format"]) == ("256x320", "high", "png")
    first, second = body["data"]
    assert (first["seed"], first["steps"], first["guidance"], first["seconds"]) == (7, 3, 1.8, 1.235)
    assert [warning["code"] for warning in first["warnings"]] == ["few_steps"]
    assert [warning["code"] for warning in second["warnings"]] == ["few_steps", "flat"]
    assert first["loras"] == [
        {"name": "style.safetensors", "weight": 0.8, "adapted_modules": 34, "digest": ""}
    ]


def test_every_field_is_described_for_the_docs() -> None:
    undescribed = [
        name for name, field in schema.ImageGenerationRequest.model_fields.items() if not field.description
    ]
    assert undescribed == []
