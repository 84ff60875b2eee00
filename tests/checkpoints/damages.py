"""Damage as it is met in the wild, done to a healthy model folder: one function each, by name in `DAMAGES`.

A damage changes the folder in place. `as_single_file` and its like return a file instead, beside the folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.original_layouts import Tensors, ldm_unet, ldm_vae, open_clip, original_pixart

#: Changes the folder, and returns what is to be loaded: the folder itself or a file.
Damage = Callable[[Path], Path]


def denoiser_folder(folder: Path) -> Path:
    """`transformer` or `unet`, whichever the model has."""
    return next(folder / name for name in ("transformer", "unet") if (folder / name).is_dir())


def weight_files(component: Path) -> list[Path]:
    return sorted(path for path in component.iterdir() if path.suffix in (".safetensors", ".bin"))


def weights(component: Path) -> Tensors:
    tensors: Tensors = {}
    for path in weight_files(component):
        tensors |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return tensors


def stock_name(component: Path, suffix: str = ".safetensors") -> str:
    """The name that the library of the component looks for."""
    if component.name in ("transformer", "unet", "vae"):
        return f"diffusion_pytorch_model{suffix}"
    return f"pytorch_model{suffix}" if suffix == ".bin" else f"model{suffix}"


def rewrite(component: Path, tensors: Mapping[str, torch.Tensor], name: str | None = None) -> None:
    """All weights of `component` replaced by one file of these tensors."""
    ready = {key: tensor.contiguous() for key, tensor in tensors.items()}
    for path in [*weight_files(component), *component.glob("*.index*.json")]:
        path.unlink()
    target = component / (name or stock_name(component))
    if target.suffix == ".safetensors":
        save_file(ready, target)
    else:
        torch.save(ready, target)


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def renamed_keys(rename: Callable[[str], str], component: str | None = None) -> Damage:
    def damage(folder: Path) -> Path:
        place = folder / component if component else denoiser_folder(folder)
        rewrite(place, {rename(name): tensor for name, tensor in weights(place).items()})
        return folder

    return damage


def retyped(dtype: torch.dtype, component: str | None = None, every: int = 1) -> Damage:
    """Every n-th tensor stored as `dtype`."""

    def damage(folder: Path) -> Path:
        place = folder / component if component else denoiser_folder(folder)
        rewrite(
            place,
            {
                name: tensor.to(dtype) if number % every == 0 and tensor.is_floating_point() else tensor
                for number, (name, tensor) in enumerate(sorted(weights(place).items()))
            },
        )
        return folder

    return damage


def without(*names: str) -> Damage:
    """Files or folders removed, `*` allowed."""

    def damage(folder: Path) -> Path:
        for name in names:
            for path in folder.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return folder

    return damage


def sharded(component: Path, forms: tuple[str, ...] = (".safetensors", ".safetensors")) -> list[str]:
    """The weights in as many files as there are `forms`, and no index. Returns the files' names."""
    tensors = weights(component)
    names = sorted(tensors)
    for path in weight_files(component):
        path.unlink()
    made = []
    for number, form in enumerate(forms):
        stem = stock_name(component, form).removesuffix(form)
        target = component / f"{stem}-{number + 1:05}-of-{len(forms):05}{form}"
        mine = {name: tensors[name].contiguous() for name in names[number :: len(forms)]}
        save_file(mine, target) if form == ".safetensors" else torch.save(mine, target)
        made.append(target.name)
    return made


def shards_without_index(folder: Path) -> Path:
    sharded(denoiser_folder(folder))
    return folder


def mixed_shards(folder: Path) -> Path:
    sharded(denoiser_folder(folder), (".safetensors", ".bin"))
    return folder


def index_names_absent_files(folder: Path) -> Path:
    """Shards were merged into one file under another name, and the old index stayed."""
    place = denoiser_folder(folder)
    tensors = weights(place)
    rewrite(place, tensors, "merged.safetensors")
    stem = stock_name(place).removesuffix(".safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, f"{stem}-00001-of-00001.safetensors")}
    (place / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def shard_gone(folder: Path) -> Path:
    place = denoiser_folder(folder)
    made = sharded(place)
    (place / made[-1]).unlink()
    return folder


def renamed_weights(folder: Path) -> Path:
    place = denoiser_folder(folder)
    weight_files(place)[0].rename(place / "my_best_model_v2.safetensors")
    return folder


def pickled(component: str | None = None, wrapper: str = "") -> Damage:
    def damage(folder: Path) -> Path:
        place = folder / component if component else denoiser_folder(folder)
        tensors = weights(place)
        rewrite(place, tensors, stock_name(place, ".bin"))
        if wrapper:
            torch.save({wrapper: tensors, "epoch": 3, "global_step": 1000}, place / stock_name(place, ".bin"))
        return folder

    return damage


def averaged(wrapper: str = "state_dict_ema") -> Damage:
    """A training checkpoint: the weights as their moving average, beside plain ones of other values."""

    def damage(folder: Path) -> Path:
        place = denoiser_folder(folder)
        tensors = weights(place)
        rewrite(place, tensors, stock_name(place, ".bin"))
        plain = {name: tensor * 0.9 for name, tensor in tensors.items()}
        torch.save({"state_dict": plain, wrapper: tensors}, place / stock_name(place, ".bin"))
        return folder

    return damage


def without_denoiser_config(folder: Path) -> Path:
    (denoiser_folder(folder) / "config.json").unlink()
    return folder


def variant_only(variant: str, *components: str) -> Damage:
    def damage(folder: Path) -> Path:
        for component in components or [child.name for child in folder.iterdir() if child.is_dir()]:
            for path in weight_files(folder / component):
                path.rename(path.with_name(f"{path.stem}.{variant}{path.suffix}"))
        return folder

    return damage


def chained(*damages: Damage) -> Damage:
    def damage(folder: Path) -> Path:
        place = folder
        for each in damages:
            place = each(place)
        return place

    return damage


def edited(file: str, change: Callable[[dict], None]) -> Damage:
    def damage(folder: Path) -> Path:
        edit_json(folder / file, change)
        return folder

    return damage


def added_tensors(**extra: torch.Tensor) -> Damage:
    def damage(folder: Path) -> Path:
        place = denoiser_folder(folder)
        rewrite(place, weights(place) | extra)
        return folder

    return damage


def changed_tensor(pattern: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    """The first denoiser tensor that fits `pattern` changed, or left out where `change` gives None."""

    def damage(folder: Path) -> Path:
        place = denoiser_folder(folder)
        tensors = weights(place)
        name = min(name for name in tensors if re.search(pattern, name))
        changed = change(tensors.pop(name))
        rewrite(place, tensors if changed is None else tensors | {name: changed})
        return folder

    return damage


def truncated(folder: Path) -> Path:
    path = weight_files(denoiser_folder(folder))[0]
    os.truncate(path, path.stat().st_size - 100)
    return folder


class _RunsCode:
    def __reduce__(self) -> tuple:
        return os.system, ("touch was-run",)


def evil_pickle(folder: Path) -> Path:
    place = denoiser_folder(folder)
    tensors = weights(place)
    rewrite(place, tensors, stock_name(place, ".bin"))
    torch.save({**tensors, "extra": _RunsCode()}, place / stock_name(place, ".bin"))
    return folder


def index_leaves_folder(folder: Path) -> Path:
    place = denoiser_folder(folder)
    tensors = weights(place)
    stem = stock_name(place).removesuffix(".safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../../secret.safetensors")}
    (place / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def link_leaves_folder(folder: Path) -> Path:
    path = weight_files(denoiser_folder(folder))[0]
    outside = folder.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)
    return folder


def lying_header(folder: Path) -> Path:
    path = weight_files(denoiser_folder(folder))[0]
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def z_image_single_names(tensors: Tensors) -> Tensors:
    """The single-file layout of a Z-Image transformer: fused qkv and the maker's names."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.attention)\.to_([qkv])\.weight", name)
        if found:
            if found[2] == "q":
                parts = [tensors[f"{found[1]}.to_{letter}.weight"] for letter in "qkv"]
                made[f"{found[1]}.qkv.weight"] = torch.cat(parts)
            continue
        for before, after in (
            ("all_x_embedder.2-1.", "x_embedder."),
            ("all_final_layer.2-1.", "final_layer."),
            (".attention.to_out.0.", ".attention.out."),
            (".attention.norm_q.", ".attention.q_norm."),
            (".attention.norm_k.", ".attention.k_norm."),
        ):
            name = name.replace(before, after)
        made[name] = tensor
    return made


def z_image_single_layout(prefix: str = "", fp8: str = "") -> Damage:
    """The transformer's weights in the single-file layout, where they were."""

    def damage(folder: Path) -> Path:
        place = denoiser_folder(folder)
        rewrite(place, _prefixed(z_image_single_names(weights(place)), prefix, fp8))
        return folder

    return damage


def z_image_single_file(prefix: str = "", text_and_vae: bool = False, fp8: str = "") -> Damage:
    """One ComfyUI-like file beside the folder; the folder stays as the base."""

    def damage(folder: Path) -> Path:
        tensors = _prefixed(z_image_single_names(weights(denoiser_folder(folder))), prefix, fp8)
        if text_and_vae:
            encoder = weights(folder / "text_encoder")
            tensors |= {f"text_encoders.qwen3_4b.transformer.model.{n}": t for n, t in encoder.items()}
        target = folder.parent / "z_image_comfy.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)
        return target

    return damage


def _prefixed(tensors: Tensors, prefix: str, fp8: str) -> Tensors:
    made: Tensors = {}
    for name, tensor in tensors.items():
        if fp8 and tensor.ndim == 2 and "layers." in name:
            scale = (tensor.abs().max() / 448).float() if fp8 == "scaled" else torch.tensor(1.0)
            made[prefix + name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            if fp8 == "scaled":
                made[prefix + name.removesuffix(".weight") + ".weight_scale"] = scale
        else:
            made[prefix + name] = tensor
    return made


def sdxl_single_file(folder: Path) -> Path:
    """One file as the maker's own code writes it: unet, VAE, both text encoders; the folder stays as base."""
    parts = {
        "model.diffusion_model.": ldm_unet(weights(folder / "unet"), _layers(folder / "unet")),
        "first_stage_model.": ldm_vae(weights(folder / "vae"), levels=_levels(folder / "vae")),
        "conditioner.embedders.0.transformer.text_model.": weights(folder / "text_encoder"),
        "conditioner.embedders.1.model.": open_clip(weights(folder / "text_encoder_2")),
    }
    target = folder.parent / "sdxl_own.safetensors"
    packed = {prefix + name: t.contiguous() for prefix, part in parts.items() for name, t in part.items()}
    save_file(packed, target)
    return target


def _levels(vae: Path) -> int:
    return len(json.loads((vae / "config.json").read_text(encoding="utf-8"))["block_out_channels"])


def _layers(unet: Path) -> int:
    return json.loads((unet / "config.json").read_text(encoding="utf-8"))["layers_per_block"]


def ldm_unet_layout(folder: Path) -> Path:
    place = folder / "unet"
    tensors = ldm_unet(weights(place), _layers(place))
    rewrite(place, {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()})
    return folder


def ldm_vae_layout(folder: Path) -> Path:
    place = folder / "vae"
    rewrite(place, ldm_vae(weights(place), _levels(place)))
    return folder


def original_pixart_layout(wrapper: str = "") -> Damage:
    def damage(folder: Path) -> Path:
        place = folder / "transformer"
        tensors = original_pixart(weights(place))
        rewrite(place, tensors)
        if wrapper:
            rewrite(place, tensors, stock_name(place, ".bin"))
            torch.save({wrapper: tensors}, place / stock_name(place, ".bin"))
        return folder

    return damage


def z_image_gguf(folder: Path) -> Path:
    """The transformer as a GGUF file of 8 bits, the rest in the folder that stays as base."""
    import gguf

    target = folder.parent / "z_image_q8_0.gguf"
    writer = gguf.GGUFWriter(target, "lumina2")
    for name, tensor in z_image_single_names(weights(denoiser_folder(folder))).items():
        values = tensor.float().numpy()
        fits = values.ndim == 2 and values.shape[1] % 32 == 0
        if fits:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
