"""`zimage-turbo inspect`: what a checkpoint is, what is wrong with it, and whether it would load.

Reads JSON files and headers only, so it imports no torch and takes no longer for a large model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from zimage_engine.errors import EngineError

EXIT_WOULD_NOT_LOAD = 1


def inspect(
    path: Annotated[Path, typer.Argument(help="A model folder or a single file of weights.")],
    family: Annotated[
        str | None, typer.Option("--family", help="The kind of model, where you know better.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="A model folder for what the file lacks.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option("--text-encoder", help="A folder or file with the text encoder.")
    ] = None,
    vae: Annotated[Path | None, typer.Option("--vae", help="A folder or file with the VAE.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say what a checkpoint is, what would be mended, and whether it would load. Writes nothing."""
    from zimage_engine import ModelLoaderAdapter

    adapter = ModelLoaderAdapter(path, family, base=base, text_encoder=text_encoder, vae=vae)
    try:
        explanation = adapter.explain()
    except EngineError as error:
        if as_json:
            _print_json(
                {"path": str(path), "loads": False, "error": type(error).__name__, "message": str(error)}
            )
        else:
            typer.echo(f"Would not load: {error}")
        raise typer.Exit(EXIT_WOULD_NOT_LOAD) from None
    if as_json:
        _print_json(_facts(adapter))
    else:
        typer.echo(explanation)


def _facts(adapter: Any) -> dict[str, Any]:
    mending = adapter.mending
    return {
        "path": str(adapter.origin),
        "loads": True,
        "family": mending.family.name,
        "because": mending.because,
        "pipeline_class": mending.family.pipeline_class,
        "dtype": mending.family.dtype,
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
