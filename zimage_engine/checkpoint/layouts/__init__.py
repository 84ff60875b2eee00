"""Which models a set of stored tensors is, by names and shapes alone; knows no file and no pipeline.

Every row of `LAYOUTS` is asked, and exactly one may recognise a component's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from zimage_engine.checkpoint.keys import AVERAGE_RULES, CleanKeys, clean
from zimage_engine.checkpoint.layouts import pixart, text_encoders, unet, vae, z_image
from zimage_engine.checkpoint.layouts.rewrite import Drop, Layout, recipes
from zimage_engine.checkpoint.parts import Part, Recipe
from zimage_engine.checkpoint.repair import AppliedRepair, Repair
from zimage_engine.checkpoint.tensors import TensorFacts
from zimage_engine.errors import CheckpointDamaged

__all__ = ["LAYOUTS", "PartsFound", "read_parts"]

LAYOUTS: tuple[Layout, ...] = (
    *z_image.LAYOUTS,
    *pixart.LAYOUTS,
    *unet.LAYOUTS,
    *vae.LAYOUTS,
    *text_encoders.LAYOUTS,
)

_TRAINING = Drop(
    r"(?:optimizers?|optimizer_states?|lr_schedulers?|grad_scaler|scaler|callbacks|loops|loss_fn|loss|denoiser)"
    r"(?:\..+)?|epoch|global_step|step|steps|logvar|num_updates|decay|pytorch-lightning_version"
    r"|(?:sqrt_)?(?:one_minus_)?alphas_cumprod(?:_prev)?|betas",
    "training needs it, drawing does not",
)
_QUANT_MARKS = Drop(
    r"(?:.+\.)?(?:comfy_quant|input_scale|scale_input|scaled_fp8)",
    "it tells one program how to compute in fp8; the values are made whole here",
)
_SCALE = re.compile(r"(.+)\.(?:weight_scale|scale_weight)")
_NUNCHAKU = re.compile(r".+\.(?:qweight|wscales|proj_down)")

_DROP_TRAINING = Repair("drop-training-tensors", "training needs them, drawing does not")
_PARTIAL_AVERAGE = Repair(
    "leave-partial-average", "weights of which one part is averaged and the other is not were never one model"
)
_DEQUANTISE = Repair("apply-fp8-scales", "the stored values are the weights divided by their scale")


@dataclass(frozen=True, slots=True)
class PartsFound:
    """The models found, and the stored names that belong to none."""

    parts: tuple[Part, ...]
    unknown: tuple[str, ...] = field(repr=False, default=())


def read_parts(tensors: Iterable[TensorFacts]) -> PartsFound:
    """The models in `tensors`, those of one component's files together or of one single file.

    Raises CheckpointDamaged, naming a tensor, where two are one, where a shape cannot be the layout's, and
    for nunchaku files, whose packed weights only that program can read.
    """
    facts = {tensor.name: tensor for tensor in tensors}
    for name in facts:
        if _NUNCHAKU.fullmatch(name):
            raise CheckpointDamaged(
                f"this is a nunchaku file: the tensor {name!r} is packed in 4 bits, which only nunchaku "
                "reads; fetch the bf16, fp8 or GGUF file of the same model"
            )
    parts: list[Part] = []
    unknown: list[str] = []
    for keys in clean(facts):
        part, rest = _read_component(keys, facts)
        if part is not None:
            parts.append(part)
        unknown += rest
    return PartsFound(tuple(parts), tuple(sorted(unknown)))


def _read_component(keys: CleanKeys, facts: Mapping[str, TensorFacts]) -> tuple[Part | None, list[str]]:
    scales, dropped, stock_ignores, names = _set_aside(keys, facts)
    shapes = {name: facts[stored].shape for name, stored in names.items()}
    fitting = [layout for layout in LAYOUTS if layout.recognises(shapes)]
    if not fitting:
        return None, [*names.values(), *scales.values()]
    if len(fitting) > 1:
        found = " and ".join(f"{layout.class_name} ({layout.name})" for layout in fitting)
        raise CheckpointDamaged(
            f"the tensors are those of {found} at once, such as {next(iter(names.values()))!r}; "
            "give each model its own file"
        )
    layout = fitting[0]
    place = keys.component or layout.component or layout.class_name
    made: dict[str, Recipe] = {}
    rest: list[str] = []
    by_repair: dict[Repair, list[str]] = {}
    places = layout.places(shapes) if layout.places else {}
    rows = tuple((re.compile(row.pattern), row) for row in layout.rows)
    drops = tuple((re.compile(drop.pattern), drop) for drop in layout.drops)
    if keys.averaged:
        takes = [
            name for name in names if any(pattern.fullmatch(_placed(name, places)) for pattern, _ in rows)
        ]
        keys, left = _plain_where_average_is_partial(keys, takes)
        if left:
            names |= {name: keys.stored[name] for name in takes}
            shapes = {name: facts[stored].shape for name, stored in names.items()}
            dropped |= dict.fromkeys(left, _PARTIAL_AVERAGE.because)
            dropped = {stored: because for stored, because in dropped.items() if stored not in names.values()}
    for name, stored in names.items():
        placed = _placed(name, places)
        row, match = next(((r, m) for p, r in rows if (m := p.fullmatch(placed))), (None, None))
        if row is None or match is None:
            drop = next((d for p, d in drops if p.fullmatch(name)), None)
            if drop is None:
                rest.append(stored)
            else:
                dropped[stored] = drop.because
                stock_ignores = stock_ignores and drop.stock_ignores
            continue
        into = [match.expand(template) for template in row.into]
        new = recipes(row, into, stored, shapes[name], scales.pop(name, None))
        for recipe in new:
            if recipe.name in made:
                raise CheckpointDamaged(
                    f"the tensors {made[recipe.name].source!r} and {stored!r} are both {recipe.name!r} of "
                    "the model, and only one can be; remove one of them from the file or fetch it again"
                )
            made[recipe.name] = recipe
        repair = row.repair if row.repair or placed == name else layout.renumbering
        if repair and (into != [name] or new[0].shape != shapes[name]):
            by_repair.setdefault(repair, []).append(stored)
    if scales:
        name, stored = next(iter(scales.items()))
        raise CheckpointDamaged(
            f"the scale {stored!r} belongs to {name!r}, which is not there; fetch the file again"
        )
    is_stock = (
        not rest
        and stock_ignores
        and not keys.replaced
        and any(_reads_as(made.values(), prefix, layout) for prefix in layout.stock_prefixes)
        and all(_is_plain(recipe, facts[recipe.source]) for recipe in made.values())
    )
    part = Part(
        class_name=layout.class_name,
        layout=layout.name,
        component=keys.component or layout.component,
        is_stock=is_stock,
        recipes=tuple(made.values()),
        repairs=() if is_stock else _repairs(keys, by_repair, made.values(), dropped, place),
        dropped=dropped,
    )
    return part, rest


def _plain_where_average_is_partial(keys: CleanKeys, takes: list[str]) -> tuple[CleanKeys, list[str]]:
    """The keys with the plain weights wherever the average does not hold all that the model `takes`.

    Beside them the stored names that are left out for it. Raises CheckpointDamaged where neither is whole.
    """
    averaged = [name for name in takes if name in keys.averaged]
    if len(averaged) == len(takes) or not averaged:
        return keys, []
    alone = [name for name in averaged if name not in keys.plain]
    if alone:
        raise CheckpointDamaged(
            f"neither the averaged weights are whole ({len(averaged)} of {len(takes)} tensors) nor the plain "
            f"ones ({alone[0]!r} is there only averaged); fetch the file again"
        )
    left = [keys.stored[name] for name in averaged]
    stored = {**keys.stored, **{name: keys.plain[name] for name in averaged}}
    uses = tuple(use for use in keys.uses if use[0].name not in AVERAGE_RULES)
    return replace(keys, stored=stored, uses=(*uses, (_PARTIAL_AVERAGE, tuple(left)))), left


def _set_aside(
    keys: CleanKeys, facts: Mapping[str, TensorFacts]
) -> tuple[dict[str, str], dict[str, str], bool, dict[str, str]]:
    """The scales (weight -> stored scale), what is dropped, whether stock needs no help, the other names."""
    dropped = dict.fromkeys(keys.replaced, "the averaged weight of the same name is taken")
    scales: dict[str, str] = {}
    names: dict[str, str] = {}
    drops = [(re.compile(drop.pattern), drop) for drop in (_TRAINING, _QUANT_MARKS)]
    for name, stored in keys.stored.items():
        drop = next((drop for pattern, drop in drops if pattern.fullmatch(name)), None)
        scale = _SCALE.fullmatch(name)
        if drop:
            dropped[stored] = drop.because
        elif scale and (weight := f"{scale[1]}.weight") in keys.stored:
            _check_scale(facts[stored], facts[keys.stored[weight]])
            scales[weight] = stored
        else:
            names[name] = stored
    return scales, dropped, not dropped, names


def _check_scale(scale: TensorFacts, weight: TensorFacts) -> None:
    if not weight.dtype.startswith("F8_"):
        raise CheckpointDamaged(
            f"the tensor {weight.name!r} has a scale, so it should be fp8, got {weight.dtype}; "
            "fetch the bf16, fp8 or GGUF file of the same model"
        )
    if scale.shape not in ((), (1,)):
        raise CheckpointDamaged(
            f"the scale {scale.name!r} should be one number, got the shape {list(scale.shape)}; "
            "fetch the bf16, fp8 or GGUF file of the same model"
        )


def _placed(name: str, places: Mapping[str, str]) -> str:
    segments = name.split(".")
    for length in (4, 3, 2):
        place = places.get(".".join(segments[:length]))
        if place is not None:
            return ".".join([place, *segments[length:]])
    return name


def _reads_as(made: Iterable[Recipe], prefix: str, layout: Layout) -> bool:
    return all(
        recipe.source == prefix + recipe.name or _stock_name(recipe.source, layout) == recipe.name
        for recipe in made
    )


def _stock_name(stored: str, layout: Layout) -> str:
    for pattern, name in layout.stock_renames:
        if match := re.fullmatch(pattern, stored):
            return match.expand(name)
    return stored


def _is_plain(recipe: Recipe, stored: TensorFacts) -> bool:
    return (
        recipe.shape == stored.shape
        and recipe.scale is None
        and not recipe.transpose
        and not stored.dtype.startswith(("F8_", "GGUF:"))
    )


def _repairs(
    keys: CleanKeys,
    by_repair: Mapping[Repair, list[str]],
    made: Iterable[Recipe],
    dropped: Mapping[str, str],
    place: str,
) -> tuple[AppliedRepair, ...]:
    scaled = [recipe.source for recipe in made if recipe.scale]
    training = [stored for stored, because in dropped.items() if because == _TRAINING.because]
    done = [*keys.uses, *by_repair.items(), (_DEQUANTISE, scaled), (_DROP_TRAINING, training)]
    return tuple(
        AppliedRepair(repair, place, f"{len(names)} name{'s' * (len(names) > 1)}, such as {names[0]}")
        for repair, names in sorted(done, key=lambda entry: entry[0].name)
        if names
    )
