"""What the clients ask for, and the pixels that must come: drawn beforehand by an engine of this process."""

from __future__ import annotations

import base64
import hashlib
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from zimage_engine.types import GenerationRequest

PROMPTS = (
    "a red circle on a white background",
    "a blue square and a small yellow star",
    "圆形 红色",
    "a green triangle, left of it a black line",
)
SIZES_PX = ((64, 64), (96, 64), (96, 96), (128, 96), (128, 128))
STEPS = (2, 4, 6, 8)
GUIDANCES = (1.0, 1.8)
#: As many threads compute a picture here as in the server: sums in another order have other last bits.
THREADS = 1
SERVER_OPTIONS = ("--device", "cpu", "--threads", str(THREADS))


@dataclass(frozen=True)
class Drawing:
    """One picture that is asked for. Its digest is that of the expected pixels."""

    prompt: str
    width_px: int
    height_px: int
    steps: int
    guidance: float
    seed: int
    enhance: bool
    digest: str = field(default="", compare=False, repr=False)

    def fields(self) -> dict[str, object]:
        """The body of a request for it."""
        return {
            "prompt": self.prompt,
            "size": f"{self.width_px}x{self.height_px}",
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "seed": self.seed,
            "enhance": self.enhance,
        }

    @property
    def work(self) -> float:
        """Megapixel-steps, each twice with guidance: what the server's queue is fair in."""
        return self.width_px * self.height_px / 1e6 * self.steps * (2 if self.guidance > 1 else 1)

    def request(self) -> GenerationRequest:
        return GenerationRequest(
            self.prompt,
            width=self.width_px,
            height=self.height_px,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            seed=self.seed,
            enhance=self.enhance,
        )


#: Long enough to be stopped in the middle: a hundred steps.
ENDLESS = Drawing("a red circle", 256, 256, 100, 1.8, 4, False)


def random_drawings(count: int, chance: random.Random) -> Iterator[Drawing]:
    """Each has a seed of its own, so that no two pictures are the same."""
    for number in range(count):
        width_px, height_px = chance.choice(SIZES_PX)
        yield Drawing(
            chance.choice(PROMPTS),
            width_px,
            height_px,
            chance.choice(STEPS),
            chance.choice(GUIDANCES),
            1000 + number,
            chance.random() < 0.3,
        )


def drawn(drawings: Sequence[Drawing]) -> tuple[Drawing, ...]:
    """The same with the digests of their pictures, drawn one after another by a fresh engine."""
    from zimage_engine import Engine

    engine = Engine.load(device="cpu", threads=THREADS)
    return tuple(
        replace(each, digest=digest_of(engine.generate(each.request()).images[0])) for each in drawings
    )


def digest_of(image: Image.Image) -> str:
    """Of the pixels, whatever the file says beside them."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def digest_of_file(b64_json: str) -> str:
    """Of the pixels of a picture as the server sends it. Raises where it is none."""
    with Image.open(io.BytesIO(base64.b64decode(b64_json, validate=True))) as image:
        return digest_of(image)
