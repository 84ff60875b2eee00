"""`Idempotency-Key`: what tells that two requests are one, and that the second is another one after all.

Knows nothing of the store, which keeps the key and what was drawn under it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from serve_app.error_mapping import RequestRefused

LONGEST_KEY = 255


def parse_key(values: list[str]) -> str | None:
    """The key in the header's values, None where there is none; raises RequestRefused."""
    if not values:
        return None
    (key, *more) = values
    if more or not key.strip() or len(key) > LONGEST_KEY or not (key.isascii() and key.isprintable()):
        raise RequestRefused(
            f"Idempotency-Key must be one text of 1 to {LONGEST_KEY} printable ASCII characters, such as a "
            "UUID.",
            "Idempotency-Key",
        )
    return key


def fingerprint_of(payload: Mapping[str, Any], operation: str, files: Mapping[str, bytes]) -> str:
    """The same for two bodies that say the same to one address, whatever the order of their fields."""
    said: dict[str, Any] = {name: value for name, value in payload.items() if value is not None}
    if files:
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        said = {"fields": said, "files": digests, "operation": operation}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def reused() -> RequestRefused:
    """The refusal of a key under which another body came before."""
    return RequestRefused(
        "This Idempotency-Key was used with another body within the last day; send a new key with it.",
        "Idempotency-Key",
        "idempotency_key_reused",
        422,
    )
