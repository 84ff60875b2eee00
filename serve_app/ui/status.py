"""`/page/status`: all that an open page asks again and again, in one light answer.

How the server is, what the model is and draws well, and the defaults that hold now, which change while
pages are open. Knows nothing of how the page shows it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from serve_app.ui import markup
from serve_app.ui.assets import PREFIX
from serve_app.ui.profiles import profiles_of
from serve_app.ui.sizes import sizes_that_fit
from zimage_engine.families import family_named
from zimage_engine.types import ModelDescription

if TYPE_CHECKING:
    from serve_app.model_list import ModelState
    from serve_app.service import ImageService

log = logging.getLogger(__name__)

#: So long one answer is given to every page that asks: workers are asked once for them all.
KEPT_SECONDS = 1.0


class PageStatus:
    """What the pages are told, asked anew of the service at most once in KEPT_SECONDS."""

    def __init__(self, service: ImageService, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._clock = clock
        self._lock = asyncio.Lock()
        self._told: dict[str, Any] = {}
        self._told_at = float("-inf")

    async def tell(self) -> dict[str, Any]:
        """The answer; never raises: a service that cannot be asked is told as `state` unknown, and logged."""
        async with self._lock:
            if self._clock() - self._told_at >= KEPT_SECONDS:
                try:
                    self._told = await self._ask()
                except Exception:
                    log.exception("the page could not ask how the server is")
                    self._told = {"state": "unknown"}
                self._told_at = self._clock()
            return self._told

    async def _ask(self) -> dict[str, Any]:
        service = self._service
        description = await service.description()
        if description is None:
            return {
                "state": "loading",
                "progress": service.loading_part,
                "default_enhance": service.live.default_enhance,
            }
        readiness, device, states = await asyncio.gather(
            service.readiness(), service.device_status(), service.model_states()
        )
        return {
            "state": "ready" if readiness.ready and device is not None else "unknown",
            "device": None if device is None else markup.status_text(device),
            "hint": "" if device is None else markup.status_hint(device, description.id),
            "workers": service.workers if readiness.ready else 0,
            "drawing": service.drawing,
            "waiting": service.waiting,
            "default_enhance": service.live.default_enhance,
            "enhancer": service.live.enhancer,
            "model": model_told(description),
            "models": [_state_told(service, state) for state in states] if len(states) > 1 else [],
        }


def status_routes(service: ImageService) -> APIRouter:
    """The route, for the app that the page is mounted on."""
    status = PageStatus(service)
    router = APIRouter(include_in_schema=False)

    @router.get(f"{PREFIX}/status")
    async def page_status() -> JSONResponse:
        return JSONResponse(await status.tell(), headers={"Cache-Control": "no-store"})

    return router


def model_told(description: ModelDescription) -> dict[str, Any]:
    """What the controls need of a model: sizes, defaults, and where each value draws well."""
    family = family_named(description.family)
    return {
        "id": description.id,
        "dtype": description.dtype.removeprefix("torch."),
        "native": [description.native_width, description.native_height],
        "multiple": description.size_multiple,
        "max_side": description.max_side,
        "max_steps": description.max_steps,
        "steps": description.default_steps,
        "guidance": description.default_guidance_scale,
        "good_steps": [family.good_steps.low, family.good_steps.high],
        "good_guidance": [family.good_guidance.low, family.good_guidance.high],
        "good_side": list(family.good_side_ratio),
        "sizes": {aspect: list(size) for aspect, size in sizes_that_fit(description).items()},
        "profiles": [asdict(profile) for profile in profiles_of(description)],
        "token_limit": description.token_limit,
    }


def _state_told(service: ImageService, state: ModelState) -> dict[str, Any]:
    description = service.with_live_defaults(state.description)
    return {
        "id": state.id,
        "state": state.state,
        "progress": state.progress,
        "reason": state.reason,
        "model": None if description is None else model_told(description),
    }
