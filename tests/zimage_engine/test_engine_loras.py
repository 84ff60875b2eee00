"""LoRAs through the engine: they change the picture, are told in the report, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl, write_tiny_z_image
from tests.zimage_engine.tiny_models.lora import write_lora
from zimage_engine import Engine, GenerationRequest, LoraUse, LoraWeight
from zimage_engine.errors import CheckpointDamaged, CheckpointError, CheckpointNotFound

ASKED = GenerationRequest(
    prompt="A red circle", seed=11, width=64, height=64, num_inference_steps=2, enhance=False
)
MODELS: dict[str, Callable[[Path], Path]] = {"z-image": write_tiny_z_image, "sdxl": write_tiny_sdxl}


def drawn(engine: Engine) -> bytes:
    (image,) = engine.generate(ASKED).images
    assert isinstance(image, Image.Image)
    return image.tobytes()


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def shared_engine(model: Path) -> Engine:
    return Engine.load(model, device="cpu")


@pytest.fixture
def engine(shared_engine: Engine) -> Engine:
    shared_engine.set_loras(())
    return shared_engine


@pytest.fixture(scope="module")
def fresh_picture(model: Path) -> bytes:
    return drawn(Engine.load(model, device="cpu"))


@pytest.fixture(scope="module")
def style(model: Path) -> Path:
    return write_lora(model, model.parent / "style.safetensors", seed=1)


@pytest.fixture(scope="module")
def touch(model: Path) -> Path:
    """One that adapts fewer modules than `style`."""
    return write_lora(model, model.parent / "touch.safetensors", seed=2, modules=("to_q",))


def test_a_lora_changes_the_picture_and_leaves_no_trace(
    engine: Engine, style: Path, fresh_picture: bytes
) -> None:
    assert drawn(engine) == fresh_picture
    (use,) = engine.set_loras([LoraWeight(style)])
    assert (use.name, use.weight) == ("style.safetensors", 1.0)
    assert use.adapted_modules > 3
    result = engine.generate(ASKED)
    assert result.images[0].tobytes() != fresh_picture
    assert result.report.loras == engine.loras == (use,)
    assert result.report.to_dict()["loras"][0]["name"] == "style.safetensors"

    assert engine.set_loras(()) == ()
    result = engine.generate(ASKED)
    assert result.images[0].tobytes() == fresh_picture
    assert result.report.loras == ()


def test_the_weight_counts_and_zero_is_none(engine: Engine, style: Path, fresh_picture: bytes) -> None:
    pictures = []
    for weight in (1.0, 0.5, -1.0):
        engine.set_loras([LoraWeight(style, weight)])
        pictures.append(drawn(engine))
    assert len({*pictures, fresh_picture}) == 4
    engine.set_loras([LoraWeight(style, 0.0)])
    assert drawn(engine) == fresh_picture


def test_what_is_set_replaces_what_was_there(model: Path, engine: Engine, style: Path, touch: Path) -> None:
    engine.set_loras([LoraWeight(style), LoraWeight(touch, 0.5)])
    (use,) = engine.set_loras([LoraWeight(touch, 0.5)])
    assert engine.generate(ASKED).report.loras == (use,)
    fresh = Engine.load(model, device="cpu", loras=[LoraWeight(touch, 0.5)])
    assert fresh.loras == (use,)
    assert drawn(engine) == drawn(fresh)

    engine.set_loras([LoraWeight(style), LoraWeight(touch, 0.5)])
    both = Engine.load(model, device="cpu", loras=[LoraWeight(style), LoraWeight(touch, 0.5)])
    assert drawn(engine) == drawn(both) != drawn(fresh)


def not_finite(style: Path, file: Path) -> None:
    """Its header is right: this shows only when the first has been put on already."""
    save_file({name: tensor * torch.nan for name, tensor in load_file(style).items()}, file)


def torn(style: Path, file: Path) -> None:
    tensors = load_file(style)
    tensors.pop(next(name for name in tensors if ".lora_B." in name))
    save_file(tensors, file)


def of_another_model(style: Path, file: Path) -> None:
    save_file({name.replace("to_q", "to_qq"): tensor for name, tensor in load_file(style).items()}, file)


def missing(style: Path, file: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (torn, CheckpointDamaged),
        (not_finite, CheckpointDamaged),
        (of_another_model, CheckpointDamaged),
        (missing, CheckpointNotFound),
    ],
)
def test_a_bad_file_leaves_what_was_applied(
    damage: Callable[[Path, Path], None],
    error: type[CheckpointError],
    engine: Engine,
    style: Path,
    touch: Path,
    tmp_path: Path,
) -> None:
    bad = tmp_path / "bad.safetensors"
    damage(style, bad)
    before = engine.set_loras([LoraWeight(style, 0.5)])
    picture = drawn(engine)
    with pytest.raises(error, match="bad"):
        engine.set_loras([LoraWeight(touch), LoraWeight(bad)])
    assert engine.loras == before
    assert drawn(engine) == picture
    with pytest.raises(error, match="bad"):
        Engine.load(None, device="cpu", loras=[LoraWeight(bad)])


def test_a_model_that_takes_no_loras_says_so_and_still_draws(tiny_model: Path, tmp_path: Path) -> None:
    style = write_lora(tiny_model, tmp_path / "style.safetensors")
    engine = Engine.load(write_tiny_pixart(tmp_path / "tiny"), device="cpu")
    picture = drawn(engine)
    with pytest.raises(CheckpointDamaged, match="takes no LoRAs"):
        engine.set_loras([LoraWeight(style)])
    engine.set_loras(())
    assert drawn(engine) == picture


def test_a_lora_in_a_folder_is_called_as_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    write_lora(tiny_model, tmp_path / "watercolour" / "adapter_model.safetensors")
    engine = Engine.load(tiny_model, device="cpu", loras=[LoraWeight(tmp_path / "watercolour")])
    (use,) = engine.loras
    assert isinstance(use, LoraUse)
    assert use.name == "watercolour"


def test_parts_of_other_places_reach_the_loader(tiny_model: Path, tmp_path: Path) -> None:
    file = next((tiny_model / "transformer").glob("*.safetensors"))
    text_encoder, vae = tiny_model / "text_encoder", tiny_model / "vae"
    engine = Engine.load(
        file, "cpu", family="z-image-turbo", base=tiny_model, text_encoder=text_encoder, vae=vae
    )
    assert drawn(engine) == drawn(Engine.load(tiny_model, device="cpu"))
    absent = tmp_path / "no-such-part"
    with pytest.raises(CheckpointNotFound, match="no-such-part"):
        Engine.load(file, "cpu", base=tiny_model, text_encoder=absent)
    with pytest.raises(CheckpointNotFound, match="no-such-part"):
        Engine.load(file, "cpu", base=tiny_model, vae=absent)
