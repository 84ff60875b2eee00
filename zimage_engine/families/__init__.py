"""What we know of each kind of model, and which of them a checkpoint is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zimage_engine.checkpoint.features import CheckpointFeatures
from zimage_engine.errors import UnknownFamily
from zimage_engine.families.family import ComponentRow, Editing, GoodRange, ModelFamily, ValueRange
from zimage_engine.families.pixart import PIXART_ALPHA_512, PIXART_ALPHA_1024, PIXART_SIGMA
from zimage_engine.families.sdxl import SDXL, SDXL_LCM, SDXL_TURBO
from zimage_engine.families.z_image import Z_IMAGE, Z_IMAGE_TURBO

__all__ = [
    "FAMILIES",
    "ComponentRow",
    "Editing",
    "GoodRange",
    "ModelFamily",
    "ValueRange",
    "family_named",
    "fitting",
    "identify",
    "not_one_of",
]

#: The features as one family judges them.
AsSeenBy = Callable[[ModelFamily], CheckpointFeatures]

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


def identify(features: CheckpointFeatures) -> ModelFamily:
    """The one family whose fingerprint fits; UnknownFamily, with each family's reason, if none or several."""
    found = fitting(features)
    if len(found) == 1:
        return found[0]
    raise not_one_of(features, found)


def fitting(features: CheckpointFeatures, as_seen_by: AsSeenBy | None = None) -> tuple[ModelFamily, ...]:
    """All families whose fingerprint fits.

    `as_seen_by` gives the features that one family's fingerprint is to judge, where its own knowledge fills
    in what the files leave out; None: the same `features` for all.
    """
    return tuple(family for family in FAMILIES if _failure(family, features, as_seen_by) is None)


def not_one_of(
    features: CheckpointFeatures, found: Sequence[ModelFamily], as_seen_by: AsSeenBy | None = None
) -> UnknownFamily:
    """The error that tells of several families which fit, or of none and why not."""
    if found:
        names = ", ".join(family.name for family in found)
        return UnknownFamily(f"{features.path} fits several families ({names}); say which with family=")
    reasons = "".join(f"\n  {family.name}: {_failure(family, features, as_seen_by)}" for family in FAMILIES)
    return UnknownFamily(f"{features.path} is no model of a supported family:{reasons}")


def _failure(family: ModelFamily, features: CheckpointFeatures, as_seen_by: AsSeenBy | None) -> str | None:
    return family.fingerprint.first_failure(as_seen_by(family) if as_seen_by else features)


def family_named(name: str) -> ModelFamily:
    """The family called `name`; UnknownFamily, with the names there are, where there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    names = ", ".join(family.name for family in FAMILIES)
    raise UnknownFamily(f"there is no family {name!r}; supported are: {names}")
