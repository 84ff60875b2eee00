"""Which tensors a model class has for a config, and which config a set of tensors belongs to; knows no torch.

The shapes are those of diffusers 0.42 and transformers 5.23, whose real classes the tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zimage_engine.checkpoint.schemas.autoencoder_kl import AUTOENCODER_KL
from zimage_engine.checkpoint.schemas.clip import CLIP_TEXT, CLIP_TEXT_WITH_PROJECTION
from zimage_engine.checkpoint.schemas.pixart import PIXART
from zimage_engine.checkpoint.schemas.qwen3 import QWEN3
from zimage_engine.checkpoint.schemas.schema import (
    FETCH_CONFIG,
    Measured,
    Schema,
    Settings,
    Shape,
    TensorTable,
)
from zimage_engine.checkpoint.schemas.t5 import T5_ENCODER
from zimage_engine.checkpoint.schemas.unet import UNET
from zimage_engine.checkpoint.schemas.z_image import Z_IMAGE
from zimage_engine.errors import CheckpointDamaged, UnknownFamily

__all__ = [
    "FETCH_CONFIG",
    "SCHEMAS",
    "config_from_tensors",
    "expected_tensors",
    "has_schema",
    "optional_tensors",
]

SCHEMAS: Mapping[str, Schema] = {
    schema.class_name: schema
    for schema in (
        Z_IMAGE,
        AUTOENCODER_KL,
        QWEN3,
        UNET,
        CLIP_TEXT,
        CLIP_TEXT_WITH_PROJECTION,
        PIXART,
        T5_ENCODER,
    )
}


def has_schema(class_name: str) -> bool:
    """Whether the tensors of the diffusers or transformers class `class_name` are known here."""
    return class_name in SCHEMAS


def expected_tensors(class_name: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """The names and shapes of the class's `state_dict()` for the contents of its config.json.

    Raises CheckpointDamaged where a value has the wrong type, is out of bounds or contradicts another, and
    UnknownFamily where the class, or a variant of it that the config asks for, is not known here.
    """
    schema = _schema(class_name)
    table = TensorTable(class_name)
    schema.expect(Settings(class_name, config, schema.defaults), table)
    return table.shapes


def optional_tensors(class_name: str, config: Mapping[str, Any]) -> frozenset[str]:
    """Names that a file need not store, and that say nothing where it does.

    Two kinds: a tied weight, which is another tensor's double, and a buffer that the class computes anew
    (older versions stored position ids and sin-cos tables; these are not in `expected_tensors`).
    """
    return _schema(class_name).optional


def config_from_tensors(
    class_name: str, tensors: Mapping[str, Shape], constants: Mapping[str, Any]
) -> dict[str, Any]:
    """The config that the stored shapes imply, for a folder whose config.json is missing.

    `constants` are the values that shapes cannot tell, as the family knows them; all of them are carried
    over, except where the shapes say otherwise. Tensors that the class does not have are passed over: a
    caller that must know them compares with `expected_tensors`. Raises CheckpointDamaged where a deciding
    tensor or constant is missing, or where the tensors contradict one another.
    """
    schema = _schema(class_name)
    stored = {name.removeprefix(schema.stored_prefix): tuple(shape) for name, shape in tensors.items()}
    for keys in schema.untold:
        if not any(key in constants for key in keys):
            raise CheckpointDamaged(
                f"'{keys[0]}' of {class_name} cannot be told from the shapes of its tensors, and the family "
                "does not say it; fetch the component's config.json"
            )
    config = {
        **schema.stamp,
        **constants,
        **schema.measure(Measured(class_name, stored, constants)),
    }
    _check(class_name, expected_tensors(class_name, config), stored, schema.optional)
    return config


def _check(
    class_name: str, expected: Mapping[str, Shape], stored: Mapping[str, Shape], optional: frozenset[str]
) -> None:
    wrong = [
        f"tensor '{name}' is missing (expected shape {list(shape)})"
        if name not in stored
        else f"tensor '{name}' should have shape {list(shape)}, got {list(stored[name])}"
        for name, shape in expected.items()
        if (stored[name] != shape if name in stored else name not in optional)
    ]
    if wrong:
        others = f" and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
        raise CheckpointDamaged(
            f"the tensors do not add up to one {class_name}: {wrong[0]}{others}; fetch the weights again, "
            "or the component's config.json if it is meant to be so"
        )


def _schema(class_name: str) -> Schema:
    schema = SCHEMAS.get(class_name)
    if schema is None:
        raise UnknownFamily(
            f"the tensors of class '{class_name[:80]}' are not known here; known: {', '.join(SCHEMAS)}"
        )
    return schema
