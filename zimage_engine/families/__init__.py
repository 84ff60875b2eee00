"""What we know of each kind of model, and which of them a checkpoint is."""

from __future__ import annotations

from collections.abc import Callable

from zimage_engine.checkpoint.features import CheckpointFeatures
from zimage_engine.errors import UnknownFamily
from zimage_engine.families.family import ComponentRow, GoodRange, ModelFamily, ValueRange
from zimage_engine.families.pixart import PIXART_ALPHA_512, PIXART_ALPHA_1024, PIXART_SIGMA
from zimage_engine.families.sdxl import SDXL, SDXL_LCM, SDXL_TURBO
from zimage_engine.families.z_image import Z_IMAGE, Z_IMAGE_TURBO

__all__ = [
    "FAMILIES",
    "ComponentRow",
    "GoodRange",
    "ModelFamily",
    "ValueRange",
    "family_named",
    "identify",
]

FAMILIES: tuple[ModelFamily, ...] = (
    Z_IMAGE_TURBO,
    Z_IMAGE,
    SDXL,
    SDXL_TURBO,
    SDXL_LCM,
    PIXART_ALPHA_512,
    PIXART_ALPHA_1024,
    PIXART_SIGMA,
)


def identify(
    features: CheckpointFeatures,
    as_seen_by: Callable[[ModelFamily], CheckpointFeatures] | None = None,
) -> ModelFamily:
    """The one family whose fingerprint fits; UnknownFamily, with each family's reason, if none or several.

    `as_seen_by` gives the features that one family's fingerprint is to judge, where its own knowledge fills
    in what the files leave out; None: the same `features` for all.
    """
    failures = {
        family.name: family.fingerprint.first_failure(as_seen_by(family) if as_seen_by else features)
        for family in FAMILIES
    }
    fitting = [family for family in FAMILIES if failures[family.name] is None]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(family.name for family in fitting)
        raise UnknownFamily(f"{features.path} fits several families ({names}); say which with family=")
    reasons = "".join(f"\n  {name}: {failure}" for name, failure in failures.items())
    raise UnknownFamily(f"{features.path} is no model of a supported family:{reasons}")


def family_named(name: str) -> ModelFamily:
    """The family called `name`; UnknownFamily, with the names there are, where there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    names = ", ".join(family.name for family in FAMILIES)
    raise UnknownFamily(f"there is no family {name!r}; supported are: {names}")
