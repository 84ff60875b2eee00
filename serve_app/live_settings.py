"""Settings that change while the server runs: Serve's `user_config`, applied in place.

What a `user_config` does not name is as it was at the start (`Settings`, where each field has its bounds and
its description). Knows nothing of Ray, HTTP and pictures.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from serve_app.settings import Settings, SettingsError, no_such
from zimage_engine.types import Enhancer

logger = logging.getLogger(__name__)

DeploymentName = Literal["PromptEnhancer", "ImageWorker"]


def _as_at_start(name: str) -> Any:
    """The setting's own field: its default, bounds and description."""
    return copy.copy(Settings.model_fields[name])


class LiveSettings(BaseModel):
    """What holds for the requests that begin now. A request that runs goes on with those it began with."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    default_steps: int | None = _as_at_start("default_steps")
    default_guidance_scale: float | None = _as_at_start("default_guidance_scale")
    default_enhance: bool = _as_at_start("default_enhance")
    enhancer: Enhancer = _as_at_start("enhancer")
    enhancer_seconds: float = _as_at_start("enhancer_seconds")
    enhancer_tokens: int = _as_at_start("enhancer_tokens")
    max_queued_requests: int = _as_at_start("max_queued_requests")
    max_queue_seconds: float | None = _as_at_start("max_queue_seconds")
    request_seconds: float | None = _as_at_start("request_seconds")
    pictures_at_once: int = _as_at_start("pictures_at_once")
    requests_a_minute: int = _as_at_start("requests_a_minute")
    worker_restart_seconds: float = _as_at_start("worker_restart_seconds")
    drawing_seconds: float | None = _as_at_start("drawing_seconds")


#: Which deployment reads which; the same name in the other one's `user_config` would do nothing.
READ_BY: Mapping[DeploymentName, tuple[str, ...]] = {
    "PromptEnhancer": tuple(name for name in LiveSettings.model_fields if name != "drawing_seconds"),
    "ImageWorker": ("drawing_seconds",),
}


def at_start(settings: Settings) -> LiveSettings:
    """What holds before a `user_config` says otherwise."""
    return LiveSettings(**{name: getattr(settings, name) for name in LiveSettings.model_fields})


def read_user_config(user_config: Any, settings: Settings, deployment: DeploymentName) -> LiveSettings:
    """What a deployment's `user_config` asks for, over what the server was started with.

    None and {} ask for nothing. Raises SettingsError, with a sentence a problem.
    """
    if user_config is None:
        user_config = {}
    if not isinstance(user_config, Mapping):
        raise SettingsError(
            f"the user_config of {deployment} must be a mapping of live settings, "
            f"got {type(user_config).__name__}"
        )
    if wrong := [_not_read(str(name), deployment) for name in user_config if name not in READ_BY[deployment]]:
        raise SettingsError("; ".join(wrong))
    try:
        live = LiveSettings(**{**at_start(settings).model_dump(), **user_config})
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(problem) for problem in error.errors())) from None
    if live.enhancer == "endpoint" and not settings.has_endpoint:
        raise SettingsError(
            "live setting enhancer: endpoint needs enhancer_url and enhancer_model, which belong into args"
        )
    return live


def _not_read(name: str, deployment: DeploymentName) -> str:
    for other, names in READ_BY.items():
        if name in names:
            return f"{name} is a live setting of {other}, not of {deployment}; move it there"
    if name in Settings.model_fields:
        return (
            f"{name} is no live setting: it belongs into args, and changing it starts the processes anew; "
            f"live in {deployment} are " + ", ".join(READ_BY[deployment])
        )
    return no_such(f"live setting of {deployment}", name, READ_BY[deployment])


def _sentence(problem: Any) -> str:
    (name, *_) = problem["loc"]
    complaint = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"live setting {name}: {complaint}, got {problem['input']!r}"


@dataclass(frozen=True)
class InForce:
    """A replica's live settings, and in one sentence why the last `user_config` was refused; "" if not."""

    live: LiveSettings
    refusal: str = ""

    def after(self, user_config: Any, settings: Settings, deployment: DeploymentName) -> InForce:
        """What holds once `user_config` has been given; the former settings where it cannot be used.

        Nothing is raised: Serve would end the replica, give its successors the same `user_config`, and with
        them the service would be gone. The refusal is logged here and told by the owner.
        """
        try:
            return InForce(read_user_config(user_config, settings, deployment))
        except SettingsError as wrong:
            logger.error("the user_config of %s is refused, the former settings stay: %s", deployment, wrong)
            return replace(self, refusal=str(wrong))
