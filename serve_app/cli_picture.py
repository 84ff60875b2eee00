"""What `zimage-turbo inspect` says of a picture: how it was drawn, who has signed it, and its watermark."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from serve_app.signing import INSTALL, Signature, can_sign, is_signed, read_signature
from zimage_engine.errors import InvalidRequest

EXIT_CHANGED = 1
_BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")


def is_picture(path: Path) -> bool:
    """Whether the file begins as a PNG, JPEG or WebP does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8).startswith(_BEGINNINGS)


def inspect_picture(path: Path, authorities: Path | None, as_json: bool) -> None:
    """Print it; exits with 1 where what was signed has been changed. Raises InvalidRequest for no picture."""
    content = path.read_bytes()
    signature = None
    if can_sign():
        signature = read_signature(content, None if authorities is None else _read_authorities(authorities))
    try:
        facts = _facts(path, content)
    except InvalidRequest as damaged:
        if signature is None or signature.valid:
            raise
        raise InvalidRequest(f"{damaged}; {signature.sentence}") from damaged
    if as_json:
        told = None if signature is None else {**asdict(signature), "sentence": signature.sentence}
        facts = {**facts, "signature": told, "signature_checked": can_sign() or not is_signed(content)}
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        for line in _lines(facts, signature_sentence(content, signature)):
            typer.echo(line)
    if signature is not None and not signature.valid:
        raise typer.Exit(EXIT_CHANGED)


def signature_sentence(content: bytes, signature: Signature | None) -> str | None:
    """What is said of a picture's signature; None for a picture that has none."""
    if signature is not None:
        return signature.sentence
    if not can_sign() and is_signed(content):
        return f"it has a C2PA signature, which cannot be checked here: {INSTALL}"
    return None


def _lines(facts: dict[str, Any], signature: str | None) -> list[str]:
    drawn = facts["parameters"]
    receipt = facts["receipt"]
    lines = [
        f"{facts['path']}: a picture, {facts['format']}, {facts['width']}x{facts['height']}",
        f"  watermark: {facts['watermark']!r}"
        if facts["watermark"]
        else "  watermark: none that can be read",
        f"  signature: {signature or 'none'}",
    ]
    if drawn is None:
        return [*lines, "  it tells nothing of how it was drawn"]
    lines += ["  drawn from:", *(f"    {_shown(line)}" for line in drawn.splitlines())]
    if receipt is not None:
        lines.append(f"  with a receipt; draw it again: zimage-turbo reproduce {facts['path']}")
    return lines


def _shown(line: str) -> str:
    return line if line.isprintable() else line.encode("unicode_escape").decode()


def _facts(path: Path, content: bytes) -> dict[str, Any]:
    from PIL import Image, UnidentifiedImageError

    from serve_app import watermark
    from serve_app.image_codec import PILLOW_FORMATS, read_parameters, read_receipt
    from serve_app.reproduction import MOST_SIDE

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
                # One of more is none that was drawn here, and would take gigabytes to look at.
                mark = watermark.read(image) if max(image.size) <= MOST_SIDE else None
                return {
                    "path": str(path),
                    "kind": "picture",
                    "format": image.format,
                    "width": image.width,
                    "height": image.height,
                    "watermark": mark,
                    "parameters": read_parameters(content),
                    "receipt": read_receipt(content),
                }
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise InvalidRequest(f"{path} cannot be read as a picture: it is damaged or cut short") from error


def _read_authorities(file: Path) -> str:
    try:
        text = file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in PEM"
        raise InvalidRequest(f"--trust: {file} cannot be read: {reason}", "trust") from error
    if "BEGIN CERTIFICATE" not in text:
        raise InvalidRequest(
            f"--trust must name a file with certificates in PEM, and {file} has none", "trust"
        )
    return text
