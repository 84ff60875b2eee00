"""What the command line calls things where the engine and the settings have names of their own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

#: The engine's names, none of which is a word of a sentence, and the options of `generate`.
OPTION_OF_FIELD: Mapping[str, str] = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_until": "--guidance-until",
    "negative_prompt": "--negative",
}
#: Fields whose names are words too: they are renamed only where a sentence begins with them.
OPTION_OF_SUBJECT: Mapping[str, str] = {
    "width": "the width of --size",
    "height": "the height of --size",
    "seed": "--seed",
}
#: The settings that `launch` takes as options.
OPTION_OF_SETTING: Mapping[str, str] = {
    "model": "--model",
    "family": "--family",
    "base": "--base",
    "text_encoder": "--text-encoder",
    "vae": "--vae",
    "loras": "--lora",
    "lora_folder": "--lora-folder",
    "models": "--also",
    "dtype": "--dtype",
    "offload": "--offload",
    "vram": "--vram",
    "float8": "--float8",
    "embedding_cache": "--embedding-cache",
    "quantize": "--quantize",
    "exact": "--exact",
    "port": "--port",
    "host": "--host",
    "device": "--device",
    "cpu_threads": "--threads",
    "num_replicas": "--replicas",
    "otlp_endpoint": "--otlp-endpoint",
}

_FIELD = re.compile(rf"\b({'|'.join(OPTION_OF_FIELD)})\b")
_SUBJECT = re.compile(rf"({'|'.join(OPTION_OF_SUBJECT)}) (?=must|counts)")


def with_option_names(message: str) -> str:
    """A sentence of the engine with the names of `generate`'s options in place of its fields'."""
    renamed = _FIELD.sub(lambda found: OPTION_OF_FIELD[found[0]], message)
    return _SUBJECT.sub(lambda found: OPTION_OF_SUBJECT[found[1]] + " ", renamed, count=1)


def with_launch_options(message: str, typed: Collection[str]) -> str:
    """A sentence about settings; those `typed` on the command line have the names of their options."""

    def option(found: re.Match[str]) -> str:
        name = found[1]
        return OPTION_OF_SETTING[name] if name in typed and name in OPTION_OF_SETTING else found[0]

    return re.sub(r"\bsetting (\w+)", option, message)
