"""A dtype that was asked for: followed everywhere, or refused with the reason."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl, write_tiny_z_image
from zimage_engine.errors import DtypeRefused
from zimage_engine.loading.adapter import ModelLoaderAdapter

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")
PROBED = "layers.0.ffn_norm1.weight"  # of two layers the last but one


def with_spread(folder: Path, spread: float, prefix: str = "") -> Path:
    weights = load_file(folder / WEIGHTS)
    norm = weights[PROBED].float()
    weights[PROBED] = (1 + spread * torch.linspace(-1, 1, norm.numel()) / 0.5959).to(torch.bfloat16)
    save_file({prefix + name: tensor for name, tensor in weights.items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("prefix", ["", "module."], ids=["healthy", "mended"])
@pytest.mark.parametrize(("dtype", "expected"), [(None, "bfloat16"), ("float32", "float32")])
def test_kwargs_view_and_weights_are_of_the_dtype(
    copy_of_tiny_model, tmp_path: Path, dtype: str | None, expected: str, prefix: str
) -> None:
    folder = with_spread(copy_of_tiny_model(), 0.1, prefix)
    adapter = ModelLoaderAdapter(folder, dtype=dtype, cache_folder=tmp_path / "views")
    wanted = getattr(torch, expected)
    assert adapter.get_load_kwargs()["torch_dtype"] is wanted
    assert f"{expected}: said outright" in adapter.explain()
    if prefix:
        stored = load_file(adapter.model_path / WEIGHTS)
        assert {tensor.dtype for tensor in stored.values()} == {wanted}
    pipeline = adapter.load()
    for name in ("transformer", "text_encoder", "vae"):
        assert getattr(pipeline, name).dtype is wanted


def test_a_z_image_that_keeps_below_float16s_end_loads_in_it(copy_of_tiny_model) -> None:
    folder = with_spread(copy_of_tiny_model(), 0.30)
    assert ModelLoaderAdapter(folder, dtype="float16").load().transformer.dtype is torch.float16


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_z_image_that_overflows_is_refused_with_the_spread(copy_of_tiny_model, prefix: str) -> None:
    folder = with_spread(copy_of_tiny_model(), 0.60, prefix)
    with pytest.raises(DtypeRefused, match=rf"spread of {PROBED} is 0\.\d\d, and only") as raised:
        ModelLoaderAdapter(folder, dtype="float16").explain()
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_a_z_image_without_the_probed_layer_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_z_image(tmp_path / "model", head_dim=128)  # one layer
    with pytest.raises(DtypeRefused, match="to tell whether its activations"):
        ModelLoaderAdapter(folder, dtype="float16").explain()


def test_pixart_is_refused_for_its_text_encoder(tmp_path: Path) -> None:
    folder = write_tiny_pixart(tmp_path / "model", "sigma")
    with pytest.raises(DtypeRefused, match="T5, overflows; ask for bfloat16 or float32"):
        ModelLoaderAdapter(folder, dtype="float16").explain()


def test_sdxl_loads_in_float16_where_its_vae_is_decoded_in_float32(tmp_path: Path) -> None:
    folder = write_tiny_sdxl(tmp_path / "model")
    assert ModelLoaderAdapter(folder, dtype="float16").load().unet.dtype is torch.float16
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace('"force_upcast": true', '"force_upcast": false'))
    with pytest.raises(DtypeRefused, match="force_upcast"):
        ModelLoaderAdapter(folder, dtype="float16").explain()


@pytest.mark.parametrize("dtype", ["fp16", "", "float64"])
def test_a_dtype_that_is_none_is_refused_with_those_there_are(tiny_model: Path, dtype: str) -> None:
    with pytest.raises(DtypeRefused, match="bfloat16, float32, float16"):
        ModelLoaderAdapter(tiny_model, dtype=dtype).explain()


def test_an_lcm_schedule_on_a_plain_unet_is_explained(tmp_path: Path) -> None:
    plain = write_tiny_sdxl(tmp_path / "plain")
    lcm = write_tiny_sdxl(tmp_path / "lcm", lcm=True)
    assert "note:" not in ModelLoaderAdapter(plain).explain() + ModelLoaderAdapter(lcm).explain()
    shutil.copy(lcm / "scheduler" / "scheduler_config.json", plain / "scheduler" / "scheduler_config.json")
    index = plain / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "LCMScheduler"))
    adapter = ModelLoaderAdapter(plain)
    assert adapter.family.name == "sdxl"
    assert "note: the scheduler is LCM's, but the unet takes no guidance embedding" in adapter.explain()
    assert type(adapter.load().scheduler).__name__ == "LCMScheduler"
