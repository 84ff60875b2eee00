"""Previews show what a drawing points to, change nothing, and are left out where they cannot be made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.zimage_engine.sampling.faults import Rig
from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl, write_tiny_z_image
from zimage_engine.engine import Engine
from zimage_engine.families import FAMILIES, ValueRange
from zimage_engine.sampling import preview as preview_module
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.sampling.guard import StepWatch, guarded_scheduler
from zimage_engine.sampling.preview import clean_latents, preview_steps
from zimage_engine.types import GenerationRequest, StepProgress

STEPS = 4
WRITERS = {"z-image": write_tiny_z_image, "pixart": write_tiny_pixart, "sdxl": write_tiny_sdxl}
REQUEST = GenerationRequest(
    "a red circle", width=64, height=64, num_inference_steps=STEPS, seed=3, enhance=False
)


@pytest.fixture(scope="module", params=WRITERS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = WRITERS[request.param](tmp_path_factory.mktemp(request.param) / request.param)
    return Engine.load(folder, "cpu")


def drawn_with_previews(engine: Engine) -> tuple[Image.Image, list[Any]]:
    shown: list[Any] = []
    control = DrawingControl(on_latents=lambda _, latents: shown.append(engine.preview(latents)))
    return engine.generate(REQUEST, control=control).images[0], shown


def assert_same_but_for_rounding(one: Image.Image, other: Image.Image) -> None:
    difference = np.asarray(one, np.int16) - np.asarray(other, np.int16)
    assert np.abs(difference).max() <= 1


def test_the_picture_is_bit_for_bit_the_one_without_previews(engine: Engine) -> None:
    plain = engine.generate(REQUEST).images[0]
    image, shown = drawn_with_previews(engine)
    assert image.tobytes() == plain.tobytes()
    assert [preview.size for preview in shown] == [image.size] * STEPS
    assert len({preview.tobytes() for preview in shown}) == STEPS


@pytest.mark.parametrize("offload", ["model", "stream", "sequential", "disk"])
def test_weights_that_move_are_back_for_the_next_step(offload: str, tmp_path: Path) -> None:
    rig = Rig(write_tiny_z_image(tmp_path / "z-image"), "z-image", offload)
    shown: list[Any] = []

    def drawn(on_step: Callable[[int, torch.Tensor], None]) -> bytes:
        plan = rig.plan(guided=True)
        return rig.guarded.draw(plan, rig.encoded(True), 3, lambda: None, on_step).image.tobytes()

    plain = drawn(lambda *_: None)
    assert drawn(lambda _, latents: shown.append(preview_module.preview(rig.pipeline, latents))) == plain
    assert len(shown) == 8 and None not in shown


def test_the_last_steps_preview_is_the_picture_itself(engine: Engine) -> None:
    """By then there is no noise left; the pipeline decodes the same latents."""
    image, shown = drawn_with_previews(engine)
    assert_same_but_for_rounding(image, shown[-1])


def test_a_large_picture_has_a_small_preview(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    full = drawn_with_previews(engine)[1][-1]
    monkeypatch.setattr(preview_module, "LARGEST_SIDE", 2)
    small = drawn_with_previews(engine)[1][-1]
    side = 2 * full.width // latents_side(engine)
    assert small.size == (side, side) and side < full.width


def latents_side(engine: Engine) -> int:
    sides: list[int] = []
    control = DrawingControl(on_latents=lambda _, latents: sides.append(latents.shape[-1]))
    engine.generate(REQUEST, control=control)
    return sides[0]


def test_a_vae_with_its_own_mean_and_one_in_float16_are_decoded_as_the_pipeline_does(tmp_path: Path) -> None:
    engine = Engine.load(write_tiny_sdxl(tmp_path / "sdxl"), "cpu")
    vae = engine.pipeline.vae
    vae.register_to_config(latents_mean=[0.5, -0.5, 0.2, 0.0], latents_std=[2.0, 1.0, 0.5, 1.5])
    image, shown = drawn_with_previews(engine)
    assert_same_but_for_rounding(image, shown[-1])
    vae.to(torch.float16)
    image, shown = drawn_with_previews(engine)
    assert vae.dtype is torch.float16
    difference = np.asarray(image, np.int16) - np.asarray(shown[-1], np.int16)
    assert np.abs(difference).max() <= 3


def bad_vae(*_: Any) -> torch.Tensor:
    return torch.full((1, 3, 32, 32), math.nan)


def failing_vae(*_: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("no memory is left")


@pytest.mark.parametrize("fault", [bad_vae, failing_vae])
def test_a_preview_that_cannot_be_made_is_left_out_and_the_picture_goes_on(
    engine: Engine, fault: Any
) -> None:
    plain = engine.generate(REQUEST).images[0]
    shown: list[Any] = []

    def broken_preview(_progress: StepProgress, latents: torch.Tensor) -> None:
        handle = engine.pipeline.vae.decoder.register_forward_hook(fault)
        try:
            shown.append(engine.preview(latents))
        finally:
            handle.remove()

    image = engine.generate(REQUEST, control=DrawingControl(on_latents=broken_preview)).images[0]
    assert shown == [None] * STEPS
    assert image.tobytes() == plain.tobytes()


def test_a_vae_that_waits_elsewhere_is_not_fetched(engine: Engine) -> None:
    assert engine.preview(torch.zeros(1, 4, 4, 4, device="meta")) is None


class Known:
    """A denoiser that knows the clean latents, and answers in the words of a scheduler."""

    clean = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))

    def velocity(self, scheduler: Any, sample: torch.Tensor, index: int) -> torch.Tensor:
        return (sample - self.clean) / scheduler.sigmas[index]

    def noise_in_sigma(self, scheduler: Any, sample: torch.Tensor, index: int) -> torch.Tensor:
        return (sample - self.clean) / scheduler.sigmas[index]

    def noise_in_alpha(self, scheduler: Any, sample: torch.Tensor, index: int) -> torch.Tensor:
        kept = scheduler.alphas_cumprod[scheduler.timesteps[index]]
        return (sample - self.clean * kept**0.5) / (1 - kept) ** 0.5


ANSWERS = {
    "FlowMatchEulerDiscreteScheduler": Known.velocity,
    "EulerDiscreteScheduler": Known.noise_in_sigma,
    "EulerAncestralDiscreteScheduler": Known.noise_in_sigma,
    "LCMScheduler": Known.noise_in_alpha,
    "DPMSolverMultistepScheduler": Known.noise_in_alpha,
}


def test_every_scheduler_that_a_family_admits_is_known() -> None:
    assert set(ANSWERS) == {name for row in FAMILIES for name in row.components["scheduler"].class_names}


@pytest.mark.parametrize("name", ANSWERS)
def test_each_step_points_to_the_clean_latents(name: str) -> None:
    noise = torch.Generator().manual_seed(2)
    watch = StepWatch(
        residual=ValueRange(clip=1e9, trip=1e9, because="any"),
        generator=noise,
        before_step=lambda _: None,
        passed=lambda *_: None,
    )
    scheduler = guarded_scheduler(getattr(diffusers, name)(), watch)
    scheduler.set_timesteps(STEPS)
    sample = torch.randn((1, 4, 8, 8), generator=noise) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for index, timestep in enumerate(scheduler.timesteps):
        answer = ANSWERS[name](Known(), scheduler, sample, index)
        seeded = {} if name == "DPMSolverMultistepScheduler" else {"generator": noise}
        if name not in ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"):
            scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(answer, timestep, sample, **seeded, return_dict=False)[0]
        pointed_to = clean_latents(scheduler, sample)
        assert torch.allclose(pointed_to, Known.clean, atol=1e-3), f"step {index + 1}"


@pytest.mark.parametrize(
    ("steps", "previews", "expected"),
    [(8, 3, {2, 4, 6}), (8, 1, {4}), (4, 3, {1, 2, 3}), (2, 3, {1}), (1, 3, set()), (8, 0, set())],
)
def test_previews_are_spread_over_the_steps(steps: int, previews: int, expected: set[int]) -> None:
    assert preview_steps(steps, previews) == expected


def test_there_are_never_more_previews_than_asked_and_none_of_the_last_step() -> None:
    for steps, previews in itertools.product(range(1, 101), range(4)):
        chosen = preview_steps(steps, previews)
        assert len(chosen) == min(previews, steps - 1) and all(1 <= step < steps for step in chosen)
