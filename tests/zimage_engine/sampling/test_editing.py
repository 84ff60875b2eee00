"""Pictures drawn from pictures: by tiny pipelines bit for bit, by the demo model as to what is on them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests.zimage_engine.sampling.faults import OFFLOADS
from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl, write_tiny_z_image
from zimage_engine import Engine, GenerationRequest
from zimage_engine.demo.detector import detect
from zimage_engine.errors import GuardExhausted, InvalidRequest
from zimage_engine.families import FAMILIES, family_named
from zimage_engine.sampling.editing import SOURCES, prepared
from zimage_engine.sampling.editing_plan import fitted_size, steps_run
from zimage_engine.sampling.plan import resolve
from zimage_engine.types import SourcePicture

WRITERS: dict[str, Callable[[Path], Path]] = {
    "z-image-turbo": write_tiny_z_image,
    "sdxl": write_tiny_sdxl,
    "sdxl-lcm": lambda folder: write_tiny_sdxl(folder, lcm=True),
    "sdxl-turbo": lambda folder: write_tiny_sdxl(folder, turbo=True),
}
SIZE = (64, 64)
ASKED = GenerationRequest(
    prompt="A red circle", seed=11, num_inference_steps=6, guidance_scale=1.8, enhance=False
)


def source_of(picture: Image.Image, mask: Image.Image | None = None) -> SourcePicture:
    masked = None if mask is None else mask.tobytes()
    return SourcePicture(picture.width, picture.height, picture.tobytes(), masked)


def some_picture(size: tuple[int, int] = SIZE) -> Image.Image:
    colours = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def some_mask(size: tuple[int, int] = SIZE) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle([size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4], fill=255)
    return mask


def values(picture: Image.Image) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(picture).astype(np.int64)


@pytest.fixture(scope="module", params=WRITERS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = WRITERS[request.param](tmp_path_factory.mktemp("models") / "tiny")
    engine = Engine.load(folder, device="cpu")
    assert engine.description.family == request.param
    return engine


@pytest.fixture(params=["whole", "masked"])
def asked(request: pytest.FixtureRequest) -> GenerationRequest:
    mask = some_mask() if request.param == "masked" else None
    return replace(ASKED, image=source_of(some_picture(), mask), strength=0.7)


def test_the_same_request_gives_the_same_picture_and_leaves_no_trace(
    engine: Engine, asked: GenerationRequest
) -> None:
    plain = replace(ASKED, width=SIZE[0], height=SIZE[1])
    before = engine.generate(plain).images[0]
    first, second = engine.generate(asked).images[0], engine.generate(replace(asked, n=2)).images
    other_seed = engine.generate(replace(asked, seed=12)).images[0]
    assert first.tobytes() == second[0].tobytes()
    assert other_seed.tobytes() == second[1].tobytes() != first.tobytes()
    assert engine.generate(plain).images[0].tobytes() == before.tobytes()
    assert "encode" not in vars(engine.pipeline.vae) and "decode" not in vars(engine.pipeline.vae)


def test_the_report_tells_the_steps_that_were_drawn(engine: Engine, asked: GenerationRequest) -> None:
    steps = []
    result = engine.generate(asked, on_step=lambda told: steps.append((told.step, told.steps)))
    report = result.report
    assert report.edit is not None
    assert (report.edit.strength, report.edit.steps_run) == (0.7, 4)
    assert report.edit.masked == (asked.image is not None and asked.image.mask is not None)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (report.width, report.height, report.num_inference_steps) == (*SIZE, 6)


def test_outside_of_the_mask_every_pixel_is_the_sources(engine: Engine) -> None:
    picture, mask = some_picture(), some_mask()
    asked = replace(ASKED, image=source_of(picture, mask), refine=True)
    changed = np.abs(values(engine.generate(asked).images[0]) - values(picture)).max(axis=-1)
    assert changed[np.asarray(mask) == 0].max() == 0
    assert changed[np.asarray(mask) == 255].max() > 20


@pytest.mark.parametrize(
    ("box", "value"),
    [((17, 0, 22, 63), 255), ((16, 33, 63, 38), 127 + 1), ((9, 9, 9, 63), 255)],
    ids=["upright", "lying and faint", "one pixel wide"],
)
def test_a_thin_stroke_off_the_latents_grid_is_drawn(
    engine: Engine, box: tuple[int, int, int, int], value: int
) -> None:
    picture, mask = some_picture(), Image.new("L", SIZE, 0)
    ImageDraw.Draw(mask).rectangle(box, fill=value)
    source = prepared(source_of(picture, mask), *SIZE)
    cells = source.cells(8)
    assert cells is not None
    assert np.asarray(cells)[np.asarray(mask) > 0].min() == 255
    taken = np.asarray(cells)[::8, ::8]
    assert (np.asarray(cells) == taken.repeat(8, axis=0).repeat(8, axis=1)).all()
    assert taken.any() and not taken.all()
    one, other = engine.generate(replace(ASKED, n=2, image=source_of(picture, mask))).images
    assert np.abs(values(one) - values(picture)).max(axis=-1)[np.asarray(mask) == 0].max() == 0
    assert one.tobytes() != other.tobytes(), "what is drawn depends on the seed, what the VAE makes does not"


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_step_that_is_drawn_again_gives_the_undisturbed_picture(
    engine: Engine, asked: GenerationRequest, step: int
) -> None:
    undisturbed = engine.generate(asked).images[0]
    denoiser = getattr(engine.pipeline, family_named(engine.description.family).denoiser)
    calls = 0

    def spoil(module: torch.nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        tensor = output[0][0] if isinstance(output[0], list | tuple) else output[0]
        if calls == step + 1:
            tensor.view(-1)[0] = float("nan")
        return output

    hook = denoiser.register_forward_hook(spoil)
    try:
        result = engine.generate(asked)
    finally:
        hook.remove()
    (trip,) = (each for each in result.report.pictures[0].guard.trips if each.stage != "picture")
    assert (trip.stage, trip.step, trip.recovered_by) == ("denoise", step + 1, "same_inputs")
    assert result.images[0].tobytes() == undisturbed.tobytes()


def test_a_bad_value_of_the_encoded_picture_is_recovered_from_or_told(
    engine: Engine, asked: GenerationRequest
) -> None:
    undisturbed = engine.generate(asked).images[0]
    spoiled = 0

    def spoil(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal spoiled
        spoiled += 1
        return output if spoiled > times else output * float("nan")

    hook = engine.pipeline.vae.encoder.register_forward_hook(spoil)
    try:
        times = 1
        result = engine.generate(asked)
        times = 10**6
        with pytest.raises(GuardExhausted, match="the encoded picture to draw from held nan") as caught:
            engine.generate(asked)
    finally:
        hook.remove()
    (trip,) = (each for each in result.report.pictures[0].guard.trips if each.stage != "picture")
    assert (trip.stage, trip.recovered_by) == ("source", "same_inputs")
    assert result.images[0].tobytes() == undisturbed.tobytes()
    assert caught.value.trips[-1].stage == "source"


@pytest.mark.parametrize("times", [2, 3])
def test_memory_that_is_short_for_the_encoded_picture_is_the_vaes(
    tiny_model: Path, asked: GenerationRequest, times: int
) -> None:
    engine = Engine.load(tiny_model, device="cpu")
    undisturbed = engine.generate(asked).images[0]
    with _short_of_memory(engine.pipeline.vae.encoder, range(1, times + 1)):
        result = engine.generate(asked)
    assert result.report.memory is not None
    assert result.report.memory.oom_recoveries == ("freed", *["tiled"] * (times - 1))
    assert result.images[0].size == undisturbed.size


def test_what_was_met_in_encoding_is_told_once_also_where_memory_runs_out_behind_it(
    tiny_model: Path, asked: GenerationRequest
) -> None:
    engine = Engine.load(tiny_model, device="cpu")
    vae = engine.pipeline.vae
    with _spoiled(vae.encoder, 1), _short_of_memory(vae.decoder, [1]):
        result = engine.generate(replace(asked, n=2))
    assert result.report.memory is not None
    assert result.report.memory.oom_recoveries == ("freed",)
    told = [[trip.stage for trip in picture.guard.trips] for picture in result.report.pictures]
    assert [stages.count("source") for stages in told] == [1, 0]


def test_where_the_encoded_picture_is_given_up_what_the_prompts_took_is_told_too(
    tiny_model: Path, asked: GenerationRequest
) -> None:
    engine = Engine.load(tiny_model, device="cpu")
    with (
        _spoiled(engine.pipeline.text_encoder, 1),
        _spoiled(engine.pipeline.vae.encoder, 10**6),
        pytest.raises(GuardExhausted) as caught,
    ):
        engine.generate(asked)
    assert [trip.stage for trip in caught.value.trips][:2] == ["encode", "source"]


@contextmanager
def _spoiled(part: torch.nn.Module, times: int) -> Iterator[None]:
    """The first `times` outputs of that part are NaN."""
    calls = count(1)

    def spoil(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if next(calls) > times:
            return output
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda value: value * float("nan"), output)

    hook = part.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _short_of_memory(part: torch.nn.Module, calls: Iterable[int]) -> Iterator[None]:
    """That part runs out of memory in those of its calls, from 1."""
    failing, numbers = set(calls), count(1)

    def fail(*_: Any) -> None:
        if next(numbers) in failing:
            raise torch.OutOfMemoryError("out of memory")

    hook = part.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def test_a_whole_picture_is_the_stock_pipelines(engine: Engine) -> None:
    """Given the VAE's mean as latents, the stock class draws the same without a guard and a plan."""
    import diffusers

    family = family_named(engine.description.family)
    assert family.editing is not None
    picture = some_picture()
    asked = replace(ASKED, image=source_of(picture), strength=0.5, refine=False)
    ours = engine.generate(asked).images[0]
    options = {"add_watermarker": False} if "sdxl" in family.name else {}
    stock = getattr(diffusers, family.editing.image_to_image)(**engine.pipeline.components, **options)
    stock.set_progress_bar_config(disable=True)
    pixels = torch.from_numpy(values(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = stock.vae.encode(pixels.to(stock.vae.dtype)).latent_dist.mode()
    config = stock.vae.config
    latents = (latents - (config.shift_factor or 0.0)) * config.scaling_factor
    stock.image_processor.register_to_config(vae_latent_channels=latents.shape[1])
    size = {} if options else {"width": SIZE[0], "height": SIZE[1]}
    theirs = stock(
        prompt=ASKED.prompt,
        negative_prompt=None if options else "",
        image=latents,
        strength=0.5,
        num_inference_steps=6,
        guidance_scale=family.to_pipeline_guidance(1.8),
        generator=torch.Generator("cpu").manual_seed(11),
        **size,
    ).images[0]
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("way", ["model", "stream", "sequential", "disk"])
def test_where_the_weights_lie_does_not_matter(
    tiny_model: Path, tmp_path: Path, asked: GenerationRequest, way: str
) -> None:
    resident = Engine.load(tiny_model, device="cpu").generate(asked).images[0]
    engine = Engine.load(tiny_model, device="cpu")
    OFFLOADS[way](engine, tmp_path)
    assert engine.generate(asked).images[0].tobytes() == resident.tobytes()


def test_weights_are_not_held_twice(engine: Engine, asked: GenerationRequest) -> None:
    from zimage_engine.sampling.editing import EditingPipeline

    family = family_named(engine.description.family)
    made = EditingPipeline(engine.pipeline, family, masked=True).pipeline
    for name, component in engine.pipeline.components.items():
        assert made.components[name] is component


def test_edits_leave_no_class_behind(engine: Engine) -> None:
    from zimage_engine.sampling.editing import EditingPipeline

    family = family_named(engine.description.family)
    one, other = (EditingPipeline(engine.pipeline, family, masked=True).pipeline for _ in range(2))
    assert type(one) is type(other)
    assert one._execution_device == engine.pipeline._execution_device
    kept = weakref.ref(one)
    gc.disable()
    try:
        del one
        assert kept() is None, "it is gone without a look for cycles"
    finally:
        gc.enable()


def test_a_family_without_such_a_pipeline_says_so(tmp_path: Path) -> None:
    engine = Engine.load(write_tiny_pixart(tmp_path / "tiny"), device="cpu")
    with pytest.raises(InvalidRequest, match="draws from a prompt alone") as caught:
        engine.generate(replace(ASKED, image=source_of(some_picture())))
    assert caught.value.parameter == "image"


def test_every_familys_pipelines_are_there_and_have_a_row() -> None:
    import diffusers

    for family in FAMILIES:
        if family.editing is not None:
            names = {family.editing.image_to_image, family.editing.inpaint}
            assert names <= set(SOURCES)
            assert all(hasattr(diffusers, name) for name in names)


@pytest.mark.parametrize(
    ("steps", "strength", "run"),
    [(8, 1.0, 8), (8, 0.99, 7), (8, 0.65, 5), (8, 0.01, 1), (1, 0.5, 1), (10, 0.7, 7), (50, 0.58, 29)],
)
def test_strength_is_the_share_of_steps_rounded_down(steps: int, strength: float, run: int) -> None:
    assert steps_run(steps, strength) == run


@pytest.mark.parametrize("steps", range(1, 51))
def test_both_kinds_of_pipelines_draw_the_steps_that_are_meant(steps: int) -> None:
    """As each of the two stock `get_timesteps` rounds."""
    for run in range(1, steps + 1):
        up = SOURCES["ZImageImg2ImgPipeline"].strength(run, steps)
        down = SOURCES["StableDiffusionXLImg2ImgPipeline"].strength(run, steps)
        assert 0 < up <= 1 and 0 < down <= 1
        assert steps - int(max(steps - min(steps * up, steps), 0)) == run
        assert min(int(steps * down), steps) == run


WRONG: tuple[tuple[dict[str, Any], str, str], ...] = (
    ({"image": None, "strength": 0.5}, "strength", "there is none"),
    ({"strength": 0.0}, "strength", "above 0"),
    ({"strength": 1.01}, "strength", "at most 1"),
    ({"strength": float("nan")}, "strength", "a number"),
    ({"strength": 10**400}, "strength", "far outside"),
    ({"strength": True}, "strength", "a number"),
    ({"image": SourcePicture(4, 4, bytes(48))}, "image", "at least 8 pixels"),
    ({"image": SourcePicture(16, 16, bytes(48))}, "image", "must have 768 bytes"),
    ({"image": SourcePicture(8, 8, bytes(192), bytes(63))}, "mask", "must have 64 bytes"),
    ({"image": SourcePicture(8, 8, bytes(192), bytes(64))}, "mask", "nothing to be drawn"),
    ({"image": SourcePicture(8, 8, bytes(192), bytes([127] * 64))}, "mask", "by half or more"),
)


@pytest.mark.parametrize(("changes", "parameter", "said"), WRONG, ids=[row[2] for row in WRONG])
def test_what_cannot_be_drawn_from_is_told(
    demo: Engine, changes: dict[str, Any], parameter: str, said: str
) -> None:
    asked = replace(ASKED, image=source_of(some_picture()))
    with pytest.raises(InvalidRequest, match=said) as caught:
        demo.generate(replace(asked, **changes))
    assert caught.value.parameter == parameter


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.load(device="cpu")


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((256, 256), (256, 256)),
        ((250, 130), (256, 128)),
        ((1024, 1024), (256, 256)),
        ((2000, 1000), (352, 192)),
        ((20, 20), (32, 32)),
        ((6000, 30), (2048, 32)),
    ],
)
def test_the_default_size_is_the_pictures_on_the_models_grid(
    demo: Engine, size: tuple[int, int], fitted: tuple[int, int]
) -> None:
    source = SourcePicture(*size, bytes(size[0] * size[1] * 3))
    assert fitted_size(source, demo.description) == fitted


def test_a_panorama_keeps_its_shape_by_default(demo: Engine) -> None:
    """Of 2896x362, as many pixels as the model's own size has, no side may be cut on its own."""
    large = replace(demo.description, native_width=1024, native_height=1024)
    for size, fitted in [
        ((8000, 1000), (2048, 256)),
        ((1000, 8000), (256, 2048)),
        ((4000, 400), (2048, 192)),
    ]:
        source = SourcePicture(*size, bytes(size[0] * size[1] * 3))
        assert fitted_size(source, large) == fitted


@pytest.mark.parametrize(
    ("steps", "strength", "told"),
    [(1, 0.5, True), (1, 1.0, False), (2, 0.3, True), (4, 0.1, True), (8, 0.1, False), (8, 0.65, False)],
)
def test_a_strength_that_few_steps_cannot_give_is_told(
    demo: Engine, steps: int, strength: float, told: bool
) -> None:
    asked = replace(ASKED, image=source_of(some_picture()), num_inference_steps=steps, strength=strength)
    warnings = resolve(asked, demo.description).warnings
    assert ("strength_raised" in [notice.code for notice in warnings]) == told


def test_a_picture_of_another_shape_covers_the_size_and_is_told_to_be_cut(demo: Engine) -> None:
    asked = replace(ASKED, image=source_of(some_picture((300, 100))), width=128, height=128)
    result = demo.generate(replace(asked, num_inference_steps=2))
    codes = [notice.code for notice in result.report.warnings]
    assert "source_scaled" in codes and "source_cut" in codes
    assert result.images[0].size == (128, 128)


def test_a_picture_that_fits_is_taken_as_it_is() -> None:
    picture, mask = some_picture(), some_mask()
    taken = prepared(source_of(picture, mask), *SIZE)
    assert taken.mask is not None
    assert (taken.picture.tobytes(), taken.mask.tobytes()) == (picture.tobytes(), mask.tobytes())


@pytest.fixture(scope="module")
def red_circle(demo: Engine) -> Image.Image:
    picture = demo.generate(GenerationRequest("a red circle on a white background", seed=7)).images[0]
    assert seen(picture) == ("white", [("red", "circle")])
    return picture


def seen(picture: Image.Image) -> tuple[str, list[tuple[str, str]]]:
    scene = detect(picture)
    return scene.background, [(thing.colour, thing.shape) for thing in scene.things]


def test_the_demo_model_makes_a_red_circle_blue(demo: Engine, red_circle: Image.Image) -> None:
    asked = GenerationRequest("a blue circle on a white background", seed=3, n=3, image=source_of(red_circle))
    for picture in demo.generate(asked).images:
        assert seen(picture) == ("white", [("blue", "circle")])


def test_the_demo_model_changes_what_the_mask_marks_and_nothing_else(
    demo: Engine, red_circle: Image.Image
) -> None:
    mask = Image.new("L", red_circle.size, 0)
    ImageDraw.Draw(mask).rectangle([60, 60, 199, 199], fill=255)
    asked = GenerationRequest(
        "a red square on a white background", seed=1, n=2, image=source_of(red_circle, mask)
    )
    for picture in demo.generate(asked).images:
        assert seen(picture) == ("white", [("red", "square")])
        changed = np.abs(values(picture) - values(red_circle)).max(axis=-1)
        assert changed[np.asarray(mask) == 0].max() == 0


def test_variations_differ_from_the_picture_and_show_the_same(demo: Engine, red_circle: Image.Image) -> None:
    editing = family_named(demo.description.family).editing
    assert editing is not None
    asked = GenerationRequest(
        "",
        seed=11,
        n=2,
        guidance_scale=1.0,
        enhance=False,
        image=source_of(red_circle),
        strength=editing.variation_strength,
    )
    pictures = demo.generate(asked).images
    assert pictures[0].tobytes() != pictures[1].tobytes()
    for picture in pictures:
        assert seen(picture) == ("white", [("red", "circle")])
        assert 0.5 < np.abs(values(picture) - values(red_circle)).mean() < 6.0
