"""Which of the LoRAs on offer a request means: by their names, or by tags in its prompt; knows no files."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Sequence

from zimage_engine.errors import InvalidRequest
from zimage_engine.types import LoraChoice, LoraOffer

#: How LoRA files end; a name may be given with it.
SUFFIX = ".safetensors"
#: So many may act at once.
MOST_LORAS = 8
#: So many names an error lists.
_NAMES_TOLD = 12

#: As other programs write it into prompts: `<lora:NAME>`, `<lora:NAME:WEIGHT>`, and for two parts of the
#: model `<lora:NAME:WEIGHT:WEIGHT>`, of which the first is taken.
_TAG = re.compile(
    r"\s*<lora:(?P<name>[^:<>]+)(:(?P<weight>[+-]?(\d{1,9}(\.\d{0,9})?|\.\d{1,9})))?(:[^<>]*)?>"
)


def name_key(name: str) -> str:
    """What two spellings of one name have in common: some systems keep accents as characters of their own."""
    return unicodedata.normalize("NFC", name)


def choices_in_prompt(prompt: str) -> tuple[str, tuple[LoraChoice, ...]]:
    """The prompt without the tags in it that name LoRAs, and what they name."""
    if "<lora:" not in prompt:
        return prompt, ()
    choices = tuple(
        LoraChoice(tag["name"].strip(), float(tag["weight"] or 1.0)) for tag in _TAG.finditer(prompt)
    )
    return _TAG.sub("", prompt).strip(), choices


def chosen(offers: Sequence[LoraOffer], choices: Sequence[LoraChoice]) -> tuple[LoraOffer, ...]:
    """The offers that `choices` name, in their order.

    Raises InvalidRequest for a name that is not offered, or twice, one that does not fit the model, a
    weight that is not finite, and more than MOST_LORAS.
    """
    if len(choices) > MOST_LORAS:
        raise InvalidRequest(
            f"loras may be at most {MOST_LORAS}, got {len(choices)}; leave some out", "loras"
        )
    by_name = {offer.name: offer for offer in offers}
    found: list[LoraOffer] = []
    for choice in choices:
        offer = by_name.get(name_key(choice.name)) or by_name.get(name_key(choice.name.removesuffix(SUFFIX)))
        if offer is None:
            raise InvalidRequest(_unknown(choice.name, list(by_name)), "loras")
        if offer.refusal:
            raise InvalidRequest(
                f"the LoRA {offer.name!r} cannot be used with this model: {offer.refusal}", "loras"
            )
        if not math.isfinite(choice.weight):
            raise InvalidRequest(
                f"the weight of the LoRA {offer.name!r} must be a finite number, got {choice.weight}; 1 is "
                "as trained",
                "loras",
            )
        if offer in found:
            raise InvalidRequest(
                f"the LoRA {offer.name!r} is named twice; name it once, with the sum of the weights", "loras"
            )
        found.append(offer)
    return tuple(found)


def _unknown(name: str, known: list[str]) -> str:
    shown = repr(name if len(name) <= 60 else name[:60] + "...")
    if not known:
        return f"there is no LoRA {shown}: none is offered here (setting lora_folder); leave loras out"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"there is no LoRA {shown}; did you mean {near[0]!r}?"
    more = f" and {len(known) - _NAMES_TOLD} more" if len(known) > _NAMES_TOLD else ""
    return f"there is no LoRA {shown}; there are {', '.join(map(repr, known[:_NAMES_TOLD]))}{more}"
