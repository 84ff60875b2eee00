"""Finds the place of every tensor of a LoRA file in a denoiser, whatever its naming; knows no torch.

A LoRA file holds pairs A (rank, in) and B (out, rank) for modules of the denoiser; a module's weight becomes
W + weight * alpha / rank * B @ A. Trainers agree on that and on no name.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from zimage_engine.checkpoint.safetensors_header import read_safetensors_header
from zimage_engine.checkpoint.tensors import TensorFacts
from zimage_engine.errors import CheckpointDamaged, CheckpointNotFound
from zimage_engine.loading.lora_weight import LoraWeight, require_lora

Shape = tuple[int, ...]

#: So many names a message gives; a LoRA has hundreds.
_NAMES_TOLD = 3


@dataclass(frozen=True, slots=True)
class Spelling:
    """A way to end a stored name: what matches `pattern` (at the end) plays `role`; "" is one that we refuse.

    `because` says where it is met or, for a refused one, why it cannot be used.
    """

    role: str
    pattern: str
    because: str


#: `.lora_A.default.weight`: PEFT puts the adapter's name between.
SPELLINGS = (
    Spelling("A", r"\.lora_A(\.[^.]+)?\.weight", "PEFT, diffusers"),
    Spelling("B", r"\.lora_B(\.[^.]+)?\.weight", "PEFT, diffusers"),
    Spelling("A", r"[._]lora[._]down\.weight", "kohya, ComfyUI; with dots some Z-Image trainers"),
    Spelling("B", r"[._]lora[._]up\.weight", "kohya, ComfyUI; with dots some Z-Image trainers"),
    Spelling("A", r"\.lora_linear_layer\.down\.weight", "diffusers before PEFT"),
    Spelling("B", r"\.lora_linear_layer\.up\.weight", "diffusers before PEFT"),
    Spelling("alpha", r"\.alpha", "kohya; a file without it means alpha = rank"),
    Spelling("", r"\.lokr_(w[12](_[ab])?|t2)", "it is a LoKr, which has no A and B"),
    Spelling("", r"\.hada_(w[12]_[ab]|t[12])", "it is a LoHa, which has no A and B"),
    Spelling(
        "", r"\.oft_(blocks|diag|R\.weight)|\.oft_R\.[^.]+\.weight", "it is an OFT, which has no A and B"
    ),
    Spelling("", r"\.lora_mid\.weight", "it has a third factor between A and B (Tucker form)"),
    Spelling("", r"\.dora_scale|\.lora_magnitude_vector(\.[^.]+)?(\.weight)?", "it is a DoRA"),
    Spelling("", r"\.lora_[AB](\.[^.]+)?\.bias", "it changes biases"),
    Spelling("", r"\.diff(_b)?|\.w_norm|\.b_norm", "it holds whole weight differences besides A and B"),
)

#: What may stand before the path of a module, in any order and number; dots and underscores are one here.
PREFIXES = (
    "transformer.",
    "diffusion_model.",
    "model.",
    "base_model.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "_orig_mod.",
    "module.",
    "unet.",
    "_",
)

#: Text encoders; diffusers has no way to adapt the one of Z-Image.
TEXT_ENCODER = re.compile(r"(lora_te\d?_|(text_encoders?|te)(_?\d)?[._]|lora_te\d?\.|conditioner\.)")


@dataclass(frozen=True, slots=True)
class Renaming:
    """A part of a diffusers module path and how the single-file layout calls it."""

    ours: str
    theirs: str


RENAMINGS = (
    Renaming(r"\.attention\.to_out\.0$", ".attention.out"),
    Renaming(r"\.attention\.to_out\.0$", ".attention.to_out"),
    Renaming(r"\.attention\.norm_q$", ".attention.q_norm"),
    Renaming(r"\.attention\.norm_k$", ".attention.k_norm"),
    Renaming(r"^all_x_embedder\.2-1$", "x_embedder"),
    Renaming(r"^all_final_layer\.2-1\.", "final_layer."),
)

#: One stored B for three modules, in this order of rows.
_FUSED = ("to_q", "to_k", "to_v")
_FUSED_SPELLINGS = ("qkv", "to_qkv")

#: Names that only other models have, for a message that helps.
FOREIGN = (
    (re.compile(r"(double|single)_blocks|single_transformer_blocks"), "Flux or one of its relatives"),
    (re.compile(r"(down|up|input|output)_blocks|middle_block|mid_block"), "Stable Diffusion (1.5, 2 or XL)"),
    (re.compile(r"joint_blocks"), "Stable Diffusion 3"),
    (re.compile(r"transformer_blocks"), "Qwen-Image, PixArt or another model of 'transformer_blocks'"),
    (re.compile(r"(^|[._])blocks[._]\d"), "Wan or another model of 'blocks'"),
)


@dataclass(frozen=True, slots=True)
class LoraFeatures:
    """A LoRA file, measured. `settings` are PEFT's own (`r`, `lora_alpha`, ...), {} where there are none."""

    path: Path
    tensors: tuple[TensorFacts, ...] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class StoredPair:
    """A and B of one stored module name; `alpha` is None where the file has none."""

    stem: str
    a: TensorFacts
    b: TensorFacts
    alpha: TensorFacts | None

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a.shape[0]

    @property
    def sources(self) -> tuple[str, ...]:
        """The stored names of all its tensors."""
        return tuple(tensor.name for tensor in (self.a, self.b, self.alpha) if tensor is not None)


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One module of the denoiser and the stored tensors that adapt it.

    `b_rows` (start, stop) is its part of a B that several modules share, None where it has B to itself.
    The scale is the number at `alpha_source` / rank; `scale` where `alpha_source` is None.
    """

    module: str
    a_source: str
    b_source: str
    b_rows: tuple[int, int] | None
    alpha_source: str | None
    scale: float
    rank: int


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Where all of a LoRA goes. `dropped` are stored names left out on purpose, each with the reason."""

    path: Path
    modules: tuple[AdaptedModule, ...]
    dropped: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class _Slot:
    """The modules that one spelled name stands for. `is_own`: it is the module's own path."""

    modules: tuple[str, ...]
    is_own: bool


def read_lora(path: Path) -> LoraFeatures:
    """Measure the LoRA at `path`: a safetensors file, or a folder that holds exactly one.

    Raises CheckpointNotFound where there is none, CheckpointDamaged where it is cut off or not safetensors.
    """
    file = _find_file(path)
    with file.open("rb") as start:
        magic = start.read(9)
    # A safetensors header starts at the ninth byte; its length before that may begin like a pickle.
    if magic.startswith((b"PK", b"\x80")) and magic[8:] != b"{":
        raise CheckpointDamaged(
            f"{file} is a pickle, which can run code when it is read; expected a .safetensors file: "
            "fetch the LoRA in that form, or convert it where you trust it"
        )
    tensors, damage = read_safetensors_header(file)
    if damage:
        raise CheckpointDamaged(f"{file} {damage}; fetch it again")
    return LoraFeatures(file, tensors, MappingProxyType(_read_settings(file)))


def check_loras(loras: Iterable[LoraWeight]) -> None:
    """Raise what the files' headers tell already: CheckpointNotFound, or CheckpointDamaged for no LoRA."""
    for lora in loras:
        require_lora(lora)
        stored_pairs(read_lora(lora.path))


def stored_pairs(features: LoraFeatures) -> tuple[StoredPair, ...]:
    """All pairs of the file, by stored module name.

    Raises CheckpointDamaged where a tensor is none of A, B and alpha, or where one of a pair is missing.
    """
    found: dict[str, dict[str, TensorFacts]] = defaultdict(dict)
    strangers: list[str] = []
    for tensor in features.tensors:
        spelled = _read_name(tensor.name)
        if spelled is None:
            strangers.append(tensor.name)
            continue
        stem, spelling = spelled
        if not spelling.role:
            raise CheckpointDamaged(
                f"{features.path} cannot be used: {spelling.because} ({tensor.name}); expected plain "
                "LoRA pairs; fetch or train this LoRA in the plain form"
            )
        if spelling.role in found[stem]:
            raise CheckpointDamaged(
                f"{features.path} holds {spelling.role} of {stem} twice, as "
                f"{found[stem][spelling.role].name} and {tensor.name}; expected one; take a file of one LoRA"
            )
        found[stem][spelling.role] = tensor
    if strangers:
        raise CheckpointDamaged(
            f"{features.path}: {_told(strangers)} of its {len(features.tensors)} tensors belong to no LoRA; "
            "expected names that end in lora_A/lora_B.weight, lora_down/lora_up.weight or alpha; "
            "this may be a whole model: load it as one"
        )
    torn = [stem for stem, parts in found.items() if not {"A", "B"} <= parts.keys()]
    if torn:
        raise CheckpointDamaged(
            f"{features.path}: {_told(torn)} lack one of A and B; expected both a module; fetch it again"
        )
    if not found:
        raise CheckpointDamaged(f"{features.path} holds no tensors; expected LoRA pairs; fetch it again")
    pairs = tuple(
        StoredPair(stem, parts["A"], parts["B"], parts.get("alpha")) for stem, parts in sorted(found.items())
    )
    for pair in pairs:
        _check_pair(features.path, pair)
    return pairs


def spelling_of(name: str) -> Spelling | None:
    """How a stored name ends in the manner of LoRAs; None where it does not."""
    spelled = _read_name(name)
    return None if spelled is None else spelled[1]


def is_text_encoder(stem: str) -> bool:
    """Whether a stored module name belongs to a text encoder."""
    return TEXT_ENCODER.match(stem) is not None


def normalise(features: LoraFeatures, modules: Mapping[str, Shape]) -> LoraPlan:
    """Place every pair of the file in the denoiser whose module paths and weight shapes are `modules`.

    Raises CheckpointDamaged naming the first tensors that have no place there, or whose shapes do not fit.
    """
    pairs = stored_pairs(features)
    texts = [pair.a.name for pair in pairs if is_text_encoder(pair.stem)]
    if texts:
        raise CheckpointDamaged(
            f"{features.path}: {_told(texts)} are for a text encoder, which cannot be adapted in this model; "
            "expected pairs for the denoiser alone; take a LoRA trained without the text encoder"
        )
    spelled = _spelled(modules)
    placed = [(pair, _place(pair.stem, spelled)) for pair in pairs]
    _require_all_placed(features, placed, modules)
    places = [(pair, slot) for pair, slot in placed if slot is not None]
    own = {slot.modules[0] for _, slot in places if slot.is_own}
    dropped: dict[str, str] = {}
    adapted: dict[str, AdaptedModule] = {}
    for pair, slot in places:
        if not slot.is_own and own.issuperset(slot.modules):
            dropped |= dict.fromkeys(pair.sources, f"the same as the pairs of {', '.join(slot.modules)}")
            continue
        for module in _adapted(features, pair, slot, modules):
            if module.module in adapted:
                raise CheckpointDamaged(
                    f"{features.path} adapts {module.module} twice, with {adapted[module.module].a_source} "
                    f"and {module.a_source}; expected one pair a module; take a file of one LoRA"
                )
            adapted[module.module] = module
    return LoraPlan(features.path, tuple(adapted[name] for name in sorted(adapted)), dropped)


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointNotFound(f"there is no LoRA at {path}; expected a .safetensors file")
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointNotFound(
            f"{path} holds {len(files)} .safetensors files; expected one LoRA; name the file itself"
        )
    return files[0]


def _read_settings(file: Path) -> dict[str, Any]:
    """PEFT's settings: in the header (diffusers) or in adapter_config.json beside (PEFT); else {}."""
    with file.open("rb") as start:
        header = json.loads(start.read(int.from_bytes(start.read(8), "little")))
    beside = file.with_name("adapter_config.json")
    text = (header.get("__metadata__") or {}).get("lora_adapter_metadata")
    if text is None and file.name == "adapter_model.safetensors" and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    try:
        settings = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise CheckpointDamaged(
            f"the LoRA settings of {file} are not valid JSON ({error}); fetch it again"
        ) from error
    if not isinstance(settings, dict):
        raise CheckpointDamaged(f"the LoRA settings of {file} should be a JSON object, got {settings!r}")
    # diffusers names the component before each setting.
    return {key.removeprefix("transformer."): value for key, value in settings.items()}


def _read_name(name: str) -> tuple[str, Spelling] | None:
    """The module part of a stored name and how its end is spelled; None where no spelling fits."""
    for spelling in SPELLINGS:
        match = re.fullmatch(rf"(?P<stem>.+?)(?:{spelling.pattern})", name)
        if match is not None:
            return match["stem"], spelling
    return None


def _check_pair(path: Path, pair: StoredPair) -> None:
    a, b, alpha = pair.a, pair.b, pair.alpha
    fits = (
        len(a.shape) >= 2 and len(b.shape) >= 2 and 0 not in (*a.shape, *b.shape) and b.shape[1] == a.shape[0]
    )
    if not fits:
        raise CheckpointDamaged(
            f"{path}: {a.name} is {a.shape} and {b.name} is {b.shape}; expected (rank, in) and (out, rank); "
            "fetch it again"
        )
    if alpha is not None and math.prod(alpha.shape) != 1:
        raise CheckpointDamaged(f"{path}: {alpha.name} is {alpha.shape}; expected one number; fetch it again")


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _spelled(modules: Iterable[str]) -> Mapping[str, _Slot]:
    """What each spelled name stands for, with dots written as underscores, as some trainers do.

    Which underscore was a dot cannot be told from a name alone, so names are made from the modules, never the
    other way. Two modules of one spelling would be ambiguous: that name is left out.
    """
    slots: dict[str, _Slot | None] = {}
    for name, slot in _all_names(frozenset(modules)):
        known = slots.setdefault(_flat(name), slot)
        if known is not None and known.modules != slot.modules:
            slots[_flat(name)] = None
    return {name: slot for name, slot in slots.items() if slot is not None}


def _all_names(modules: frozenset[str]) -> Iterator[tuple[str, _Slot]]:
    for module in modules:
        yield module, _Slot((module,), True)
    for module in modules:
        for renaming in RENAMINGS:
            renamed = re.sub(renaming.ours, renaming.theirs, module)
            if renamed != module:
                yield renamed, _Slot((module,), False)
        block, _, last = module.rpartition(".")
        parts = tuple(f"{block}.{part}" for part in _FUSED)
        if last == _FUSED[0] and modules.issuperset(parts):
            for fused in _FUSED_SPELLINGS:
                yield f"{block}.{fused}", _Slot(parts, False)


def _place(stem: str, spelled: Mapping[str, _Slot]) -> _Slot | None:
    """What `stem` stands for after any prefixes; None where that is nothing, or not one thing."""
    found = {slot for name in _without_prefixes(_flat(stem)) if (slot := spelled.get(name)) is not None}
    return found.pop() if len(found) == 1 else None


def _without_prefixes(name: str) -> set[str]:
    """`name` and all that is left of it after taking prefixes off, one after another."""
    rests = {name}
    for prefix in map(_flat, PREFIXES):
        if name.startswith(prefix):
            rests |= _without_prefixes(name.removeprefix(prefix))
    return rests


def _require_all_placed(
    features: LoraFeatures, placed: Iterable[tuple[StoredPair, _Slot | None]], modules: Mapping[str, Shape]
) -> None:
    lost = [pair for pair, slot in placed if slot is None]
    if not lost:
        return
    count = sum(slot is not None for _, slot in placed)
    model = next((model for mark, model in FOREIGN if any(mark.search(pair.stem) for pair in lost)), "")
    example = next(iter(modules), "no module")
    raise CheckpointDamaged(
        f"{features.path}: {_told([pair.a.name for pair in lost])} fit nothing in this denoiser "
        f"({count} other pairs do); expected names such as {example}; this LoRA is for "
        f"{model or 'another model'}: take one made for this model"
    )


def _adapted(
    features: LoraFeatures, pair: StoredPair, slot: _Slot, modules: Mapping[str, Shape]
) -> Iterator[AdaptedModule]:
    heights = [modules[module][0] for module in slot.modules]
    shape = modules[slot.modules[0]]
    wide = {modules[module][1:] for module in slot.modules} == {
        _without_ones(pair.a.shape[1:], len(shape) - 1)
    }
    if len(shape) < 2 or not wide or pair.b.shape[0] != sum(heights):
        raise CheckpointDamaged(
            f"{features.path}: {pair.a.name} is {pair.a.shape} and {pair.b.name} is {pair.b.shape}; expected "
            f"({pair.rank}, {', '.join(map(str, shape[1:]))}) and ({sum(heights)}, {pair.rank}) for "
            f"{' and '.join(slot.modules)}; this LoRA is for a model of another size: "
            "take one made for this model"
        )
    start = 0
    for module, height in zip(slot.modules, heights, strict=True):
        yield AdaptedModule(
            module=module,
            a_source=pair.a.name,
            b_source=pair.b.name,
            b_rows=(start, start + height) if len(heights) > 1 else None,
            alpha_source=pair.alpha.name if pair.alpha is not None else None,
            scale=_scale(features.settings, module, pair.rank),
            rank=pair.rank,
        )
        start += height


def _without_ones(sides: Shape, count: int) -> Shape:
    """`sides` less the ones at its end beyond `count`: kohya stores some linear layers as convolutions."""
    return sides[:count] if set(sides[count:]) <= {1} else sides


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank as PEFT's settings say; 1 where they say nothing, as PEFT and diffusers have it."""
    patterns = settings.get("alpha_pattern") or {}
    special = (
        value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key.removeprefix('^')})", module)
    )
    alpha = next(special, settings.get("lora_alpha"))
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _told(names: list[str]) -> str:
    more = len(names) - _NAMES_TOLD
    return ", ".join(names[:_NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")
