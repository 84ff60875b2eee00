"""Sketches of every step: a linear map where it tells enough of the VAE, else now and then a decoding."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch.nn import functional

from tests.zimage_engine.sampling.faults import Rig
from tests.zimage_engine.tiny_models import write_tiny_z_image
from zimage_engine.engine import Engine
from zimage_engine.sampling import sketch as sketch_module
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.sampling.sketch import Sketcher, fitted, mapped
from zimage_engine.types import GenerationRequest

STEPS = 4
REQUEST = GenerationRequest(
    "a red circle", width=64, height=64, num_inference_steps=STEPS, seed=3, enhance=False
)
FIT_SECONDS = 60


class MeansVae(ModelMixin, ConfigMixin):
    """A VAE of which a linear map tells all: its cells are mixtures of the mean colours of eight pixels."""

    @register_to_config
    def __init__(
        self, block_out_channels: tuple[int, ...] = (1, 1, 1, 1), scaling_factor: float = 0.5
    ) -> None:
        super().__init__()
        mix = [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, -0.5, 1.0], [1.0, 1.0, 1.0]]
        self.mix = torch.nn.Parameter(torch.tensor(mix))

    def encode(self, pictures: torch.Tensor) -> AutoencoderKLOutput:
        means = functional.avg_pool2d(pictures, 8)
        latents = torch.einsum("bchw,lc->blhw", means, self.mix)
        moments = torch.cat([latents, torch.zeros_like(latents)], 1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
        means = torch.einsum("blhw,cl->bchw", latents, torch.linalg.pinv(self.mix))
        decoded = functional.interpolate(means, scale_factor=8.0)
        return DecoderOutput(decoded) if return_dict else (decoded,)


@pytest.fixture(autouse=True)
def no_fits_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch_module, "_LOOKS", {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_z_image(tmp_path_factory.mktemp("sketch") / "z-image")


def drawn_with_sketches(engine: Engine) -> tuple[Image.Image, list[Image.Image | None]]:
    shown: list[Image.Image | None] = []
    control = DrawingControl(on_latents=lambda _, latents: shown.append(engine.sketch(latents)))
    return engine.generate(REQUEST, control=control).images[0], shown


def test_a_linear_vae_is_told_wholly_and_its_colours_are_right() -> None:
    vae = MeansVae()
    look = fitted(vae)
    assert look.r_squared > 0.999 and look.is_good
    colours = torch.tensor([[1.0, -1.0, -1.0], [0.0, 0.5, -0.5]])
    picture = colours.T.repeat_interleave(8, 1)[None, :, None].expand(1, 3, 8, 16)
    latents = vae.encode(picture).latent_dist.mode() * vae.config.scaling_factor
    pipeline = SimpleNamespace(vae=vae, scheduler=SimpleNamespace())
    shown = mapped(look, pipeline, latents)
    assert shown is not None and shown.size == (2, 1)
    expected = (colours / 2 + 0.5) * 255
    told = torch.tensor([shown.getpixel((0, 0)), shown.getpixel((1, 0))])
    assert (told - expected).abs().max() <= 2


def test_the_fit_is_the_same_each_time() -> None:
    assert torch.equal(fitted(MeansVae()).weight, fitted(MeansVae()).weight)


def test_the_picture_is_bit_for_bit_the_one_without_sketches_and_no_random_number_is_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(folder, "cpu")
    plain = engine.generate(REQUEST).images[0]
    before = torch.get_rng_state()
    image, shown = drawn_with_sketches(engine)
    assert image.tobytes() == plain.tobytes()
    assert shown[0] is not None
    look = engine._sketcher.wait(FIT_SECONDS)
    assert look is not None and not look.is_good, "random weights are no linear map"
    monkeypatch.setattr(sketch_module, "LEAST_R_SQUARED", -math.inf)
    image, shown = drawn_with_sketches(engine)
    assert image.tobytes() == plain.tobytes()
    side = image.width // (2 ** (len(engine.pipeline.vae.config.block_out_channels) - 1))
    assert [each and each.size for each in shown] == [(side, side)] * STEPS
    assert torch.equal(torch.get_rng_state(), before)


def test_models_with_the_same_vae_share_one_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[Any] = []

    def counted(vae: Any) -> Any:
        fits.append(vae)
        return fitted(vae)

    monkeypatch.setattr(sketch_module, "fitted", counted)
    looks = []
    for _ in range(2):
        engine = Engine.load(folder, "cpu")
        drawn_with_sketches(engine)
        looks.append(engine._sketcher.wait(FIT_SECONDS))
    assert looks[0] is looks[1] is not None and len(fits) == 1


@pytest.mark.parametrize("offload", ["model", "stream", "sequential", "disk"])
def test_weights_that_move_are_where_the_next_step_wants_them(
    offload: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sketch_module, "LEAST_R_SQUARED", -math.inf)
    rig = Rig(folder, "z-image", offload)

    def drawn(on_step: Callable[[int, torch.Tensor], None]) -> bytes:
        plan = rig.plan(guided=True)
        return rig.guarded.draw(plan, rig.encoded(True), 3, lambda: None, on_step).image.tobytes()

    plain = drawn(lambda *_: None)
    sketcher, shown = Sketcher(), []
    for _ in range(2):
        assert drawn(lambda _, latents: shown.append(sketcher.sketch(rig.pipeline, latents))) == plain
        sketcher.wait(FIT_SECONDS)
    assert shown[-1] is not None


def test_decoded_sketches_take_a_small_share_of_the_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes one second here, and decoding a tenth of one."""
    engine = Engine.load(folder, "cpu")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sketch_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(sketch_module, "DECODING_SHARE", 0.05)
    decoded = sketch_module.preview

    def slow(*arguments: Any) -> Image.Image | None:
        clock.now += 0.1
        return decoded(*arguments)

    monkeypatch.setattr(sketch_module, "preview", slow)
    shown: list[bool] = []

    def on_latents(_: Any, latents: torch.Tensor) -> None:
        shown.append(engine.sketch(latents) is not None)
        clock.now += 1.0

    engine.generate(REQUEST, control=DrawingControl(on_latents=on_latents))
    assert shown == [True, False, True, False]


def test_a_vae_that_cannot_be_copied_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(_vae: Any) -> Any:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr(sketch_module, "_copy", impossible)
    engine = Engine.load(folder, "cpu")
    _, shown = drawn_with_sketches(engine)
    assert shown[0] is not None
    assert engine._sketcher.wait(FIT_SECONDS) is None


def test_latents_that_are_not_finite_are_not_shown() -> None:
    vae = MeansVae()
    pipeline = SimpleNamespace(vae=vae, scheduler=SimpleNamespace())
    assert mapped(fitted(vae), pipeline, torch.full((1, 4, 2, 2), math.nan)) is None
