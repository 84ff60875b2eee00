"""The receipt of a picture: how it was made, whole and in plain values, and what two of them have apart.

It travels in the picture's file and in answers, and is enough to ask for the same picture again. Knows no
HTTP, no Ray and no engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zimage_engine.errors import InvalidRequest
from zimage_engine.types import GenerationReport, GenerationRequest, GuardTrace, LoraChoice, SourcePicture

#: Raise it when a field means something else than before; a new field needs no new number.
FORMAT = 1


def receipt_of(report: GenerationReport, index: int) -> dict[str, Any]:
    """How picture `index` of the report was made; both prompts are those that were drawn."""
    picture, memory, made = report.pictures[index], report.memory, report.drawn_with
    return {
        "receipt": FORMAT,
        "model": {
            "id": report.model,
            "family": report.family,
            "digest": report.identity.digest,
            "revision": report.identity.revision,
            "repairs": list(report.identity.repairs),
        },
        "loras": [{"name": lora.name, "weight": lora.weight, "digest": lora.digest} for lora in report.loras],
        "prompt": report.prompt,
        "negative_prompt": report.negative_prompt,
        "seed": picture.seed,
        "steps": report.num_inference_steps,
        "guidance_scale": report.guidance_scale,
        **({"guidance_until": report.guidance_until} if report.guidance_until < 1 else {}),
        "width": report.width,
        "height": report.height,
        "scheduler": report.scheduler,
        "refined": picture.refine_seconds > 0,
        **({} if report.edit is None else {"edit": asdict(report.edit)}),
        **({"watermark": picture.watermark} if picture.watermark else {}),
        "guard": _guard(picture.guard),
        "device": report.device,
        "device_name": made.device_name,
        "threads": made.threads,
        "dtype": report.dtype,
        "offload": None if memory is None else memory.offload,
        "quantize": None if memory is None else memory.quantize,
        **({"accelerated_by": list(report.accelerated_by)} if report.accelerated_by else {}),
        "versions": dict(made.versions),
    }


def _guard(trace: GuardTrace) -> dict[str, Any]:
    """What was found and what helped; the times are left out, which are never the same."""
    return {
        "trips": [
            {
                "stage": trip.stage,
                "step": trip.step,
                "finding": trip.finding,
                "recovered_by": trip.recovered_by,
            }
            for trip in trace.trips
        ],
        "clipped_values": trace.clipped_values,
        "final_guidance_scale": trace.final_guidance_scale,
    }


@dataclass(frozen=True, slots=True)
class _Field:
    """A field that the picture is drawn from: its type, and whether it may be left out."""

    name: str
    types: tuple[type, ...]
    expected: str


_WHOLE, _NUMBER = (int,), (int, float)
_DRAWN_FROM = (
    _Field("prompt", (str,), "text"),
    _Field("negative_prompt", (str,), "text"),
    _Field("seed", _WHOLE, "a whole number"),
    _Field("steps", _WHOLE, "a whole number"),
    _Field("guidance_scale", _NUMBER, "a number"),
    _Field("width", _WHOLE, "a whole number"),
    _Field("height", _WHOLE, "a whole number"),
    _Field("refined", (bool,), "true or false"),
)


def check_receipt(receipt: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for a receipt that nothing can be drawn from."""
    if receipt.get("receipt") != FORMAT:
        raise InvalidRequest(
            f"the receipt must have the field receipt: {FORMAT}, got {_shown(receipt.get('receipt'))}; it is "
            "none of this program's, or of a newer version",
            "receipt",
        )
    if receipt.get("cut"):
        raise InvalidRequest(
            "the receipt has no prompt: it was too long for the file, which is a JPEG; draw it from its own "
            "settings",
            "receipt",
        )
    for each in _DRAWN_FROM:
        value = receipt.get(each.name)
        if not isinstance(value, each.types) or (isinstance(value, bool) and bool not in each.types):
            raise InvalidRequest(
                f"the receipt's {each.name} must be {each.expected}, got {_shown(value)}; give it as it was "
                "written",
                "receipt",
            )
    try:
        # What an answer or a file that tells of it could not hold; read as JSON, 1e999 is infinite.
        json.dumps(receipt, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(
            "the receipt holds a number that is not finite, half a character or the like; give it as it was "
            "written",
            "receipt",
        ) from error
    edit = receipt.get("edit")
    if edit is not None and not (
        isinstance(edit, Mapping) and isinstance(edit.get("strength"), (int, float))
    ):
        raise InvalidRequest(
            f"the receipt's edit must be an object with a strength, got {_shown(edit)}; give it as it was "
            "written",
            "receipt",
        )


def is_of_edit(receipt: Mapping[str, Any]) -> bool:
    """Whether the picture was drawn from another one, which has to be given."""
    return receipt.get("edit") is not None


def request_of(receipt: Mapping[str, Any], source: SourcePicture | None = None) -> GenerationRequest:
    """What draws the picture of a receipt again; `source` is the picture that it was drawn from, if there
    was one.

    Raises InvalidRequest for a receipt that nothing can be drawn from, or without its source.
    """
    check_receipt(receipt)
    if is_of_edit(receipt) and source is None:
        raise InvalidRequest(
            "the picture was drawn from another picture, which its receipt does not hold; give that as "
            "source, "
            "with its mask if there was one",
            "source",
        )
    return GenerationRequest(
        prompt=receipt["prompt"],
        negative_prompt=receipt["negative_prompt"],
        width=receipt["width"],
        height=receipt["height"],
        num_inference_steps=receipt["steps"],
        guidance_scale=receipt["guidance_scale"],
        guidance_until=receipt.get("guidance_until"),
        seed=receipt["seed"],
        enhance=False,
        refine=receipt["refined"],
        exact=not receipt.get("accelerated_by"),
        image=source if is_of_edit(receipt) else None,
        strength=receipt["edit"]["strength"] if is_of_edit(receipt) else None,
    )


def loras_of(receipt: Mapping[str, Any]) -> tuple[LoraChoice, ...]:
    """The LoRAs that the picture was drawn with, as a request names them. Raises InvalidRequest."""
    told = receipt.get("loras") or []
    try:
        return tuple(LoraChoice(str(each["name"]), float(each["weight"])) for each in told)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"the receipt's loras must each have a name and a weight, got {_shown(told)}; give it as it was "
            "written",
            "receipt",
        ) from error


@dataclass(frozen=True, slots=True)
class Difference:
    """A part of two receipts that is not the same: what it was, and what it is now."""

    name: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.then)} then, {_shown(self.now)} now"


#: What bits depend on, the likeliest cause first; a name with a dot is a field of a field.
_COMPARED = (
    "model.digest",
    "model.family",
    "model.repairs",
    "loras",
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "guidance_scale",
    "guidance_until",
    "width",
    "height",
    "scheduler",
    "refined",
    "edit",
    "watermark",
    "dtype",
    "quantize",
    "accelerated_by",
    "device",
    "device_name",
    "threads",
    "offload",
    "versions.zimage-turbo",
    "versions.torch",
    "versions.diffusers",
    "versions.transformers",
    "guard",
)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Difference, ...]:
    """What two receipts have apart of all that a picture's bits depend on.

    Two models whose content is not known are told apart by their names.
    """
    named = ("model.id", *_COMPARED[1:]) if not _at(then, "model.digest") else _COMPARED
    pairs = ((name, _at(then, name), _at(now, name)) for name in named)
    return tuple(Difference(name, before, after) for name, before, after in pairs if before != after)


def _at(receipt: Mapping[str, Any], name: str) -> Any:
    value: Any = receipt
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any, limit: int = 100) -> str:
    text = "nothing" if value is None else repr(value) if isinstance(value, str) else str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else text[:limit] + "..."
