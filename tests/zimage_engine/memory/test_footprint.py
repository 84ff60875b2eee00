"""Footprints of published models against their known sizes, of tiny ones against what diffusers builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from zimage_engine.checkpoint.features import read_features
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.families import FAMILIES, family_named
from zimage_engine.memory.footprint import footprint_of, published_footprint, streamed_first


@pytest.mark.parametrize(
    ("family", "component", "parameters"),
    [
        ("z-image-turbo", "transformer", 6.155e9),
        ("z-image-turbo", "text_encoder", 4.022e9),
        ("z-image-turbo", "vae", 0.0838e9),
        ("z-image", "transformer", 6.155e9),
        ("sdxl", "unet", 2.567e9),
        ("sdxl", "text_encoder", 0.123e9),
        ("sdxl", "text_encoder_2", 0.695e9),
        ("sdxl", "vae", 0.0837e9),
        ("pixart-sigma", "transformer", 0.611e9),
        ("pixart-alpha-1024", "transformer", 0.611e9),
        ("pixart-sigma", "text_encoder", 4.762e9),
    ],
)
def test_published_sums_are_the_known_parameter_counts(
    family: str, component: str, parameters: float
) -> None:
    part = published_footprint(family).components[component]
    assert part.bytes / 2 == pytest.approx(parameters, rel=0.001)


def test_a_layer_of_z_image_turbo_is_362_mb_and_its_refiners_stay_with_the_rest() -> None:
    transformer = published_footprint("z-image-turbo").components["transformer"]
    assert list(transformer.blocks) == [f"layers.{number}" for number in range(30)]
    assert {round(size / 1e6) for size in transformer.blocks.values()} == {362}
    assert transformer.other_bytes / 1e9 == pytest.approx(1.46, abs=0.01)


def test_float8_halves_the_matrices_of_the_denoiser_alone() -> None:
    plain, small = (published_footprint("z-image-turbo", float8_storage=flag) for flag in (False, True))
    assert small.components["transformer"].bytes == pytest.approx(6.2e9, rel=0.01)
    assert small.components["text_encoder"] == plain.components["text_encoder"]
    assert small.components["transformer"].largest_module_bytes == (
        plain.components["transformer"].largest_module_bytes
    )


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_blocks_of_every_family_are_streamed_in_an_order_that_leaves_none_out(family: str) -> None:
    footprint = published_footprint(family)
    blocks = tuple(footprint.components[footprint.denoiser].blocks)
    order = streamed_first(blocks)
    assert len(blocks) > 20 and sorted(order) == sorted(blocks)


def test_the_pieces_of_a_unet_stand_in_the_order_of_their_call() -> None:
    blocks = list(published_footprint("sdxl").components["unet"].blocks)
    kept = [
        path.split(".transformer_blocks")[0] for path in blocks if path.startswith(("down_blocks.2", "mid"))
    ]
    assert list(dict.fromkeys(kept)) == [
        "down_blocks.2.resnets.0",
        "down_blocks.2.attentions.0",
        "down_blocks.2.resnets.1",
        "down_blocks.2.attentions.1",
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
    ]
    assert blocks[0].startswith("down_blocks.0") and blocks[-1].startswith("up_blocks.2")


def test_every_other_layer_leaves_first() -> None:
    assert streamed_first([f"layers.{number}" for number in range(8)]) == tuple(
        f"layers.{number}" for number in (0, 4, 2, 6, 1, 5, 3, 7)
    )
    assert streamed_first([]) == ()


@pytest.mark.parametrize("kind", ["z-image", "sdxl", "pixart"])
def test_a_folder_is_weighed_by_its_headers_as_it_lies_in_memory(kind: str, tmp_path: Path) -> None:
    import diffusers
    import torch

    from tests.zimage_engine.memory.residencies import WRITERS
    from zimage_engine import ModelLoaderAdapter

    folder = WRITERS[kind](tmp_path / "model")
    family = ModelLoaderAdapter(folder).family
    footprint = footprint_of(read_features(folder), family)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for name, part in footprint.components.items():
        module = getattr(pipeline, name)
        assert part.bytes == sum(parameter.nbytes for parameter in module.parameters()), name
        for path, size in part.blocks.items():
            assert size == sum(p.nbytes for p in module.get_submodule(path).parameters()), path


def test_a_component_that_shows_no_weights_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged, match="shows no weights of its transformer"):
        footprint_of(read_features(tmp_path), family_named("z-image-turbo"))
