"""Tells what a LoRA file is without a model: its layout, ranks and what it was made for; knows no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from zimage_engine.checkpoint.safetensors_header import read_safetensors_header
from zimage_engine.errors import CheckpointDamaged, UnknownFamily
from zimage_engine.loading.lora_layouts import (
    LoraFeatures,
    Shape,
    StoredPair,
    is_text_encoder,
    normalise,
    read_lora,
    spelling_of,
    stored_pairs,
)

#: So large a share of a file's tensors belongs to LoRAs in a LoRA file. A whole model whose LoRAs were not
#: merged into it has at least one weight of its own for each pair, so at most two thirds.
_LORA_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class SizedModel:
    """A published model and how wide it is where its kind differs in width; `is_drawn_here`: we have it."""

    width: int
    title: str
    is_drawn_here: bool


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """A kind of model: the module names that only it has, and the modules whose input tells its width."""

    title: str
    modules: str
    is_drawn_here: bool
    width_of: str = ""
    sizes: tuple[SizedModel, ...] = ()


#: Widths are those of the published config.json files (`dim`, `cross_attention_dim`).
LORA_TARGETS = (
    LoraTarget(
        "Z-Image or a model built like it",
        r"(^|[._])(layers|noise_refiner|context_refiner)[._]\d+[._](attention|feed_forward|adaLN)",
        True,
        r"attention[._](to_q|to_k|to_v|qkv|to_qkv|to[._][qkv])$",
        (SizedModel(3840, "Z-Image", True), SizedModel(2304, "Lumina 2", False)),
    ),
    LoraTarget(
        "Stable Diffusion (XL, 1.5 or 2)",
        r"(down|up|input|output)_blocks|middle_block|mid_block",
        True,
        r"attn2[._]to_[kv]$",
        (
            SizedModel(2048, "SDXL", True),
            SizedModel(768, "Stable Diffusion 1.5", False),
            SizedModel(1024, "Stable Diffusion 2", False),
        ),
    ),
    LoraTarget("Flux or one of its relatives", r"(double|single)_blocks|single_transformer_blocks", False),
    LoraTarget("Stable Diffusion 3", r"joint_blocks", False),
    LoraTarget(
        "PixArt, Qwen-Image or another model of 'transformer_blocks'",
        r"^(transformer[._]|lora_unet_|lora_transformer_|diffusion_model\.)?transformer_blocks[._]\d",
        False,
    ),
    LoraTarget("Wan or another model of 'blocks'", r"(^|\.|lora_unet_)blocks[._]\d", False),
)


@dataclass(frozen=True, slots=True)
class LoraDescription:
    """What a LoRA file is. `ranks` and `dtypes` are all that occur, `example` is one stored name.

    `made_for` is a clause for a person; `is_drawn_here` is False where no family of ours takes it.
    """

    path: Path
    size_bytes: int
    pairs: int
    text_encoder_pairs: int
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    example: str
    made_for: str
    is_drawn_here: bool


def is_lora(path: Path) -> bool:
    """Whether there is a LoRA at `path`: a safetensors file of nothing else, or a folder with one such."""
    file = _file_of(path)
    if file is None:
        return False
    tensors, _ = read_safetensors_header(file)
    spelled = sum(spelling_of(tensor.name) is not None for tensor in tensors)
    return spelled >= max(1, _LORA_SHARE * len(tensors))


def refuse_lora(path: Path) -> None:
    """Raise UnknownFamily, with advice, where there is a LoRA at `path` and a model is wanted."""
    if is_lora(path):
        raise UnknownFamily(
            f"{path} is a LoRA and no model; expected the model that it is put on: name that one, "
            f"and the LoRA beside it (--lora {path}, or the setting loras)"
        )


def describe_lora(path: Path) -> LoraDescription:
    """Measure the LoRA at `path`.

    Raises CheckpointDamaged where it cannot be used with any model: LoKr, DoRA, a torn pair, ...
    """
    features = read_lora(path)
    pairs = stored_pairs(features)
    title, drawn = _made_for(pairs)
    spelled = (spelling_of(tensor.name) for tensor in features.tensors)
    return LoraDescription(
        path=features.path,
        size_bytes=features.path.stat().st_size,
        pairs=len(pairs),
        text_encoder_pairs=sum(is_text_encoder(pair.stem) for pair in pairs),
        ranks=tuple(sorted({pair.rank for pair in pairs})),
        dtypes=tuple(sorted({pair.a.dtype for pair in pairs} | {pair.b.dtype for pair in pairs})),
        layouts=tuple(sorted({each.because for each in spelled if each is not None and each.role == "A"})),
        example=pairs[0].a.name,
        made_for=title,
        is_drawn_here=drawn,
    )


def check_unet_lora(features: LoraFeatures, width: int) -> None:
    """Raise CheckpointDamaged for a file that is for no UNet with prompts `width` wide, as its names tell."""
    pairs = stored_pairs(features)
    (target,) = (each for each in LORA_TARGETS if each.width_of.startswith("attn2"))
    own = [pair.stem for pair in pairs if not is_text_encoder(pair.stem)]
    got = _width(target, pairs)
    if (own and not any(re.search(target.modules, stem) for stem in own)) or got not in (None, width):
        raise CheckpointDamaged(
            f"{features.path} was made for {_made_for(pairs)[0]}, as its names and shapes tell; expected one "
            f"for {target.title}, {width} wide: take one made for this model"
        )


def adapted_modules(path: Path, weights: dict[str, Shape]) -> int:
    """How many modules it adapts in the transformer whose tensors are `weights`.

    Raises CheckpointDamaged where it does not fit whole.
    """
    modules = {
        name.removesuffix(".weight"): shape for name, shape in weights.items() if name.endswith(".weight")
    }
    return len(normalise(read_lora(path), modules).modules)


def _file_of(path: Path) -> Path | None:
    if path.is_file():
        return path
    if not path.is_dir() or any((path / name).is_file() for name in ("model_index.json", "config.json")):
        return None
    files = list(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def _made_for(pairs: tuple[StoredPair, ...]) -> tuple[str, bool]:
    """What the names and shapes tell of the model that it was trained on."""
    stems = [pair.stem for pair in pairs if not is_text_encoder(pair.stem)]
    counts = [
        (sum(re.search(each.modules, stem) is not None for stem in stems), each) for each in LORA_TARGETS
    ]
    most = max(count for count, _ in counts)
    likely = [each for count, each in counts if count == most and count]
    if len(likely) != 1:
        return "a model that its names do not tell", True
    (target,) = likely
    width = _width(target, pairs)
    if width is None:
        return target.title, target.is_drawn_here
    known = next((size for size in target.sizes if size.width == width), None)
    if known is not None:
        return f"{known.title} ({width} wide)", known.is_drawn_here
    sizes = ", ".join(f"{size.title} is {size.width}" for size in target.sizes)
    return f"{target.title}, {width} wide ({sizes})", target.is_drawn_here


def _width(target: LoraTarget, pairs: tuple[StoredPair, ...]) -> int | None:
    """The one input width of the layers that tell; None where there is none, or several."""
    widths = {pair.a.shape[1] for pair in pairs if target.width_of and re.search(target.width_of, pair.stem)}
    return widths.pop() if len(widths) == 1 else None
