"""OpenAI's images API on the wire: what is accepted, refused and answered.

The edge only: a body becomes a `GenerationRequest` and an `ImageEncoding`, a finished reply becomes
OpenAI's response with our own fields beside it. Knows no routes and no workers.
"""

from __future__ import annotations

import base64
import difflib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, NoReturn, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from serve_app.error_mapping import RequestRefused
from serve_app.image_codec import ImageEncoding, read_receipt
from serve_app.model_list import DEFAULT_NAMES, ModelState, State
from zimage_engine.loading.lora_choice import MOST_LORAS
from zimage_engine.types import (
    Enhancer,
    GenerationReport,
    GenerationRequest,
    LoraChoice,
    LoraOffer,
    ModelDescription,
    Notice,
)

#: OpenAI's own limit for its image models; what the model reads of it is its token limit.
PROMPT_CHARACTERS = 32_000
PICTURES = 10
PARTIAL_IMAGES = 3
#: Beyond this a weight draws nothing but noise.
LORA_WEIGHT = 10
LORA_NAME_CHARACTERS = 300
#: A picture of the usage: one token stands for this many pixels a side.
TOKEN_SIDE_PX = 16
#: Names that always mean the default model, for clients that must send some name.
MODEL_ALIASES = DEFAULT_NAMES

#: For the document: what the sentences below and the engine's refuse, as far as a schema can tell it.
_WITHOUT_NULL: dict[str, Any] = {"pattern": r"^[^\x00]*$"}
_MOST_STEPS, _MOST_GUIDANCE, _MOST_SEED = 100, 20, 2**32 - 1

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)


#: The checked form of one route's body.
Wire = TypeVar("Wire", bound="ImageGenerationRequest")
Checked = TypeVar("Checked", bound=BaseModel)


#: Of a picture that was asked for as url and is lost to nobody all the same.
NOT_KEPT = Notice(
    "result_not_kept",
    "The picture could not be kept on the server for its url, so it is in this answer as b64_json.",
)


class Link(Protocol):
    """Where a finished picture can be fetched, and until when in seconds since 1970."""

    @property
    def url(self) -> str: ...

    @property
    def expires_at(self) -> int: ...


@dataclass(frozen=True)
class Quality:
    """Steps and guidance behind a word of OpenAI's; None is the model's own default."""

    steps: int | None
    guidance_scale: float | None


QUALITIES: dict[str, Quality] = {
    "low": Quality(4, 1.0),
    "medium": Quality(8, 1.0),
    "high": Quality(None, None),
    "auto": Quality(None, None),
}


class RequestedLora(BaseModel):
    """A LoRA to draw with, by a name of GET /v1/loras."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(min_length=1, max_length=LORA_NAME_CHARACTERS)
    weight: float = Field(
        1.0,
        ge=-LORA_WEIGHT,
        le=LORA_WEIGHT,
        allow_inf_nan=False,
        description="1 is as trained, 0 not at all, below 0 the other way.",
    )


#: Its schema stands in place: the document of the API has no room for definitions beside a body.
LoraWish = Annotated[
    RequestedLora | Annotated[str, Field(min_length=1, max_length=LORA_NAME_CHARACTERS)],
    WithJsonSchema(
        {
            "anyOf": [
                RequestedLora.model_json_schema(),
                {"type": "string", "minLength": 1, "maxLength": LORA_NAME_CHARACTERS},
            ]
        }
    ),
]


class ImageGenerationRequest(BaseModel):
    """The body of `POST /v1/images/generations`. Null is the same as left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    prompt: str = Field(
        min_length=1,
        max_length=PROMPT_CHARACTERS,
        description="What to draw, in English or Chinese.",
        # Python's white space has five characters more than a schema's \s.
        json_schema_extra={"pattern": r"^[^\x00]*[^\s\x00\x1c-\x1f\x85][^\x00]*$"},
    )
    model: str | None = Field(
        None,
        description="An id or alias that /v1/models tells, or zimage-turbo or default; null: the default "
        "model.",
        json_schema_extra=_WITHOUT_NULL,
    )
    n: int | None = Field(None, ge=1, le=PICTURES, description="How many pictures, 1 to 10; null: 1.")
    size: str | None = Field(
        None,
        description="WIDTHxHEIGHT in pixels, such as 1024x1024; auto or null: the model's native size.",
        json_schema_extra={"pattern": "^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"},
    )
    quality: Literal["low", "medium", "high", "auto"] | None = Field(
        None,
        description="low: 4 steps, guidance off. medium: 8 steps, guidance off. high, auto, null: 8 steps "
        "at guidance 1.8. An explicit num_inference_steps or guidance_scale wins.",
    )
    response_format: str | None = Field(
        None,
        description="b64_json, or url: an address of this server where each picture can be fetched for a "
        "time, without a key; null: b64_json.",
        json_schema_extra={"enum": ["b64_json", "url", None]},
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        None, description="png, jpeg or webp; null: png."
    )
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp, 0 to 100; null: 100. png is lossless."
    )
    user: str | None = Field(None, max_length=512, description="Accepted and not used.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Accepted; there is no filter.")
    style: None = Field(None, description="Not offered; put the style into the prompt.")
    stream: bool | None = Field(
        None,
        description="true: server-sent events, the finished picture in the last; needs n 1. null: false.",
    )
    partial_images: int | None = Field(
        None,
        ge=0,
        le=PARTIAL_IMAGES,
        description="With stream, previews of the unfinished picture, 0 to 3; null: 0. A drawing of few "
        "steps sends fewer.",
    )
    negative_prompt: str | None = Field(
        None,
        max_length=PROMPT_CHARACTERS,
        description="What to keep out; works while guidance is on.",
        json_schema_extra=_WITHOUT_NULL,
    )
    num_inference_steps: int | None = Field(
        None,
        ge=1,
        description="Denoising steps; 4 to 12 look right.",
        json_schema_extra={"maximum": _MOST_STEPS},
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Conventional w: 1 or 0 is off (half the work); 1.5 to 2.5 look right.",
        json_schema_extra={"maximum": _MOST_GUIDANCE},
    )
    guidance_until: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="The part of the way from noise to picture up to which guidance acts; later steps take "
        "half the work, and the picture is a little another one. For Z-Image models. null: 1, all of it.",
    )
    seed: int | None = Field(
        None,
        ge=0,
        description="Same seed, same picture; picture i of n has seed + i. null: a new one.",
        json_schema_extra={"maximum": _MOST_SEED},
    )
    enhance: bool | Enhancer | None = Field(
        None,
        description="Let the server enhance the prompt: true, as it was set up; false, not at all; rules add "
        "quality words; where the server offers it a language model rewrites it: model, which is the text "
        "encoder, or endpoint. null: true.",
    )
    refine: bool | None = Field(
        None, description="Strengthen fine detail of the finished picture; null: where enhance is on."
    )
    loras: list[LoraWish] | None = Field(
        None,
        max_length=MOST_LORAS,
        description="LoRAs to draw with, up to 8: names of GET /v1/loras, each as an object with name and "
        "weight, or as text, NAME or NAME=WEIGHT. They take the place of those that the server was started "
        "with: null, those; [], none. All n pictures are drawn with them.",
    )
    receipt: bool | None = Field(
        None,
        description="Tell in the answer too how each picture was made, as its file does; null: false.",
    )
    exact: bool | None = Field(
        None,
        description="true: draw by the plain path, bit for bit as stock diffusers does; accelerated_by in "
        "the answer and the receipt tells what acts otherwise. null: false.",
    )


_WHOLE_NUMBERS = frozenset(
    name for name, field in ImageGenerationRequest.model_fields.items() if field.annotation == int | None
)


class PictureWarning(BaseModel):
    """Something to know about a picture that was drawn all the same."""

    code: str
    message: str


class PictureLora(BaseModel):
    """A LoRA that was in force: its file's name, how strongly it acted, how many modules it adapted."""

    name: str
    weight: float
    adapted_modules: int
    #: 32 hex digits of its content.
    digest: str = ""


class Picture(BaseModel):
    """One picture: OpenAI's fields, then how it was made."""

    b64_json: str | None = None
    #: Where it can be fetched, and until when in seconds since 1970, where that was asked for.
    url: str | None = None
    expires_at: int | None = None
    revised_prompt: str
    seed: int
    steps: int
    guidance: float
    seconds: float
    refined: bool
    #: The text in its pixels, where the operator has one put in.
    watermark: str | None = None
    warnings: list[PictureWarning]
    loras: list[PictureLora] = []
    #: What made it quicker and moved its last bits; [] where it was drawn by the plain path.
    accelerated_by: list[str] = []
    #: How it was made, whole, as its file tells it too; `/v1/images/reproduce` takes it.
    receipt: dict[str, Any] | None = None


class InputTokens(BaseModel):
    """What the input tokens consist of."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """OpenAI's account: tokens of the prompts that were read, and one for each 16x16 pixels drawn.

    An edit's picture is read in the size that is drawn, and counts as much once.
    """

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class EditedPicture(Picture):
    """One picture that was drawn from another: of `steps` the last `steps_run` were drawn."""

    strength: float
    steps_run: int


class ImagesResponse(BaseModel):
    """OpenAI's response to a generation."""

    created: int
    background: Literal["opaque"] = "opaque"
    output_format: str
    quality: str
    size: str
    model: str
    data: list[Picture]
    usage: Usage


class ErrorBody(BaseModel):
    """What stands under `error` in every refusal."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's error body."""

    error: ErrorBody


class ModelCard(BaseModel):
    """One entry of `GET /v1/models`: OpenAI's fields, then what a client needs to ask well.

    What is null is not known before the model was loaded once.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    #: Other names that requests may use.
    aliases: list[str] = []
    #: ready, loading, not_loaded (it is loaded when a request names it), or failed.
    state: State = "ready"
    #: While it is loading, the part of its files that has been read, 0 to 1, where that is known.
    progress: float | None = None
    #: Why it could not be loaded, and in how many seconds it is tried again at the earliest.
    reason: str | None = None
    retry_seconds: float | None = None
    family: str | None
    native_size: str | None
    size_multiple: int | None
    #: The longest side and the most steps that a request may ask for.
    max_side: int | None = None
    max_steps: int | None = None
    default_steps: int | None
    default_guidance: float | None
    dtype: str | None
    #: Why, where the program chose it; "" where it is the model's own or was asked for.
    dtype_because: str = ""
    #: 32 hex digits of the content of its files, and the commit where they came from a hub.
    digest: str | None = None
    revision: str | None = None


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoraCard(BaseModel):
    """One entry of `GET /v1/loras`: a LoRA that requests can name, or why they cannot."""

    #: What requests name it by.
    name: str
    object: Literal["lora"] = "lora"
    #: Whether the model takes it; `reason` says why not.
    fits: bool
    reason: str | None = None
    #: The families that take it, of the model that was asked about.
    families: list[str]
    #: What its tensors' names and sizes tell.
    made_for: str
    size_bytes: int
    #: 32 hex digits of its content, as in receipts.
    digest: str
    #: The author's words, where the file has them.
    trigger_words: list[str]
    usage_hint: str


class LoraList(BaseModel):
    """`GET /v1/loras`."""

    object: Literal["list"] = "list"
    data: list[LoraCard]


def to_lora_card(offer: LoraOffer, family: str) -> LoraCard:
    """A LoRA as clients list it; `family` is that of the model that it was looked at for."""
    return LoraCard(
        name=offer.name,
        fits=not offer.refusal,
        reason=offer.refusal or None,
        families=[] if offer.refusal else [family],
        made_for=offer.made_for,
        size_bytes=offer.size_bytes,
        digest=offer.digest,
        trigger_words=list(offer.trigger_words),
        usage_hint=offer.usage_hint,
    )


def read_json(body: bytes) -> dict[str, Any]:
    """The body as an object; raises RequestRefused where it is not one JSON object in UTF-8."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(
            f"The body must be JSON in UTF-8; byte {error.start} is not. Send it encoded as UTF-8.",
            code="invalid_json",
        )
    if not text.strip():
        _refuse(
            'The body is empty; expected a JSON object such as {"prompt": "a red circle"}.',
            code="invalid_json",
        )
    try:
        payload = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        _refuse(
            f"The body is not valid JSON: line {error.lineno}, column {error.colno}: {_lower(error.msg)}. "
            "Check the quotes and commas there.",
            code="invalid_json",
        )
    except RecursionError:
        _refuse("The body is nested too deeply; expected one flat JSON object.", code="invalid_json")
    except ValueError:
        _refuse(
            "The body holds a number with thousands of digits; send one within range.", code="invalid_json"
        )
    if not isinstance(payload, dict):
        _refuse(
            f"The body must be a JSON object, got {_kind(payload)}; "
            'send fields in braces, such as {"prompt": "a red circle"}.',
            code="invalid_json",
        )
    return payload


def parse(payload: Mapping[str, Any]) -> ImageGenerationRequest:
    """The checked request; raises RequestRefused with one sentence on the first thing that is wrong."""
    return parse_as(ImageGenerationRequest, payload)


def parse_as(wire_class: type[Wire], payload: Mapping[str, Any]) -> Wire:
    """As `parse`, for a request that has fields beside those of a generation."""
    wire = validated(wire_class, payload)
    for check in _CHECKS:
        check(wire)
    return wire


def validated(wire_class: type[Checked], payload: Mapping[str, Any]) -> Checked:
    """The fields of any request; raises RequestRefused on the first that is wrong in itself."""
    try:
        return wire_class.model_validate(_with_whole_numbers(payload))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt field explains the missing one, so it is told first.
        problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
        problem = problems[0]
        name = str(problem["loc"][0]) if problem["loc"] else None
        sentence = _sentence(name or "body", problem, wire_class)
        _refuse(sentence, name, _CODES.get(problem["type"], "invalid_value"))


def check_texts(wire: Any, *names: str) -> None:
    """Raise RequestRefused where one of these fields holds what no prompt can."""
    for name in names:
        _check_text(name)(wire)


def _with_whole_numbers(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with 7.0 as 7 where a whole number is wanted: in JSON they are one number."""
    return {
        name: int(value) if name in _WHOLE_NUMBERS and _is_whole(value) else value
        for name, value in payload.items()
    }


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def check_model(wire: ImageGenerationRequest, description: ModelDescription) -> None:
    """Raise RequestRefused (404) where another model is asked for than the one that is loaded."""
    if wire.model is not None and not is_default_model(wire.model, description):
        refuse_model(wire.model, description)


def is_default_model(name: str, description: ModelDescription) -> bool:
    """Whether `name` is the default model's id or one of the names that always mean it."""
    return name == description.id or name in MODEL_ALIASES


def refuse_model(name: str, description: ModelDescription, others: Sequence[str] = ()) -> NoReturn:
    """The 404 of OpenAI's API for a model that is not there; `others` are those beside the default one."""
    listed = f"; others are {', '.join(map(repr, others))}" if others else ""
    which = "the default one" if others else "the loaded one"
    _refuse(
        f"There is no model {_shown(name)} here; {which} is '{description.id}' "
        f"(or use '{MODEL_ALIASES[0]}', or leave model out){listed}.",
        "model",
        "model_not_found",
        status=404,
    )


def to_engine(wire: ImageGenerationRequest, enhance_by_default: bool = True) -> GenerationRequest:
    """The request in the engine's words; None stays the model's default."""
    quality = QUALITIES[wire.quality or "auto"]
    width, height = _size(wire.size)
    return GenerationRequest(
        prompt=wire.prompt,
        negative_prompt=wire.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=_first(wire.num_inference_steps, quality.steps),
        guidance_scale=_first(wire.guidance_scale, quality.guidance_scale),
        guidance_until=wire.guidance_until,
        seed=wire.seed,
        n=_first(wire.n, 1),
        enhance=bool(_first(wire.enhance, enhance_by_default)),
        enhancer=wire.enhance if isinstance(wire.enhance, str) else None,
        refine=wire.refine,
        exact=bool(wire.exact),
        loras=to_choices(wire),
        model=wire.model,
    )


def to_choices(wire: ImageGenerationRequest) -> tuple[LoraChoice, ...] | None:
    """The LoRAs in the engine's words; None where the request says nothing of them. Raises RequestRefused."""
    return None if wire.loras is None else tuple(map(_lora_choice, wire.loras))


def _lora_choice(wanted: RequestedLora | str) -> LoraChoice:
    if isinstance(wanted, RequestedLora):
        return LoraChoice(wanted.name, wanted.weight)
    name, equals, tail = wanted.rpartition("=")
    try:
        weight = float(tail) if equals and name else None
    except ValueError:
        weight = None
    if weight is None:
        return LoraChoice(wanted)
    if not -LORA_WEIGHT <= weight <= LORA_WEIGHT:
        _refuse(
            f"loras must have weights from {-LORA_WEIGHT} to {LORA_WEIGHT}, got {_shown(wanted)}; 1 is as "
            "trained.",
            "loras",
        )
    return LoraChoice(name, weight)


def to_encoding(wire: ImageGenerationRequest) -> ImageEncoding:
    """How the pictures are to be packed."""
    return ImageEncoding(wire.output_format or "png", _first(wire.output_compression, 100))


def to_response(
    wire: ImageGenerationRequest,
    encoding: ImageEncoding,
    pictures: tuple[bytes, ...],
    report: GenerationReport,
    links: Sequence[Link | None] | None = None,
    *,
    count_tokens: Callable[[str], int],
) -> dict[str, Any]:
    """The body of `ImagesResponse` as plain values: building models of megabytes would only cost time.

    `count_tokens` counts a text's tokens as the model does, for the usage.
    With `links`, one for each picture, it tells them and not the pictures; the picture itself, and a warning,
    where there is None because it could not be kept.
    """
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": encoding.format,
        "quality": quality_told(wire),
        "size": f"{report.width}x{report.height}",
        "model": report.model,
        "data": [
            {
                **_where(picture, None if links is None else links[number]),
                "revised_prompt": report.prompt,
                "seed": made.seed,
                "steps": report.num_inference_steps,
                "guidance": report.guidance_scale,
                **({"guidance_until": report.guidance_until} if report.guidance_until < 1 else {}),
                "seconds": round(made.seconds, 3),
                "refined": made.refine_seconds > 0,
                **({"watermark": made.watermark} if made.watermark else {}),
                "warnings": [
                    _warning(notice)
                    for notice in (*report.warnings, *made.warnings, *_not_kept(links, number))
                ],
                "loras": [asdict(lora) for lora in report.loras],
                "accelerated_by": list(report.accelerated_by),
                **_edit(report),
                **({"receipt": read_receipt(picture)} if wire.receipt else {}),
            }
            for number, (picture, made) in enumerate(zip(pictures, report.pictures, strict=True))
        ],
        "usage": _usage(report, count_tokens),
    }


def quality_told(wire: ImageGenerationRequest) -> str:
    """The word for the quality that was drawn with: of a response's, auto is none."""
    return "high" if wire.quality in (None, "auto") else wire.quality


def _usage(report: GenerationReport, count_tokens: Callable[[str], int]) -> dict[str, Any]:
    read = [report.prompt, *([report.negative_prompt] if report.guidance_scale > 1 else [])]
    text_tokens = sum(count_tokens(text) for text in read)
    tokens_a_picture = -(-report.width // TOKEN_SIDE_PX) * -(-report.height // TOKEN_SIDE_PX)
    drawn_tokens = tokens_a_picture * len(report.pictures)
    # The source is read in the size that is drawn, once for all pictures.
    image_tokens = 0 if report.edit is None else tokens_a_picture
    return {
        "input_tokens": text_tokens + image_tokens,
        "input_tokens_details": {"text_tokens": text_tokens, "image_tokens": image_tokens},
        "output_tokens": drawn_tokens,
        "total_tokens": text_tokens + image_tokens + drawn_tokens,
    }


def _edit(report: GenerationReport) -> dict[str, Any]:
    if report.edit is None:
        return {}
    return {"strength": report.edit.strength, "steps_run": report.edit.steps_run}


def _not_kept(links: Sequence[Link | None] | None, number: int) -> tuple[Notice, ...]:
    return (NOT_KEPT,) if links is not None and links[number] is None else ()


def _where(picture: bytes, link: Link | None) -> dict[str, Any]:
    if link is None:
        return {"b64_json": base64.b64encode(picture).decode("ascii")}
    return {"url": link.url, "expires_at": link.expires_at}


def to_model_card(
    state: ModelState, description: ModelDescription | None, created: int, owned_by: str = "local"
) -> ModelCard:
    """A model as OpenAI's clients list it; `description` with the defaults that hold now, None: not known."""
    card = ModelCard(
        id=state.id,
        created=created,
        owned_by=owned_by,
        aliases=list(state.aliases),
        state=state.state,
        progress=None if state.progress is None else round(state.progress, 3),
        reason=state.reason or None,
        retry_seconds=math.ceil(state.retry_seconds) or None,
        family=state.family or None,
        native_size=None,
        size_multiple=None,
        default_steps=None,
        default_guidance=None,
        dtype=state.dtype or None,
        digest=state.identity.digest or None,
        revision=state.identity.revision,
    )
    if description is None:
        return card
    return card.model_copy(
        update={
            "family": description.family,
            "native_size": f"{description.native_width}x{description.native_height}",
            "size_multiple": description.size_multiple,
            "max_side": description.max_side,
            "max_steps": description.max_steps,
            "default_steps": description.default_steps,
            "default_guidance": description.default_guidance_scale,
            "dtype": description.dtype,
            "dtype_because": description.dtype_because,
        }
    )


def _warning(notice: Notice) -> dict[str, str]:
    return {"code": notice.code, "message": notice.message}


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size is None or size == "auto":
        return None, None
    match = _SIZE.fullmatch(size)
    if match is None:
        _refuse(
            f"size must be WIDTHxHEIGHT in pixels, such as '512x512', or 'auto'; got {_shown(size)}.", "size"
        )
    return int(match[1]), int(match[2])


def _check_text(name: str) -> Callable[[ImageGenerationRequest], None]:
    def check(wire: ImageGenerationRequest) -> None:
        text = getattr(wire, name)
        if text is not None and "\0" in text:
            _refuse(f"{name} holds a null character at position {text.index(chr(0))}; take it out.", name)

    return check


def check_prompt(wire: Any) -> None:
    """Raise RequestRefused where the prompt holds nothing but white space."""
    if not wire.prompt.strip():
        _refuse("prompt holds nothing but white space; say what to draw.", "prompt")


def _check_size(wire: ImageGenerationRequest) -> None:
    _size(wire.size)


def _check_response_format(wire: ImageGenerationRequest) -> None:
    if wire.response_format not in (None, "b64_json", "url"):
        _refuse(
            f"response_format must be 'b64_json' or 'url', got {_shown(wire.response_format)}.",
            "response_format",
        )


def _check_compression(wire: ImageGenerationRequest) -> None:
    if (wire.output_format or "png") == "png" and wire.output_compression not in (None, 100):
        _refuse(
            f"output_compression {wire.output_compression} needs output_format 'jpeg' or 'webp': png is "
            "lossless. Choose one of these, or leave output_compression out.",
            "output_compression",
        )


def _check_loras(wire: ImageGenerationRequest) -> None:
    to_choices(wire)


def _check_stream(wire: ImageGenerationRequest) -> None:
    if wire.stream and wire.n not in (None, 1):
        _refuse(
            f"n must be 1 with stream true, got {wire.n}: a stream is of one picture, as with OpenAI. Send "
            "one request for each picture, or leave stream out.",
            "n",
        )
    if wire.stream and wire.response_format == "url":
        _refuse(
            "response_format must be 'b64_json' with stream true, as with OpenAI: the events carry the "
            "picture. Leave stream out to get a url.",
            "response_format",
        )
    if not wire.stream and wire.partial_images:
        _refuse(
            f"partial_images {wire.partial_images} needs stream true: one answer holds finished pictures "
            "alone. Send stream true, or leave partial_images out.",
            "partial_images",
        )


#: What pydantic's types cannot say, in the order in which it is told.
_CHECKS: tuple[Callable[[ImageGenerationRequest], None], ...] = (
    check_prompt,
    _check_text("prompt"),
    _check_text("negative_prompt"),
    _check_text("model"),
    _check_size,
    _check_response_format,
    _check_compression,
    _check_stream,
    _check_loras,
)

#: Why a field of OpenAI's cannot be honoured, and what to do instead.
_NOT_OFFERED = {
    "enhance": "enhance must be true, false, 'rules', 'model' or 'endpoint', got {got}.",
    "background": "background must be 'opaque' or 'auto': pictures have no transparency here; got {got}.",
    "loras": f"loras must be a list of up to {MOST_LORAS} names, each as text, such as 'style=0.8', or as an "
    "object with name and weight (from -10 to 10); got {got}.",
    "style": "style is not offered, got {got}; put the style into the prompt instead.",
}

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "string_too_long": "string_above_max_length",
}

#: Pydantic's kinds of problem as sentences; `{limit}` is the value that the field allows.
_SENTENCES = {
    "missing": "{name} is required; say what to draw.",
    "string_type": "{name} must be text, got {got}.",
    "string_unicode": "{name} holds half of a surrogate pair, which is no character; take it out.",
    "string_too_short": "{name} is empty; say what to draw.",
    "string_too_long": "{name} may have at most {limit:,} characters, got {length:,}; shorten it.",
    "int_type": "{name} must be a whole number, got {got}.",
    "int_from_float": "{name} must be a whole number, got {got}.",
    "float_type": "{name} must be a number, got {got}.",
    "finite_number": "{name} must be a finite number, got {got}.",
    "bool_type": "{name} must be true or false, got {got}.",
    "literal_error": "{name} must be one of {expected}; got {got}.",
    "greater_than": "{name} must be above {limit:g}, got {got}.",
    "greater_than_equal": "{name} must be at least {limit:g}, got {got}.",
    "less_than_equal": "{name} must be at most {limit:g}, got {got}.",
}


def _sentence(name: str, problem: Any, wire_class: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        return unknown_field(name, list(wire_class.model_fields))
    context = problem.get("ctx", {})
    value = problem["input"]
    sentence = _NOT_OFFERED.get(name) or _SENTENCES.get(problem["type"], "{name} cannot be used, got {got}.")
    return sentence.format(
        name=name,
        got=_shown(value),
        expected=context.get("expected"),
        limit=next((context[bound] for bound in ("gt", "ge", "le", "max_length") if bound in context), None),
        length=len(value) if isinstance(value, str) else 0,
    )


def unknown_field(name: str, known: list[str]) -> str:
    """What is told about a field that is none of the `known`."""
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean '{near[0]}'?" if near else "known fields are " + ", ".join(known) + "."
    return f"There is no field {_shown(name)}; {meant}"


def _shown(value: Any, limit: int = 60) -> str:
    """A value as its sender wrote it, cut to a length that fits a sentence."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=True) if not isinstance(value, str) else repr(value)
    text = text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text
    return text if len(text) <= limit else text[:limit] + "..."


_KINDS: dict[type, str] = {
    list: "an array",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return _KINDS[type(value)]


def _no_constant(name: str) -> NoReturn:
    _refuse(f"The body holds {name}, which is not JSON; send a finite number.", code="invalid_json")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            _refuse(f"The field {_shown(name)} stands twice; send it once.", name, "invalid_json")
        fields[name] = value
    return fields


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _first(chosen: Any, default: Any) -> Any:
    return default if chosen is None else chosen


def _refuse(
    message: str, param: str | None = None, code: str = "invalid_value", status: int = 400
) -> NoReturn:
    raise RequestRefused(message, param, code, status)
