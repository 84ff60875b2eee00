from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from zimage_engine import families
from zimage_engine.checkpoint.features import read_features
from zimage_engine.errors import UnknownFamily
from zimage_engine.families import FAMILIES, GoodRange, family_named, identify
from zimage_engine.families.z_image import Z_IMAGE_TURBO


def test_family_names_are_unique() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_z_image_is_recognised_whatever_its_folder_is_called(copy_of_tiny_model) -> None:
    folder = copy_of_tiny_model()
    renamed = folder.rename(folder.parent / "sdxl-turbo-final(2)")
    assert identify(read_features(renamed)) is Z_IMAGE_TURBO


@pytest.mark.parametrize(
    ("file", "key", "value", "reason"),
    [
        ("model_index.json", "_class_name", "StableDiffusionXLPipeline", "'StableDiffusionXLPipeline'"),
        ("transformer/config.json", "_class_name", "FluxTransformer2DModel", "'FluxTransformer2DModel'"),
        ("transformer/config.json", "cap_feat_dim", None, "transformer.cap_feat_dim is nothing"),
        ("transformer/config.json", "siglip_feat_dim", 1152, "transformer.siglip_feat_dim is 1152"),
        ("scheduler/scheduler_config.json", "_class_name", "DDIMScheduler", "'DDIMScheduler'"),
    ],
)
def test_what_is_not_z_image_is_refused_with_the_reason(
    copy_of_tiny_model, file: str, key: str, value: object, reason: str
) -> None:
    folder = copy_of_tiny_model()
    config = json.loads((folder / file).read_text())
    config[key] = value
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(UnknownFamily) as raised:
        identify(read_features(folder))
    assert "z-image-turbo: " in str(raised.value)
    assert reason in str(raised.value)


def test_an_empty_folder_is_of_no_family(tmp_path: Path) -> None:
    with pytest.raises(UnknownFamily, match=r"model_index\._class_name is nothing"):
        identify(read_features(tmp_path))


def test_two_families_that_fit_are_both_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (Z_IMAGE_TURBO, replace(Z_IMAGE_TURBO, name="twin")))
    with pytest.raises(UnknownFamily, match=r"several families \(z-image-turbo, twin\)"):
        identify(read_features(tiny_model))


def test_a_family_is_found_by_name() -> None:
    assert family_named("z-image-turbo") is Z_IMAGE_TURBO
    with pytest.raises(
        UnknownFamily, match="no family 'zimage'; supported are: z-image-turbo, z-image, sdxl"
    ):
        family_named("zimage")


@pytest.mark.parametrize(
    ("w", "g"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.8, 0.8), (2.5, 1.5), (20.0, 19.0)]
)
def test_z_image_guidance_is_converted(w: float, g: float) -> None:
    assert Z_IMAGE_TURBO.to_pipeline_guidance(w) == pytest.approx(g)


@pytest.mark.parametrize(
    ("config", "multiple", "side"),
    [
        ({"axes_lens": [1536, 512, 512]}, 16, 2048),
        ({"axes_lens": [1536, 512, 512]}, 32, 2048),
        ({"axes_lens": [1536, 32, 64]}, 16, 512),
        ({}, 16, 2048),
    ],
)
def test_z_image_pictures_fit_the_positions_that_the_denoiser_has(config, multiple: int, side: int) -> None:
    assert Z_IMAGE_TURBO.max_side_px(config, multiple) == side


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"axes_lens": [1536, 512, 512]}, 512),
        ({"axes_lens": [514, 512, 512]}, 512),
        ({"axes_lens": [513, 512, 512]}, 480),
        ({"axes_lens": [130, 8, 8]}, 128),
        ({}, 512),
    ],
)
def test_z_image_captions_leave_a_position_for_the_picture(config, tokens: int) -> None:
    assert Z_IMAGE_TURBO.caption_tokens(config) == tokens


GOOD = GoodRange(4, 12, below="too few", above="too many")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "steps 3 is below the good range of 4 to 12: too few"),
        (4, None),
        (12, None),
        (13, "steps 13 is above the good range of 4 to 12: too many"),
    ],
)
def test_a_good_range_speaks_outside_of_it(value: float, message: str | None) -> None:
    notice = GOOD.notice("steps", value)
    assert (notice.message if notice else None) == message
    assert notice is None or notice.code == "steps_outside_range"
