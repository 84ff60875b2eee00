"""Decides where the weights lie while a picture is drawn: the fastest way that fits. Pure; knows no torch.

    plan = plan_offload(footprint, 1024, 1024, guided=True, free_bytes=free, reserve_bytes=RESERVE_BYTES)
    plan.because    # "STREAM with 21 of 30 blocks resident: ..."

Every way has a formula for the bytes of each stage (encode, denoise, decode) and one for its seconds. The
bytes are exact for weights and calibrated for activations. The seconds rest on assumed rates (DeviceSpeed)
and serve to compare ways on one machine, not to promise times.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from zimage_engine.errors import DoesNotFit
from zimage_engine.families import ModelFamily, family_named
from zimage_engine.memory.activations import (
    DECODE_WORKSPACE_SHARE,
    ROUNDING_SHARE,
    WORKSPACE_BYTES,
    activation_bytes,
    block_rows,
    decode_bytes,
    decode_flops,
    denoise_flops,
    encode_bytes,
    latent_px_of,
    size_multiple,
)
from zimage_engine.memory.footprint import streamed_first
from zimage_engine.memory.residency import (
    QUANTISATIONS,
    ComponentFootprint,
    Footprint,
    OffloadPlan,
    Residency,
)

#: Kept free of the device for what the program cannot foresee.
RESERVE_BYTES = 512 * 2**20
#: What CUDA itself takes of a card before anything is allocated. Not measured:
#: it is said to be 0.3 to 0.6 GB.
CONTEXT_BYTES = 512 * 2**20
#: Blocks on the device at a time of those that are streamed.
_PLACES = 2
#: Fetches for each block where layers come one by one: its matrices, norms and modulation.
_LAYERS_A_BLOCK = 12
#: Sides of the VAE's pieces, the fastest first. At 1024 px a tile of the VAE's own size would be the whole.
TILE_SIDES_PX = (512, 256)
#: Pieces overlap by a quarter on each side, so that much of the picture is decoded more than once.
_TILED_DECODE_FACTOR = (4 / 3) ** 2


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Rates that times are computed from. The defaults are assumptions, of a 12 GB card on PCIe 4.0 x16.

    `fetch_seconds` is what a fetch costs beside its bytes: starting the copy and waiting for its event.
    """

    flops_per_second: float = 60e12
    bus_bytes_per_second: float = 20e9
    disk_bytes_per_second: float = 2e9
    fetch_seconds: float = 0.0003


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What whoever asks has decided already.

    `offload` None: the planner chooses. `vram_limit_bytes` is the most that may be used of the device,
    `host_free_bytes` what the host has for weights that are not on the device; None for both: no limit.
    `vae_tile_px` None: whole where it fits, else in pieces; 0: never in pieces; else this side.
    `plain_attention`: the device has no fused kernels, so the matrix of all pairs is made. `steps` None: the
    family's own number.
    """

    offload: Residency | None = None
    vram_limit_bytes: int | None = None
    host_free_bytes: int | None = None
    vae_tile_px: int | None = None
    plain_attention: bool = False
    pictures: int = 1
    steps: int | None = None
    speed: DeviceSpeed = field(default_factory=DeviceSpeed)


def plan_offload(
    footprint: Footprint,
    width_px: int,
    height_px: int,
    *,
    guided: bool,
    free_bytes: int | None,
    reserve_bytes: int = RESERVE_BYTES,
    options: PlanOptions | None = None,
) -> OffloadPlan:
    """The fastest way to draw this size that fits in `free_bytes` without `reserve_bytes`.

    `free_bytes` counts what the model may take: what is free now and what its own weights already hold; None
    for the CPU, where all is resident. Raises DoesNotFit, with the largest size of the same aspect that fits.
    """
    asked = options or PlanOptions()
    budget = budget_bytes(free_bytes, reserve_bytes, asked)
    ways = _ways(footprint, width_px, height_px, guided, asked, is_host=free_bytes is None)
    fitting = [way for way in ways if _fits(way, budget, asked)]
    if not fitting:
        raise _does_not_fit(footprint, width_px, height_px, guided, budget, asked, ways)
    chosen = min(fitting, key=_fastest)
    because = _because(chosen, ways, budget, asked, is_host=free_bytes is None)
    if footprint.quantize is not None:
        because += "; pictures differ a little from those of matrices that are not quantised"
    return replace(chosen.plan, because=because)


def all_options(
    footprint: Footprint,
    width_px: int,
    height_px: int,
    *,
    guided: bool,
    free_bytes: int | None,
    reserve_bytes: int = RESERVE_BYTES,
    options: PlanOptions | None = None,
) -> tuple[OffloadPlan, ...]:
    """One plan of each kind, for a table: the fastest of the kind that fits, or the leanest where none does.

    `because` says whether it fits. An `offload` in the options leaves the others in the table.
    """
    asked = options or PlanOptions()
    budget = budget_bytes(free_bytes, reserve_bytes, asked)
    ways = _ways(
        footprint, width_px, height_px, guided, replace(asked, offload=None), is_host=free_bytes is None
    )
    rows = []
    for kind in sorted({way.kind for way in ways}):
        alike = [way for way in ways if way.kind == kind]
        fitting = [way for way in alike if _fits(way, budget, asked)]
        best = min(fitting, key=_fastest) if fitting else min(alike, key=_leanest_whole)
        rows.append(replace(best.plan, because=_fitness(best, budget, asked)))
    return tuple(dict.fromkeys(rows))


def budget_bytes(
    free_bytes: int | None, reserve_bytes: int, options: PlanOptions | None = None
) -> int | None:
    """What a plan may take; None where nothing limits it."""
    limits = [free_bytes, options.vram_limit_bytes if options else None]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known) - reserve_bytes) if known else None


def title(plan: OffloadPlan) -> str:
    """A plan's way in a few words, such as `stream, 12 of 30 blocks resident`."""
    words = {
        Residency.NONE: "all resident",
        Residency.MODEL: "model: components take turns",
        Residency.STREAM: f"stream: {plan.resident_blocks} of {plan.blocks} blocks resident",
        Residency.SEQUENTIAL: "sequential: every layer fetched",
        Residency.DISK: "disk: every layer read",
    }[plan.residency]
    if plan.residency is Residency.NONE and plan.stream_text_encoder:
        words = "resident, text encoder streamed"
    elif plan.residency is Residency.NONE and plan.release_text_encoder:
        words = "resident, text encoder released"
    if plan.vae_tile_px is not None:
        words += f", VAE in {plan.vae_tile_px} px tiles"
    if plan.quantize is not None:
        words += f", matrices in {plan.quantize}"
    return words


@dataclass(frozen=True, slots=True)
class _Way:
    """A plan with what it is judged by; `kind` orders ways from the simplest."""

    kind: int
    plan: OffloadPlan
    seconds: float


@dataclass(frozen=True, slots=True)
class _Stages:
    """What lies on the device in each stage beside activations, and what the way costs beside computing."""

    kind: int
    residency: Residency
    encode: int
    denoise: int
    decode: int
    encode_seconds: float
    step_seconds: float
    once_seconds: float = 0.0
    release: bool = False
    stream_text: bool = False
    streamed: tuple[str, ...] = ()
    host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Costs:
    """What computing takes, with everything in place, in seconds."""

    encode: float
    step: float
    decode: float
    steps: int


def _ways(
    footprint: Footprint, width_px: int, height_px: int, guided: bool, asked: PlanOptions, *, is_host: bool
) -> tuple[_Way, ...]:
    """Every way there is, with every tile side that divides this picture; those asked for, where any are."""
    family = family_named(footprint.family)
    costs = _costs(footprint, family, width_px, height_px, guided, asked)
    working = _working_bytes(footprint, family, width_px, height_px, guided, asked)
    # Activations are calibrated in bfloat16.
    wider = footprint.value_bytes // 2
    found = []
    for stages in _stages(footprint, costs, asked.speed, is_host=is_host):
        if asked.offload not in (None, stages.residency):
            continue
        for tile, decoding in working.decode_by_tile.items():
            weights_and_work = max(
                stages.encode + wider * working.encode,
                stages.denoise + wider * working.denoise,
                stages.decode + wider * decoding,
            )
            found.append(_way(footprint, stages, costs, tile, weights_and_work, width_px, height_px, guided))
    return tuple(found)


def _way(
    footprint: Footprint,
    stages: _Stages,
    costs: _Costs,
    tile: int | None,
    weights_and_work: int,
    width_px: int,
    height_px: int,
    guided: bool,
) -> _Way:
    resident = costs.encode + costs.steps * costs.step + costs.decode
    seconds = (
        stages.encode_seconds
        + costs.steps * stages.step_seconds
        + stages.once_seconds
        + costs.decode * (_TILED_DECODE_FACTOR if tile else 1.0)
    )
    blocks = len(footprint.components[footprint.denoiser].blocks)
    keeps_blocks = stages.residency in (Residency.NONE, Residency.MODEL, Residency.STREAM)
    plan = OffloadPlan(
        residency=stages.residency,
        blocks=blocks,
        resident_blocks=blocks - len(stages.streamed) if keeps_blocks else 0,
        release_text_encoder=stages.release,
        vae_tile_px=tile,
        float8_storage=footprint.float8_storage,
        quantize=footprint.quantize,
        peak_bytes=math.ceil(weights_and_work * (1 + ROUNDING_SHARE)) + WORKSPACE_BYTES,
        relative_speed=resident / seconds,
        width_px=width_px,
        height_px=height_px,
        guided=guided,
        because="",
        stream_text_encoder=stages.stream_text,
        streamed_blocks=stages.streamed,
        host_bytes=stages.host_bytes,
    )
    return _Way(stages.kind, plan, seconds)


def _stages(footprint: Footprint, costs: _Costs, speed: DeviceSpeed, *, is_host: bool) -> Iterator[_Stages]:
    """The ways, the simplest first, as weights on the device in each stage and as seconds."""
    denoiser = footprint.components[footprint.denoiser]
    texts = [footprint.components[name] for name in footprint.text_encoders]
    drawing = footprint.bytes - sum(text.bytes for text in texts)
    vae_bytes = drawing - denoiser.bytes
    text_bytes = sum(text.bytes for text in texts)
    # Text encoders come one after the other, so the largest decides.
    whole_text = max((text.bytes for text in texts), default=0)
    text_in_pieces = max((_streamed_peak(text) for text in texts), default=0)
    # Float8 weights are made bfloat16 layer by layer as they are used.
    widened = 2 * denoiser.largest_module_bytes if footprint.float8_storage else 0
    if footprint.quantize is not None:
        copies = QUANTISATIONS[footprint.quantize].working_copies
        widened = copies * denoiser.largest_quantised_bytes
    bus = speed.bus_bytes_per_second
    all_bytes = footprint.bytes
    yield _Stages(
        0,
        Residency.NONE,
        all_bytes,
        all_bytes + widened,
        all_bytes,
        costs.encode,
        costs.step,
    )
    if is_host:
        return
    text_fetches = speed.fetch_seconds * sum(len(text.blocks) + 1 for text in texts)
    streamed_text_seconds = max(costs.encode, text_bytes / bus) + text_fetches
    yield _Stages(
        1,
        Residency.NONE,
        drawing + whole_text,
        drawing + widened,
        drawing,
        costs.encode + text_bytes / bus,
        costs.step,
        release=True,
        host_bytes=text_bytes,
    )
    yield _Stages(
        2,
        Residency.NONE,
        drawing + text_in_pieces,
        drawing + widened,
        drawing,
        streamed_text_seconds,
        costs.step,
        release=True,
        stream_text=True,
        host_bytes=text_bytes,
    )
    yield _Stages(
        3,
        Residency.MODEL,
        whole_text,
        denoiser.bytes + widened,
        vae_bytes,
        costs.encode,
        costs.step,
        # One way: weights are not changed, so what leaves the device is forgotten.
        once_seconds=all_bytes / bus,
        release=True,
        host_bytes=all_bytes,
    )
    order = streamed_first(tuple(denoiser.blocks))
    for count in range(1, len(order) + 1):
        leaving = set(order[:count])
        streamed = tuple(path for path in denoiser.blocks if path in leaving)
        streamed_bytes = sum(denoiser.blocks[path] for path in streamed)
        staying = drawing - streamed_bytes
        yield _Stages(
            4 if count < len(order) else 5,
            Residency.STREAM,
            staying + text_in_pieces,
            staying + widened + _in_flight(denoiser, streamed),
            staying,
            streamed_text_seconds,
            max(costs.step, streamed_bytes / bus) + count * speed.fetch_seconds,
            release=True,
            stream_text=True,
            streamed=streamed,
            host_bytes=text_bytes + streamed_bytes,
        )
    for kind, residency, rate, host_bytes in (
        (6, Residency.SEQUENTIAL, bus, all_bytes),
        (7, Residency.DISK, min(bus, speed.disk_bytes_per_second), 0),
    ):
        if footprint.quantize is not None and residency is Residency.SEQUENTIAL:
            continue  # MemoryWishes says why
        fetches = speed.fetch_seconds * _LAYERS_A_BLOCK
        yield _Stages(
            kind,
            residency,
            max((_layers_peak(text, residency) for text in texts), default=0),
            _layers_peak(denoiser, residency) + widened,
            _layers_peak(footprint.components[footprint.vae], residency),
            max(costs.encode, text_bytes / rate) + text_fetches * _LAYERS_A_BLOCK,
            max(costs.step, denoiser.bytes / rate) + (len(order) + 1) * fetches,
            once_seconds=vae_bytes / rate,
            release=True,
            stream_text=True,
            streamed=tuple(denoiser.blocks),
            host_bytes=host_bytes,
        )


def _layers_peak(component: ComponentFootprint, residency: Residency) -> int:
    """What is there of a component whose layers come one by one, the next ahead of its turn.

    From the disk they come to two places as large as the largest; else each is allocated for itself.
    """
    if residency is Residency.DISK:
        return _PLACES * component.largest_module_bytes
    return component.two_largest_modules_bytes


def _in_flight(component: ComponentFootprint, streamed: Sequence[str]) -> int:
    """The two places that streamed blocks come to, each as large as the largest: one is at work while the
    next arrives. A single block needs one."""
    sizes = [component.blocks[path] for path in streamed]
    return min(_PLACES, len(sizes)) * max(sizes, default=0)


def _streamed_peak(component: ComponentFootprint) -> int:
    """What a component takes whose blocks are all streamed; one without blocks comes whole."""
    return component.other_bytes + _in_flight(component, tuple(component.blocks))


@dataclass(frozen=True, slots=True)
class _Working:
    """Bytes that the stages make beside the weights."""

    encode: int
    denoise: int
    decode_by_tile: dict[int | None, int]


def _working_bytes(
    footprint: Footprint,
    family: ModelFamily,
    width_px: int,
    height_px: int,
    guided: bool,
    asked: PlanOptions,
) -> _Working:
    configs = footprint.configs
    vae = configs[footprint.vae]
    sides = TILE_SIDES_PX if asked.vae_tile_px is None else (asked.vae_tile_px,) if asked.vae_tile_px else ()
    tiles = [side for side in sides if side < max(width_px, height_px)]
    whole: list[int | None] = [] if asked.vae_tile_px and tiles else [None]
    return _Working(
        encode=max(
            (
                encode_bytes(family, name, configs[name], configs[footprint.denoiser])
                for name in footprint.text_encoders
            ),
            default=0,
        ),
        denoise=activation_bytes(
            family,
            configs[footprint.denoiser],
            width_px,
            height_px,
            guided,
            plain_attention=asked.plain_attention,
            pictures=asked.pictures,
            latent_px=latent_px_of(vae),
        )
        + _narrowing_bytes(footprint, family, width_px, height_px, guided, asked),
        decode_by_tile={
            tile: math.ceil(
                (1 + DECODE_WORKSPACE_SHARE)
                * decode_bytes(
                    vae,
                    width_px,
                    height_px,
                    tile,
                    plain_attention=asked.plain_attention,
                    pictures=asked.pictures,
                )
            )
            for tile in (*whole, *tiles)
        },
    )


def _narrowing_bytes(
    footprint: Footprint,
    family: ModelFamily,
    width_px: int,
    height_px: int,
    guided: bool,
    asked: PlanOptions,
) -> int:
    """What eager code makes at most to narrow activations, on top of all else that is there at the peak."""
    if footprint.quantize is None:
        return 0
    shapes = footprint.components[footprint.denoiser].quantised_shapes
    rows = block_rows(
        family,
        footprint.configs[footprint.denoiser],
        width_px,
        height_px,
        guided,
        pictures=asked.pictures,
        latent_px=latent_px_of(footprint.configs[footprint.vae]),
    )
    return rows * QUANTISATIONS[footprint.quantize].token_bytes(shapes)


def _costs(
    footprint: Footprint,
    family: ModelFamily,
    width_px: int,
    height_px: int,
    guided: bool,
    asked: PlanOptions,
) -> _Costs:
    configs = footprint.configs
    rate = asked.speed.flops_per_second
    tokens = family.caption_tokens(configs[footprint.denoiser])
    values = sum(footprint.components[name].bytes for name in footprint.text_encoders) / footprint.value_bytes
    is_small = footprint.float8_storage or footprint.quantize is not None
    stored_bytes = 1 if is_small else footprint.value_bytes
    denoiser_values = footprint.components[footprint.denoiser].bytes / stored_bytes
    return _Costs(
        encode=2 * values * tokens * (1 + guided) / rate,
        step=asked.pictures
        * denoise_flops(
            family,
            configs[footprint.denoiser],
            denoiser_values,
            width_px,
            height_px,
            guided,
            latent_px_of(configs[footprint.vae]),
        )
        / rate,
        decode=asked.pictures * decode_flops(configs[footprint.vae], width_px, height_px) / rate,
        steps=asked.steps or family.default_steps,
    )


def _fits(way: _Way, budget: int | None, asked: PlanOptions) -> bool:
    on_device = budget is None or way.plan.peak_bytes <= budget
    on_host = asked.host_free_bytes is None or way.plan.host_bytes <= asked.host_free_bytes
    return on_device and on_host


def _fastest(way: _Way) -> tuple[float, int, int, int]:
    """Orders ways: the shortest time; at the same, the simplest, whole before tiled, most blocks resident."""
    return (way.seconds, way.kind, -(way.plan.vae_tile_px or 10**9), -way.plan.resident_blocks)


def _leanest_whole(way: _Way) -> tuple[bool, int]:
    """Orders ways that do not fit: the least memory without tiles, which would be another picture."""
    return (way.plan.vae_tile_px is not None, way.plan.peak_bytes)


def _because(
    chosen: _Way, ways: Sequence[_Way], budget: int | None, asked: PlanOptions, *, is_host: bool
) -> str:
    """In one line why this way: what the next faster would have needed."""
    plan = chosen.plan
    if is_host:
        return f"{title(plan)}: weights and pictures share the host's memory, so nothing is moved"
    needs = f"{title(plan)}: needs {gib(plan.peak_bytes)}"
    if budget is None:
        return f"{needs}, and nothing limits it"
    fits = f"{needs} of the {gib(budget)} there are"
    faster = [way for way in ways if _fastest(way) < _fastest(chosen)]
    asked_for = f"; offload {asked.offload.value} was asked for" if asked.offload is not None else ""
    if not faster:
        return fits + asked_for
    next_faster = max(
        (way for way in faster if way.plan.vae_tile_px is None), key=_fastest, default=faster[0]
    )
    if budget is not None and next_faster.plan.peak_bytes > budget:
        return f"{fits}; {title(next_faster.plan)} would need {gib(next_faster.plan.peak_bytes)}{asked_for}"
    host = gib(asked.host_free_bytes or 0)
    return (
        f"{fits}; {title(next_faster.plan)} would put {gib(next_faster.plan.host_bytes)} into the host's "
        f"memory, which has {host}{asked_for}"
    )


def _fitness(way: _Way, budget: int | None, asked: PlanOptions) -> str:
    if _fits(way, budget, asked):
        return "fits"
    if budget is not None and way.plan.peak_bytes > budget:
        return f"needs {gib(way.plan.peak_bytes - budget)} more"
    return f"needs {gib(way.plan.host_bytes)} of the host's memory"


def _does_not_fit(
    footprint: Footprint,
    width_px: int,
    height_px: int,
    guided: bool,
    budget: int | None,
    asked: PlanOptions,
    ways: Sequence[_Way],
) -> DoesNotFit:
    leanest = min(ways, key=lambda way: way.plan.peak_bytes)
    largest = largest_size(footprint, width_px, height_px, guided, budget, asked)
    forced = f" with offload {asked.offload.value}" if asked.offload is not None else ""
    needs = (
        f"{width_px}x{height_px}{forced} needs {gib(leanest.plan.peak_bytes)} of the device's memory "
        f"({title(leanest.plan)}), and {gib(budget or 0)} may be used"
    )
    if leanest.plan.peak_bytes <= (budget if budget is not None else leanest.plan.peak_bytes):
        needs = (
            f"{width_px}x{height_px}{forced} needs {gib(leanest.plan.host_bytes)} of the host's memory for "
            f"weights, which has {gib(asked.host_free_bytes or 0)}"
        )
    advice = (
        f"the largest size of this shape that fits is {largest[0]}x{largest[1]}"
        if largest is not None
        else "no size fits; allow more memory"
        + (" or leave the choice of offload to the program" if asked.offload is not None else "")
    )
    return DoesNotFit(f"{needs}; {advice}", largest, leanest.plan.peak_bytes, budget)


def largest_size(
    footprint: Footprint,
    width_px: int,
    height_px: int,
    guided: bool,
    budget: int | None,
    asked: PlanOptions,
) -> tuple[int, int] | None:
    """The largest smaller size of about the same aspect, on the model's grid, that some way fits.

    `budget` is in bytes, None: no limit. None where no size fits.
    """
    family = family_named(footprint.family)
    multiple = size_multiple(family, footprint.configs[footprint.vae])
    longer = max(width_px, height_px)

    def size_at(count: int) -> tuple[int, int]:
        side = count * multiple
        return (
            width_px * side // longer // multiple * multiple,
            height_px * side // longer // multiple * multiple,
        )

    def is_too_big(count: int) -> bool:
        size = size_at(count)
        # A side of nothing is no picture; it comes first, so it counts as fitting.
        if not all(size):
            return False
        ways = _ways(footprint, *size, guided, asked, is_host=False)
        return not any(_fits(way, budget, asked) for way in ways)

    # No way needs less for a larger picture, so those that fit come before those that do not.
    fitting = bisect_left(range(1, (longer - 1) // multiple + 1), True, key=is_too_big)
    largest = size_at(fitting)
    return largest if all(largest) else None


def gib(size_bytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{size_bytes / 2**30:.2f} GiB"
