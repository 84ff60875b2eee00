"""Text to image with 8-step turbo models, as a library; knows nothing of HTTP, Ray or Gradio.

    from zimage_engine import Engine, GenerationRequest
    result = Engine.load().generate(GenerationRequest(prompt="a red circle"))
    result.images[0].save("circle.png")

Importing this package imports no torch: `Engine` and `ModelLoaderAdapter` are found on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zimage_engine.types import (
    DeviceStatus,
    EnhancedPrompt,
    GenerationReport,
    GenerationRequest,
    GenerationResult,
    LoraUse,
    ModelDescription,
    Notice,
    OnStep,
    PictureReport,
    StepProgress,
)

if TYPE_CHECKING:
    from zimage_engine.engine import Engine
    from zimage_engine.loading.adapter import ModelLoaderAdapter
    from zimage_engine.loading.lora_weight import LoraWeight

__all__ = [
    "DeviceStatus",
    "Engine",
    "EnhancedPrompt",
    "GenerationReport",
    "GenerationRequest",
    "GenerationResult",
    "LoraUse",
    "LoraWeight",
    "ModelDescription",
    "ModelLoaderAdapter",
    "Notice",
    "OnStep",
    "PictureReport",
    "StepProgress",
]

_FOUND_ON_FIRST_USE = {
    "Engine": "zimage_engine.engine",
    "LoraWeight": "zimage_engine.loading.lora_weight",
    "ModelLoaderAdapter": "zimage_engine.loading.adapter",
}


def __getattr__(name: str) -> Any:
    if name not in _FOUND_ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FOUND_ON_FIRST_USE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
