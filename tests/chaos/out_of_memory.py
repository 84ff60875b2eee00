"""Requests of mixed sizes in a row while memory runs out at random; after each, a control picture is drawn.

    python -m tests.chaos.out_of_memory [--count 300] [--seed 0]

A tiny Z-Image engine plans as on a card of its own (the weights stay on the CPU, where every residency but
the pinned copies and side streams is the same code). torch.OutOfMemoryError is raised in the text encoder,
the denoiser or the VAE, once to four times. A request is wrong where it raises anything but OutOfMemory, or
that without cause, or draws other bytes than undisturbed (but where the VAE had to work in pieces); so is a
control picture that is not bit for bit the first.
"""

from __future__ import annotations

import argparse
import gc
import operator
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from tests.zimage_engine.tiny_models import write_tiny_z_image
from zimage_engine import Engine, GenerationRequest
from zimage_engine.errors import OutOfMemory
from zimage_engine.families import family_named
from zimage_engine.memory.footprint import footprint_of_pipeline
from zimage_engine.memory.oom import MemoryKeeper
from zimage_engine.memory.options import PlannedOptions
from zimage_engine.memory.planner import PlanOptions
from zimage_engine.memory.residency import OffloadPlan

SIDES_PX = (32, 64, 96)
PLACES = ("text_encoder", "transformer", "vae.decoder")
#: What the card is taken to have: the tiny model and any of these pictures fit whole.
CARD_BYTES = 2**30
CONTROL = GenerationRequest(
    "a red circle", seed=1, width=64, height=64, num_inference_steps=2, guidance_scale=1.0, enhance=False
)


class _Card(PlannedOptions):
    """The planner on a card with the same free memory at every request."""

    def options(
        self, width_px: int, height_px: int, guided: bool, free_bytes: int | None
    ) -> Sequence[OffloadPlan]:
        return super().options(width_px, height_px, guided, CARD_BYTES)


@dataclass
class Tally:
    """How the requests ended; `wrong` says in words what must not be."""

    endings: Counter[str] = field(default_factory=Counter)
    recoveries: Counter[str] = field(default_factory=Counter)
    offloads: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    #: Resident bytes of this process after each request.
    resident_bytes: list[int] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """By what share the last tenth's median is above that of the second tenth."""
        tenth = max(1, len(self.resident_bytes) // 10)
        early = sorted(self.resident_bytes[tenth : 2 * tenth])[tenth // 2]
        late = sorted(self.resident_bytes[-tenth:])[tenth // 2]
        return late / early - 1


def engine_on_a_card(folder: Path) -> Engine:
    """A tiny engine whose keeper plans for a card."""
    # Without it every request would find its prompts encoded, and the text encoder would never run out.
    engine = Engine.load(write_tiny_z_image(folder), device="cpu", embedding_cache_bytes=0)
    footprint = footprint_of_pipeline(engine.pipeline, family_named(engine.description.family))
    engine._keeper.close()
    engine._keeper = MemoryKeeper(
        engine.pipeline, footprint, _Card(footprint, PlanOptions(), reserve_bytes=0), "cpu"
    )
    return engine


def endure(count: int, seed: int, folder: Path) -> Tally:
    """Draw `count` requests, about a third of them disturbed."""
    engine = engine_on_a_card(folder)
    chance = random.Random(seed)
    tally = Tally()
    known: dict[GenerationRequest, bytes] = {}

    def undisturbed(request: GenerationRequest) -> bytes:
        if request not in known:
            known[request] = engine.generate(request).images[0].tobytes()
        return known[request]

    requests = [
        GenerationRequest(
            "a red circle", seed=1, width=width, height=height, num_inference_steps=2,
            guidance_scale=guidance_scale, enhance=False,
        )
        for width in SIDES_PX
        for height in SIDES_PX
        for guidance_scale in (1.0, 1.8)
    ]  # fmt: skip
    for request in [CONTROL, *requests]:
        undisturbed(request)
    for number in range(count):
        request = chance.choice(requests)
        place, times = chance.choice(PLACES), chance.choice((0, 0, 1, 2, 4))
        _draw(engine, request, place, times, undisturbed(request), tally, f"request {number}")
        if engine.generate(CONTROL).images[0].tobytes() != known[CONTROL]:
            tally.wrong.append(f"request {number}: the control picture differs after {place} x{times}")
        gc.collect()
        tally.resident_bytes.append(psutil.Process().memory_info().rss)
    return tally


def _draw(
    engine: Engine,
    request: GenerationRequest,
    place: str,
    times: int,
    expected: bytes,
    tally: Tally,
    name: str,
) -> None:
    left = times

    def runs_out(*_: Any) -> None:
        nonlocal left
        if left:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    hook = operator.attrgetter(place)(engine.pipeline).register_forward_pre_hook(runs_out)
    try:
        result = engine.generate(request)
    except OutOfMemory as refused:
        tally.endings["refused"] += 1
        if not times:
            tally.wrong.append(f"{name}: refused after {times}: {refused}")
        return
    finally:
        hook.remove()
    use = result.report.memory
    assert use is not None
    tally.endings["drawn"] += 1
    tally.offloads[use.offload] += 1
    tally.recoveries.update(use.oom_recoveries)
    if result.images[0].tobytes() != expected and "tiled" not in use.oom_recoveries:
        tally.wrong.append(f"{name}: another picture after {place} x{times}, {use}")


def main() -> None:
    """Draw, print what came of it, exit with 1 where anything was wrong or memory grew by more than 2 %."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--count", type=int, default=300)
    asked.add_argument("--seed", type=int, default=0)
    chosen = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = endure(chosen.count, chosen.seed, Path(folder) / "tiny")
    sys.stdout.write(
        f"{dict(tally.endings)}, recoveries {dict(tally.recoveries)}, offload {dict(tally.offloads)}, "
        f"wrong {len(tally.wrong)}, host memory {100 * tally.growth:+.2f} %\n"
    )
    sys.stdout.writelines(f"  {line}\n" for line in tally.wrong[:20])
    raise SystemExit(bool(tally.wrong) or tally.growth > 0.02)


if __name__ == "__main__":
    main()
