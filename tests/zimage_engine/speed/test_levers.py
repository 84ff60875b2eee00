"""The table of levers: which exclude one another, which can be tried where, which sizes are alike."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zimage_engine.speed.levers import (
    LEVER_NAMES,
    LEVERS,
    LeverFacts,
    agreeing,
    compiles,
    lever_named,
    size_bucket,
    with_lever,
)

CARD = LeverFacts("cuda", has_blocks=True, builds_kernels=True)
PROCESSOR = LeverFacts("cpu", has_blocks=True, builds_kernels=True)


def test_a_lever_takes_the_place_of_the_one_of_its_group() -> None:
    assert with_lever(("attention_cudnn", "compiled"), "attention_flash") == ("attention_flash", "compiled")
    assert with_lever(("compiled",), "cuda_graphs") == ("cuda_graphs",)
    assert with_lever(("compiled",), "channels_last_vae") == ("channels_last_vae", "compiled")
    assert with_lever((), "compiled") == ("compiled",)


def test_compiled_code_comes_last_because_it_is_made_for_what_was_chosen_before() -> None:
    first = min(LEVER_NAMES.index(lever.name) for lever in LEVERS if lever.compiles)
    assert all(lever.compiles for lever in LEVERS[first:])


@pytest.mark.parametrize(
    ("facts", "can_be_tried"),
    [
        (CARD, set(LEVER_NAMES)),
        (PROCESSOR, {"channels_last_vae", "compiled"}),
        (LeverFacts("cpu", has_blocks=False, builds_kernels=True), {"channels_last_vae"}),
        (LeverFacts("cpu", has_blocks=True, builds_kernels=False), {"channels_last_vae"}),
        (
            LeverFacts("cuda", has_blocks=True, builds_kernels=False),
            set(LEVER_NAMES) - {"compiled", "cuda_graphs"},
        ),
        (LeverFacts("mps", has_blocks=True, builds_kernels=True), set()),
    ],
)
def test_what_can_be_tried_where(facts: LeverFacts, can_be_tried: set[str]) -> None:
    assert {lever.name for lever in LEVERS if lever.refusal(facts) is None} == can_be_tried


def test_a_missing_compiler_is_named() -> None:
    told = lever_named("compiled").refusal(LeverFacts("cpu", has_blocks=True, builds_kernels=False))
    assert told is not None and "g++" in told


@pytest.mark.parametrize(
    ("width_px", "height_px", "bucket"),
    [(1024, 1024, 1024), (1344, 768, 1024), (512, 512, 512), (768, 768, 724), (64, 64, 64), (256, 320, 256)],
)
def test_sizes_of_about_one_area_are_alike(width_px: int, height_px: int, bucket: int) -> None:
    assert size_bucket(width_px, height_px) == size_bucket(height_px, width_px) == bucket


def test_compiled_code_is_one_for_all_sizes() -> None:
    choices = {
        512: ("attention_flash", "compiled"),
        1024: ("attention_cudnn", "channels_last_vae", "compiled"),
        1448: ("channels_last_vae",),
        256: ("attention_cudnn", "cuda_graphs"),
        724: ("attention_cudnn", "compiled"),
    }
    assert agreeing(choices) == {
        256: ("attention_cudnn",),
        512: ("attention_flash",),
        724: ("attention_cudnn", "compiled"),
        1024: ("attention_cudnn", "channels_last_vae", "compiled"),
        1448: ("channels_last_vae",),
    }
    assert len({compiles(names) for names in agreeing(choices).values()} - {None}) == 1


def test_the_table_needs_no_torch() -> None:
    modules = "zimage_engine.speed.levers, zimage_engine.speed.remembered, zimage_engine.speed.warming"
    program = f"import sys, {modules}; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
