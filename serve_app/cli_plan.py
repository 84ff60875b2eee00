"""`zimage-turbo plan`: where a model's weights would lie on a card of a given size, and how fast that is.

Reads headers and configs only: no weights, no torch, no GPU.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve_app.terminal import say
from zimage_engine.errors import DoesNotFit, EngineError, InvalidRequest, InvalidSize
from zimage_engine.memory.residency import MemoryWishes, OffloadPlan, Residency, parse_memory

if TYPE_CHECKING:
    from zimage_engine.families import ModelFamily
    from zimage_engine.memory.residency import Footprint

EXIT_FAILED = 1
EXIT_INVALID_INPUT = 2

#: What a name stands for that is no path: the product's own name is its first family's.
_ALIASES = {"zimage-turbo": "z-image-turbo"}
_AUTO = "auto"


def plan(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="PATH|ID|FAMILY",
            help="A model folder, file or hub id; or a family (zimage-turbo, sdxl, ...) as it was published.",
            show_default=False,
        ),
    ],
    vram: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Memory of the card, such as 12GiB or 8G.", show_default=False),
    ],
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH", help="Width and height in pixels (default: the model's own).", show_default=False
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Guidance; at 1 or less it is off (default: the model's own).",
            show_default=False,
        ),
    ] = None,
    offload: Annotated[
        str, typer.Option(metavar="WAY", help="auto, none, model, stream, sequential or disk.")
    ] = _AUTO,
    float8: Annotated[
        bool, typer.Option("--float8", help="Keep the denoiser's matrices in float8, half the size.")
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="Quantise the denoiser's matrices: int8, fp8, int8-dynamic or fp8-dynamic.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Host memory for what is not on the card (default: enough).",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say what would be kept on a card and what fetched, with the memory and speed of every way.

    Peaks are the model's own; the card's driver and a reserve are taken off beforehand. Speeds rest on
    assumed rates of a card with 60 TFLOP/s on a bus of 20 GB/s.
    """
    from zimage_engine.memory.planner import (
        CONTEXT_BYTES,
        RESERVE_BYTES,
        PlanOptions,
        all_options,
        budget_bytes,
        plan_offload,
    )

    try:
        way = _residency(offload)
        MemoryWishes(offload=None if way is None else way.value, float8=float8, quantize=quantize)
        family, footprint = _footprint(model, float8, quantize)
        width, height = _size(size, family, footprint)
        guided = (family.default_guidance_scale if guidance is None else guidance) > 1
        card_bytes = parse_memory(vram, "--vram")
        options = PlanOptions(
            offload=way,
            host_free_bytes=None if host is None else parse_memory(host, "--host"),
        )
        reserve = CONTEXT_BYTES + RESERVE_BYTES
        rows = all_options(
            footprint,
            width,
            height,
            guided=guided,
            free_bytes=card_bytes,
            reserve_bytes=reserve,
            options=options,
        )
        chosen: OffloadPlan | None = None
        refusal: DoesNotFit | None = None
        try:
            chosen = plan_offload(
                footprint,
                width,
                height,
                guided=guided,
                free_bytes=card_bytes,
                reserve_bytes=reserve,
                options=options,
            )
        except DoesNotFit as too_big:
            refusal = too_big
    except EngineError as wrong:
        if as_json:
            typer.echo(json.dumps({"error": type(wrong).__name__, "message": str(wrong)}, ensure_ascii=False))
        say(f"zimage-turbo: {wrong}")
        raise typer.Exit(EXIT_INVALID_INPUT if isinstance(wrong, InvalidRequest) else EXIT_FAILED) from None
    facts = {
        "model": model,
        "family": family.name,
        "source": footprint.source,
        "width": width,
        "height": height,
        "guided": guided,
        "quantize": quantize,
        "vram_bytes": card_bytes,
        "budget_bytes": budget_bytes(card_bytes, reserve, options),
    }
    if as_json:
        typer.echo(
            json.dumps(_as_json(facts, footprint, rows, chosen, refusal), ensure_ascii=False, indent=2)
        )
    else:
        _print_table(facts, footprint, rows, chosen, refusal)
    if refusal is not None:
        raise typer.Exit(EXIT_FAILED)


def _footprint(model: str, float8: bool, quantize: str | None) -> tuple[ModelFamily, Footprint]:
    """The family and the weights of a published model, a folder, a file or a hub id."""
    from zimage_engine.families import FAMILIES
    from zimage_engine.memory.footprint import footprint_from_shapes, published_footprint

    name = _ALIASES.get(model, model)
    family = next((family for family in FAMILIES if family.name == name), None)
    if family is not None:
        return family, published_footprint(family, float8_storage=float8, quantize=quantize)
    from zimage_engine import ModelLoaderAdapter

    mending = ModelLoaderAdapter(model).mending
    footprint = footprint_from_shapes(
        mending.family,
        {found.name: found.shapes for found in mending.models},
        {found.name: found.config for found in mending.models},
        f"the headers of {model}",
        float8_storage=float8,
        quantize=quantize,
    )
    return mending.family, footprint


def _size(text: str | None, family: ModelFamily, footprint: Footprint) -> tuple[int, int]:
    """Width and height on the model's grid. Raises InvalidSize, which names what would do."""
    from zimage_engine.memory.activations import native_side_px, size_multiple

    denoiser, vae = footprint.configs[footprint.denoiser], footprint.configs[footprint.vae]
    multiple = size_multiple(family, vae)
    largest = family.max_side_px(denoiser, multiple) // multiple * multiple
    if text is None:
        side = native_side_px(family, denoiser, vae)
        return side, side
    found = re.fullmatch(r"(\d{1,6})\s*[xX×*]\s*(\d{1,6})", text.strip())
    if found is None:
        raise InvalidSize(f"--size must be width x height in pixels, such as 1024x1024, got {text[:40]!r}")
    for side in map(int, found.groups()):
        if not multiple <= side <= largest or side % multiple:
            raise InvalidSize(
                f"--size takes multiples of {multiple} up to {largest} for this model, got {side}"
            )
    return int(found[1]), int(found[2])


def _residency(text: str) -> Residency | None:
    word = text.strip().lower()
    if word == _AUTO:
        return None
    try:
        return Residency(word)
    except ValueError:
        words = ", ".join((_AUTO, *(way.value for way in Residency)))
        raise InvalidRequest(f"--offload must be one of {words}, got {text[:40]!r}", "offload") from None


def _as_json(
    facts: dict[str, Any],
    footprint: Footprint,
    rows: tuple[OffloadPlan, ...],
    chosen: OffloadPlan | None,
    refusal: DoesNotFit | None,
) -> dict[str, Any]:
    """Everything in the table and more; the lowest peak of each residency also stands under its own name."""
    peaks: dict[str, int] = {}
    for row in rows:
        way = "resident" if row.residency is Residency.NONE else row.residency.value
        key = f"{way}_peak_bytes"
        # Of NONE the first row, in which nothing ever leaves; of STREAM the one with the fewest blocks.
        if way != "resident" or key not in peaks:
            peaks[key] = row.peak_bytes
    return {
        **facts,
        "weights_bytes": {name: part.bytes for name, part in footprint.components.items()},
        **peaks,
        "chosen": None if chosen is None else _row(chosen),
        "chosen_peak_bytes": None if chosen is None else chosen.peak_bytes,
        "fits": refusal is None,
        "message": str(refusal) if refusal is not None else chosen.because if chosen is not None else "",
        "largest_size": None if refusal is None else refusal.largest_size,
        "options": [_row(row) for row in rows],
    }


def _row(row: OffloadPlan) -> dict[str, Any]:
    from zimage_engine.memory.planner import title

    return {**asdict(row), "residency": row.residency.value, "title": title(row)}


def _print_table(
    facts: dict[str, Any],
    footprint: Footprint,
    rows: tuple[OffloadPlan, ...],
    chosen: OffloadPlan | None,
    refusal: DoesNotFit | None,
) -> None:
    from zimage_engine.memory.planner import gib, title

    parts = ", ".join(f"{name} {part.bytes / 1e9:.2f} GB" for name, part in footprint.components.items())
    typer.echo(
        f"{facts['model']}, {facts['width']}x{facts['height']}, guidance {'on' if facts['guided'] else 'off'}"
    )
    typer.echo(f"weights: {parts} (from {footprint.source})")
    typer.echo(
        f"card: {gib(facts['vram_bytes'])}, of which {gib(facts['budget_bytes'])} may be used:"
        " the rest is CUDA's and the reserve"
    )
    typer.echo("")
    titles = [title(row) for row in rows]
    width = max(map(len, titles))
    typer.echo(f"  {'way':<{width}}  {'peak':>9}  {'speed':>5}  {'host':>9}")
    for row, name in zip(rows, titles, strict=True):
        mark = "*" if chosen is not None and _is_same(row, chosen) else " "
        typer.echo(
            f"{mark} {name:<{width}}  {gib(row.peak_bytes):>9}  {row.relative_speed:>5.2f}"
            f"  {gib(row.host_bytes):>9}  {row.because}"
        )
    typer.echo("")
    typer.echo(str(refusal) if chosen is None else f"chosen: {chosen.because}")


def _is_same(row: OffloadPlan, chosen: OffloadPlan) -> bool:
    """Whether a row of the table is the chosen plan: they differ in what is said of them alone."""
    return replace(row, because="") == replace(chosen, because="")
