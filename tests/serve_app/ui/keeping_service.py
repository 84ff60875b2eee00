"""A painting service that also answers what the routes beside the page ask of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from tests.serve_app.ui.painting_service import PaintingService
from zimage_engine.types import LoraChoice, LoraOffer


@dataclass
class KeepingService(PaintingService):
    """Counts and limits nothing, and has neither other models nor LoRAs."""

    def failures_counted(self) -> AbstractContextManager[None]:
        return nullcontext()

    def rate_headers(self, name: str) -> Mapping[str, str]:
        return {}

    def token_counter(self, model: str) -> Callable[[str], int]:
        return lambda text: len(text.split())

    def listed_name(self, name: str | None) -> str | None:
        return None

    async def loras_there(
        self, wanted: tuple[LoraChoice, ...], model: str | None = None
    ) -> tuple[LoraOffer, ...]:
        return ()
