"""`zimage-turbo reproduce`: draws a picture again from its receipt, and says whether it is the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve_app.cli_picture import signature_sentence
from serve_app.signing import can_sign, read_signature
from serve_app.terminal import StepBar, say
from zimage_engine.errors import EngineError, InvalidRequest

if TYPE_CHECKING:
    from zimage_engine.types import SourcePicture

EXIT_IDENTICAL = 0
EXIT_DIFFERS = 1
EXIT_INVALID_INPUT = 2


def reproduce(
    picture: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="A file that zimage-turbo has drawn: PNG, JPEG or WebP.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PATH_OR_ID",
            help="Where the model is (default: the receipt's, if it is the demo or in the hub's cache).",
            show_default=False,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="PATH[=WEIGHT]",
            help="Where a LoRA of the picture is (default weight: the receipt's).",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="For an edit: the picture that it was drawn from.", show_default=False
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For an edit: its mask, if it had one.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="cuda, mps or cpu (default: as then, if it is there).", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What to compute in (default: as then).", show_default=False),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, metavar="COUNT", help="Threads of a CPU (default: as then).", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Keep the new picture, as PNG.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Draw a picture again from its receipt, and say whether every pixel is the same.

    If not, it says which of model, LoRAs, settings, device and versions are others than then. Further
    settings are read as by `launch` (ZIMAGE_OFFLOAD, ZIMAGE_VRAM ...). Exit codes: 0 identical; 1 it differs,
    or a JPEG or WebP tells too little to compare; 2 it cannot be drawn from this file.
    """
    from serve_app.settings import SettingsError

    try:
        _reproduce(picture, model, lora or [], image, mask, device, dtype, threads, output, as_json)
    except (EngineError, SettingsError) as failed:
        say(f"zimage-turbo: {failed}")
        raise typer.Exit(EXIT_INVALID_INPUT) from failed
    except OSError as failed:
        say(f"zimage-turbo: {failed.filename}: {failed.strerror}")
        raise typer.Exit(EXIT_INVALID_INPUT) from failed


def _reproduce(
    picture: Path,
    model: str | None,
    loras: list[str],
    image: Path | None,
    mask: Path | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    from serve_app.reproduction import compare, read_given

    content = picture.read_bytes()
    given = read_given(content)
    receipt = given.receipt
    request = given.request(None if image is None else _source(image, mask, receipt))
    from serve_app.finishing import Finisher
    from serve_app.image_codec import ImageEncoding
    from serve_app.local_engine import load_engine
    from serve_app.receipt import loras_of
    from serve_app.settings import load_settings
    from zimage_engine.speed.levers import compiles

    # Where there is a folder of LoRAs, the receipt's names are looked up there.
    has_folder = load_settings().lora_folder is not None
    if has_folder and not loras:
        request = replace(request, loras=loras_of(receipt))
    settings = load_settings(
        model=model if model is not None else _model_of(receipt),
        loras=_loras_of(receipt, loras) if loras or not has_folder else [],
        device=device or _device_of(receipt),
        dtype=dtype or receipt.get("dtype"),
        quantize=receipt.get("quantize"),
        cpu_threads=threads or _threads_of(receipt),
        # What would make it quicker takes part only where it did then.
        exact=None if receipt.get("accelerated_by") else True,
    )
    finisher = Finisher.of(settings)
    say(f"Loading {settings.model or 'the demo model'} ...", only_on_a_terminal=True)
    # What was drawn without compiled code needs none.
    engine = load_engine(settings, may_compile=compiles(receipt.get("accelerated_by") or ()) is not None)
    with StepBar(number=1, of=1) as bar:
        result = engine.generate(request, on_step=bar.on_step)
    (drawn,), _ = finisher.finished(result, ImageEncoding("png"))
    if output is not None:
        output.write_bytes(drawn)
    came_of_it = compare(given, drawn)
    signature = read_signature(content) if can_sign() else None
    if as_json:
        told = None if signature is None else asdict(signature)
        facts = {"picture": str(picture), **asdict(came_of_it), "signature": told}
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        typer.echo(f"{picture}  {came_of_it.sentence}")
        if sentence := signature_sentence(content, signature):
            typer.echo(f"{picture}  {sentence}")
    raise typer.Exit(EXIT_IDENTICAL if came_of_it.identical else EXIT_DIFFERS)


def _source(image: Path, mask: Path | None, receipt: Mapping[str, Any]) -> SourcePicture:
    from serve_app.error_mapping import RequestRefused
    from serve_app.picture_input import source_picture

    is_masked = isinstance(receipt.get("edit"), Mapping) and bool(receipt["edit"].get("masked"))
    try:
        return source_picture(
            image.read_bytes(), None if mask is None else mask.read_bytes(), own_mask=is_masked
        )
    except RequestRefused as refused:
        raise InvalidRequest(f"{image}: {refused}", "image") from refused


def _model_of(receipt: Mapping[str, Any]) -> str | None:
    """Where the receipt's model can be found without asking: the demo (None), or the hub at its commit.

    A picture may come from anybody: it chooses no folder of this machine, and has nothing downloaded. Raises
    InvalidRequest, and CheckpointNotFound where the hub's model is not in the cache.
    """
    from zimage_engine.engine import DEMO_MODEL_ID
    from zimage_engine.loading.locate import is_hub_id, locate

    model = receipt.get("model")
    name = model.get("id") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(name, str):
        raise InvalidRequest("the receipt names no model; say with --model where it is", "model")
    if name == DEMO_MODEL_ID:
        return None
    revision = model.get("revision")
    if "@" not in name and isinstance(revision, str):
        name = f"{name}@{revision}"
    # A folder of that name would be taken before the hub's model.
    if not is_hub_id(name) or Path(name).exists():
        raise InvalidRequest(
            f"the picture was drawn by {name[:200]!r}, a model from a folder or file; say with --model where "
            "it is",
            "model",
        )
    locate(name, fetch=False)
    return name


def _loras_of(receipt: Mapping[str, Any], given: list[str]) -> list[str]:
    """The LoRAs as PATH=WEIGHT, each with the receipt's weight unless the person gave one."""
    told = [each for each in receipt.get("loras") or [] if isinstance(each, Mapping)]
    if told and not given:
        names = ", ".join(str(each.get("name")) for each in told)
        raise InvalidRequest(
            f"the picture was drawn with LoRAs: {names}; say with --lora where they are", "lora"
        )
    weights = {each.get("name"): each.get("weight") for each in told}
    return [
        f"{path}={weights[Path(path).name]}" if Path(path).name in weights and "=" not in path else path
        for path in given
    ]


def _device_of(receipt: Mapping[str, Any]) -> str | None:
    """The device as then where this machine has one of its kind, else None, the best that there is."""
    from zimage_engine.memory.snapshot import available_devices

    kind = str(receipt.get("device")).partition(":")[0]
    return kind if kind in {name.partition(":")[0] for name in available_devices()} else None


def _threads_of(receipt: Mapping[str, Any]) -> int | None:
    threads = receipt.get("threads")
    return threads if isinstance(threads, int) and 1 <= threads <= 1024 else None
