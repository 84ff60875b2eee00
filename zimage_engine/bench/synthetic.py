"""An engine around random weights of a published shape, for machines on which the model is not."""

from __future__ import annotations

import time

from zimage_engine.bench.measuring import Loaded
from zimage_engine.bench.random_model import build_from, narrow_configs, published_configs, with_layers
from zimage_engine.engine import Engine
from zimage_engine.errors import InvalidRequest
from zimage_engine.memory.residency import MemoryWishes
from zimage_engine.memory.snapshot import available_devices, choose_device

#: What may be asked for.
NAMES = ("zimage-turbo", "z-image-turbo")


def load_synthetic(
    name: str,
    device: str | None = None,
    layers: int | None = None,
    tiny: bool = False,
    memory: MemoryWishes | None = None,
    dtype: str | None = None,
) -> Loaded:
    """The engine, and how long making it took, which says nothing about loading files.

    `layers` cuts the denoiser and the text encoder to so many; `tiny` makes them as narrow as they can be.
    Raises InvalidRequest for a name that is not known, DeviceUnavailable.
    """
    if name not in NAMES:
        raise InvalidRequest(f"--synthetic must be {NAMES[0]}, got {name[:40]!r}", "synthetic")
    import torch

    chosen = choose_device(device, available_devices())
    configs = narrow_configs() if tiny else published_configs()
    whole = configs["transformer"][1]["n_layers"]
    if layers is not None:
        configs = with_layers(configs, layers)
    kept = configs["transformer"][1]["n_layers"]
    began = time.perf_counter()
    model = build_from(configs, chosen)
    if dtype is not None:
        model.pipeline.to(getattr(torch, dtype))
    engine = Engine(model.pipeline, model.family, f"random {model.family.name}", chosen, memory)
    # Noise is what random weights draw: to draw it again in float32 would be measured as a picture's cost.
    engine.draws_again = False
    engine.place()
    return Loaded(
        engine, time.perf_counter() - began, weights="random", layers=None if kept == whole else kept
    )
