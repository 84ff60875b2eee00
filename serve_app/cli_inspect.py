"""`zimage-turbo inspect`: what a checkpoint is, what is wrong with it, and whether it would load.

Reads JSON files and headers only, so it imports no torch and takes no longer for a large model.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve_app.cli_picture import inspect_picture, is_picture
from zimage_engine.errors import EngineError, InvalidRequest

if TYPE_CHECKING:
    from zimage_engine.loading.lora_description import LoraDescription

EXIT_WOULD_NOT_LOAD = 1


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_ID",
            help="A model folder, a single file of weights, a LoRA, the hub id of a model that was "
            "downloaded, or a picture.",
        ),
    ],
    family: Annotated[
        str | None, typer.Option("--family", help="The kind of model, where you know better.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="A model folder for what the file lacks.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option("--text-encoder", help="A folder or file with the text encoder.")
    ] = None,
    vae: Annotated[str | None, typer.Option("--vae", help="A folder or file with the VAE.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="What it is to be computed in: bfloat16, float32 or float16."),
    ] = None,
    trust: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of a signed picture: certificates in PEM of those who may vouch for its signer.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say what a checkpoint is, what would be mended, and whether it would load. Writes nothing,
    fetches nothing.

    Of a LoRA it says what it was made for and how it is used; with --base, whether it fits that model. Of a
    picture it says how it was drawn, who has signed it, whether it was changed since, and its watermark.
    """
    file = Path(path).expanduser()
    if is_picture(file):
        _inspect_picture(file, trust, as_json)
        return
    from zimage_engine import ModelLoaderAdapter
    from zimage_engine.loading.lora_description import is_lora

    if is_lora(file):
        _inspect_lora(file, base, as_json)
        return
    adapter = ModelLoaderAdapter(
        path, family, base=base, text_encoder=text_encoder, vae=vae, dtype=dtype, fetch=False
    )
    try:
        explanation = adapter.explain()
    except EngineError as error:
        if as_json:
            _print_json({"path": path, "loads": False, "error": type(error).__name__, "message": str(error)})
        else:
            typer.echo(f"Would not load: {error}")
        raise typer.Exit(EXIT_WOULD_NOT_LOAD) from None
    if as_json:
        _print_json(_facts(adapter))
    else:
        typer.echo(explanation)


def _inspect_picture(path: Path, trust: Path | None, as_json: bool) -> None:
    try:
        inspect_picture(path, trust, as_json)
    except InvalidRequest as error:
        typer.echo(f"Could not be looked at: {error}")
        raise typer.Exit(EXIT_WOULD_NOT_LOAD) from None


def _inspect_lora(path: Path, base: str | None, as_json: bool) -> None:
    from zimage_engine.loading.lora_description import describe_lora

    facts: dict[str, Any] = {"path": str(path), "kind": "lora", "loads": False}
    try:
        lora = describe_lora(path)
        fits = None if base is None else _modules_in(lora, base)
    except EngineError as error:
        if as_json:
            _print_json({**facts, "usable": False, "error": type(error).__name__, "message": str(error)})
        else:
            typer.echo(f"Could not be used as a LoRA: {error}")
        raise typer.Exit(EXIT_WOULD_NOT_LOAD) from None
    if as_json:
        _print_json({**facts, "usable": True, **asdict(lora), "path": str(path), "adapted_modules": fits})
        return
    texts = f", {lora.text_encoder_pairs} of them for text encoders" if lora.text_encoder_pairs else ""
    ranks = ", ".join(map(str, lora.ranks))
    typer.echo(f"{path}: a LoRA, to be put on a model")
    typer.echo(
        f"  {lora.pairs} pairs{texts}, rank {ranks}, {'/'.join(lora.dtypes)}, {_size(lora.size_bytes)}"
    )
    typer.echo(f"  names as in {', '.join(lora.layouts)}; such as {lora.example}")
    typer.echo(f"  made for {lora.made_for}, as far as names and shapes tell")
    if not lora.is_drawn_here:
        typer.echo("  none of the supported families takes it")
        return
    if fits is not None:
        typer.echo(f"  fits {base}: adapts {fits} of its modules")
    model = base or "MODEL"
    typer.echo(f'  use: zimage-turbo generate "..." -o picture.png --model {model} --lora {path}=1.0')


def _modules_in(lora: LoraDescription, base: str) -> int | None:
    """How many modules of the model at `base` it adapts; None where only diffusers can tell."""
    from zimage_engine import ModelLoaderAdapter
    from zimage_engine.loading.lora_description import adapted_modules

    adapter = ModelLoaderAdapter(base, fetch=False)
    denoiser = next((model for model in adapter.mending.models if model.name == "transformer"), None)
    return None if denoiser is None else adapted_modules(lora.path, denoiser.shapes)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _facts(adapter: Any) -> dict[str, Any]:
    mending = adapter.mending
    return {
        "path": str(adapter.origin),
        "commit": adapter.commit,
        "loads": True,
        "family": mending.family.name,
        "because": mending.because,
        "pipeline_class": mending.family.pipeline_class,
        "dtype": mending.family.dtype,
        "notes": list(mending.notes),
        "repairs": [
            {
                "name": made.repair.name,
                "place": made.place,
                "detail": made.detail,
                "because": made.repair.because,
            }
            for made in mending.repairs
        ],
        "components": {
            model.name: {
                "class_name": model.part.class_name,
                "layout": model.part.layout,
                "files": [file.name for file in model.stored.files],
                "bytes": sum(file.size_bytes for file in model.stored.files),
                "tensors": len(model.part.recipes),
                "stored_dtypes": sorted({tensor.dtype for tensor in model.stored.tensors}),
                "left_out": dict(model.part.dropped),
            }
            for model in mending.models
        },
    }


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
