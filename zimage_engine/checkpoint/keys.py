"""Stored tensor names without what training and packing put around them; knows no model.

A name is taken apart at its dots. Each rule of `RULES` names whole segments, so no rule can see what another
one leaves behind in the middle of a word, and their order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from zimage_engine.checkpoint.repair import Repair
from zimage_engine.errors import CheckpointDamaged


@dataclass(frozen=True, slots=True)
class KeyRule:
    """Segments that are no part of a model's own names.

    `anywhere`: in any place of the path, else only in front. `is_average`: what stands behind it is the
    moving average of the weights, which wins over the plain weights where a file holds both.
    """

    name: str
    segments: frozenset[str]
    because: str
    anywhere: bool = False
    is_average: bool = False


RULES = (
    KeyRule(
        "strip-compile-prefix",
        frozenset({"_orig_mod"}),
        "torch.compile wraps each compiled module in a module of this name",
        anywhere=True,
    ),
    KeyRule(
        "strip-parallel-prefix",
        frozenset({"module"}),
        "DataParallel and its kin wrap each module in one of this name",
        anywhere=True,
    ),
    KeyRule(
        "strip-state-dict", frozenset({"state_dict"}), "training scripts keep the weights under this name"
    ),
    KeyRule(
        "take-averaged-weights",
        frozenset({"state_dict_ema", "ema", "model_ema"}),
        "the moving average is what the training kept for drawing",
        is_average=True,
    ),
    KeyRule(
        "strip-container-prefix",
        frozenset({"model", "diffusion_model", "transformer", "unet"}),
        "packed files name the model that holds the tensors, the model's own names do not",
    ),
)

AVERAGE_RULES = frozenset(rule.name for rule in RULES if rule.is_average)

#: Front of a path -> the pipeline's component. What a packed file calls its parts.
COMPONENT_PREFIXES = {
    ("vae",): "vae",
    ("first_stage_model",): "vae",
    ("text_encoder",): "text_encoder",
    ("text_encoder_2",): "text_encoder_2",
    ("conditioner", "embedders", "0"): "text_encoder",
    ("conditioner", "embedders", "1"): "text_encoder_2",
    ("text_encoders", "qwen3_4b"): "text_encoder",
    ("text_encoders", "clip_l"): "text_encoder",
    ("text_encoders", "clip_g"): "text_encoder_2",
    ("text_encoders", "t5xxl"): "text_encoder",
}

#: What the detached averages of latent-diffusion training begin with, their dots left out.
_FLAT_AVERAGE = "diffusion_model"


@dataclass(frozen=True, slots=True)
class CleanKeys:
    """One component's names: clean -> stored, and for each rule the stored names that it changed.

    `averaged` are the clean names whose stored tensor is the moving average, `plain` has the stored names of
    the plain tensors that those took the place of; `replaced` are their stored names.
    """

    component: str
    stored: dict[str, str] = field(repr=False)
    uses: tuple[tuple[Repair, tuple[str, ...]], ...] = ()
    replaced: tuple[str, ...] = field(repr=False, default=())
    averaged: frozenset[str] = field(repr=False, default=frozenset())
    plain: Mapping[str, str] = field(repr=False, default_factory=dict)


def clean(names: Iterable[str], rules: Sequence[KeyRule] = RULES) -> tuple[CleanKeys, ...]:
    """The clean names of each component in `names`; the denoiser's or a lone model's component is "".

    Where a file holds a tensor plain and averaged the averaged one is taken, the plain one is in `replaced`.
    Raises CheckpointDamaged where two stored names become the same clean one.
    """
    found: dict[str, dict[str, tuple[str, bool]]] = {}
    used: dict[str, dict[str, list[str]]] = {}
    replaced: dict[str, dict[str, str]] = {}
    flat = []
    for name in names:
        component, rest, names_of_rules = _take_apart(name, rules)
        averages = any(rule.name in names_of_rules and rule.is_average for rule in rules)
        if averages and len(rest) == 1 and rest[0].startswith(_FLAT_AVERAGE):
            flat.append((name, rest[0].removeprefix(_FLAT_AVERAGE)))
            continue
        own = found.setdefault(component, {})
        _add(own, ".".join(rest), name, averages, replaced.setdefault(component, {}))
        for rule_name in names_of_rules:
            used.setdefault(component, {}).setdefault(rule_name, []).append(name)
    whole = {clean_name.replace(".", ""): clean_name for clean_name in found.get("", {})}
    average_rules = [rule.name for rule in rules if rule.is_average]
    for name, flat_name in flat:
        own = found.setdefault("", {})
        _add(own, whole.get(flat_name, flat_name), name, True, replaced.setdefault("", {}))
        used.setdefault("", {}).setdefault(average_rules[0], []).append(name)
    by_name = {rule.name: Repair(rule.name, rule.because) for rule in rules}
    return tuple(
        CleanKeys(
            component,
            {clean_name: stored for clean_name, (stored, _) in own.items()},
            tuple((by_name[rule], tuple(used[component][rule])) for rule in sorted(used.get(component, {}))),
            tuple(replaced.get(component, {}).values()),
            frozenset(clean_name for clean_name, (_, averages) in own.items() if averages),
            replaced.get(component, {}),
        )
        for component, own in sorted(found.items())
    )


def _take_apart(name: str, rules: Sequence[KeyRule]) -> tuple[str, list[str], list[str]]:
    """The component, the segments that are left, and the names of the rules that took some away."""
    everywhere = {segment: rule.name for rule in rules if rule.anywhere for segment in rule.segments}
    in_front = {segment: rule.name for rule in rules for segment in rule.segments}
    segments = name.split(".")
    took = [everywhere[segment] for segment in segments[:-1] if segment in everywhere]
    segments = [segment for segment in segments[:-1] if segment not in everywhere] + segments[-1:]
    component = ""
    while len(segments) > 1:
        prefix = next((p for p in COMPONENT_PREFIXES if tuple(segments[: len(p)]) == p), None)
        if segments[0] in in_front:
            took.append(in_front[segments.pop(0)])
        elif prefix and not component and len(segments) > len(prefix):
            component = COMPONENT_PREFIXES[prefix]
            segments = segments[len(prefix) :]
        else:
            break
    return component, segments, sorted(set(took))


def _add(
    own: dict[str, tuple[str, bool]], clean_name: str, stored: str, averages: bool, replaced: dict[str, str]
) -> None:
    other = own.get(clean_name)
    if other is None:
        own[clean_name] = (stored, averages)
    elif other[1] == averages:
        raise CheckpointDamaged(
            f"the tensors {other[0]!r} and {stored!r} are both {clean_name!r} of the model, and only one "
            "can be; remove one of them from the file or fetch it again"
        )
    else:
        winner, loser = ((stored, averages), other[0]) if averages else (other, stored)
        own[clean_name] = winner
        replaced[clean_name] = loser
