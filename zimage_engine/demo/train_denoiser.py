"""Trains the demo model's text encoder and denoiser together by flow matching on encoded pictures."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Model

from zimage_engine.demo import captions
from zimage_engine.demo.model import (
    CAPTION_MULTIPLE,
    TEXT_WIDTH,
    BatchedDenoiser,
    new_text_encoder,
    new_transformer,
    read_words,
)
from zimage_engine.demo.pictures import (
    COLOURS,
    GROUNDS,
    PLACES,
    RELATIONS,
    SCENE_ITEMS,
    SHAPES,
    SIZES,
    TIMES,
    SceneSpec,
    Spec,
    draw,
    is_held_out,
    random_pair,
    random_scene,
    random_single,
)

log = logging.getLogger(__name__)

#: Shares of single things, pairs and scenes among the training pictures.
KINDS = ((random_single, 0.35), (random_pair, 0.43), (random_scene, 0.22))
#: Captions replaced by nothing (or by the enhancer's negative words), so that guidance has a "without".
UNCONDITIONAL_SHARE = 0.12
QUALITY_SHARE = 0.3
#: Noise levels are drawn as the scheduler spaces its steps at shift 3: most where colours are decided.
SHIFT = 3.0
BATCH = 64
AVERAGE_STEPS = 400


def training_spec(rng: random.Random) -> Spec:
    """A spec that is not held out."""
    while True:
        make = rng.choices([make for make, _ in KINDS], [share for _, share in KINDS])[0]
        spec = make(rng)
        if not is_held_out(spec):
            return spec


# --- pictures as latents ----------------------------------------------------------------------------


@dataclass
class LatentSet:
    """Specs and the latents of one drawing of each: `(N, C, 16, 16)`, brought to mean 0 and variance 1."""

    specs: list[Spec]
    latents: torch.Tensor
    shift: float
    scale: float


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL, count: int, seed: int, batch: int = 32
) -> tuple[list[Spec], torch.Tensor]:
    """Draw and encode `count` pictures; the latents are the encoder's means in bfloat16, unscaled."""
    import numpy as np

    rng = random.Random(seed)
    vae = vae.to(torch.bfloat16)
    specs: list[Spec] = []
    parts: list[torch.Tensor] = []
    while len(specs) < count:
        chunk = [training_spec(rng) for _ in range(batch)]
        arrays = np.stack([np.asarray(draw(spec, rng)) for spec in chunk])
        pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).to(torch.bfloat16) / 127.5 - 1
        parts.append(vae.encoder(pixels).chunk(2, dim=1)[0])
        specs += chunk
    return specs, torch.cat(parts)


# --- captions as tokens -----------------------------------------------------------------------------


def training_caption(spec: Spec, rng: random.Random) -> str:
    if rng.random() < UNCONDITIONAL_SHARE:
        return captions.unconditional(rng)
    language = rng.choice(("en", "zh"))
    words = captions.caption(spec, rng, language)
    return captions.with_quality(words, rng, language) if rng.random() < QUALITY_SHARE else words


class TokenCache:
    """Token ids of captions; words repeat, so the ids of a caption are looked up once."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, words: str) -> list[int]:
        ids = self._known.get(words)
        if ids is None:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
            )
            ids = self._known[words] = self._tokenizer(text).input_ids
        return ids


@dataclass
class Batch:
    picks: torch.Tensor
    token_ids: torch.Tensor
    mask: torch.Tensor


def batches(specs: list[Spec], token_ids_of: TokenCache, rng: random.Random) -> Iterator[Batch]:
    """Batches whose captions fill the same number of 32-token blocks, as the denoiser pads them."""
    waiting: dict[int, list[tuple[int, list[int]]]] = {}
    while True:
        pick = rng.randrange(len(specs))
        ids = token_ids_of(training_caption(specs[pick], rng))
        length = math.ceil(len(ids) / CAPTION_MULTIPLE) * CAPTION_MULTIPLE
        if length > 2 * CAPTION_MULTIPLE:
            continue
        queue = waiting.setdefault(length, [])
        queue.append((pick, ids))
        if len(queue) == BATCH:
            waiting[length] = []
            token_ids = torch.zeros(BATCH, length, dtype=torch.long)
            mask = torch.zeros(BATCH, length, dtype=torch.bool)
            for row, (_, row_ids) in enumerate(queue):
                token_ids[row, : len(row_ids)] = torch.tensor(row_ids)
                mask[row, : len(row_ids)] = True
            yield Batch(torch.tensor([pick for pick, _ in queue]), token_ids, mask)


# --- warm-up: the text encoder learns what captions say ----------------------------------------------

_QUESTIONS: dict[str, tuple[str, ...]] = {
    "kind": ("shapes", "scene"),
    "background": tuple(COLOURS),
    "relation": RELATIONS,
    **{
        f"{field}{index}": values
        for index in (0, 1)
        for field, values in (
            ("colour", tuple(COLOURS)),
            ("shape", SHAPES),
            ("size", SIZES),
            ("place", PLACES),
        )
    },
    "time": TIMES,
    "ground": GROUNDS,
    **dict.fromkeys(SCENE_ITEMS, ("absent", "present")),
}
_UNASKED = -100


def _answers(spec: Spec) -> list[int]:
    """The spec as one class index for each question, or -100 where the question does not arise."""
    said: dict[str, str | None]
    if isinstance(spec, SceneSpec):
        said = {"kind": "scene", "time": spec.time, "ground": spec.ground}
        said |= {item: "present" if item in spec.items else "absent" for item in SCENE_ITEMS}
    else:
        said = {"kind": "shapes", "background": spec.background, "relation": spec.relation}
        for index, thing in enumerate(spec.things):
            said |= {
                f"{field}{index}": getattr(thing, field) for field in ("colour", "shape", "size", "place")
            }
    return [
        values.index(answer) if (answer := said.get(question)) is not None else _UNASKED
        for question, values in _QUESTIONS.items()
    ]


def warm_up_text_encoder(
    text_encoder: torch.nn.Module, token_ids_of: TokenCache, steps: int, seed: int
) -> float:
    """Teach the state of a caption's last token to tell the caption's attributes; returns the accuracy.

    A denoiser that must first teach its text encoder to read learns colours an order slower.
    """
    rng = random.Random(seed)
    sizes = [len(values) for values in _QUESTIONS.values()]
    head = torch.nn.Sequential(
        torch.nn.RMSNorm(TEXT_WIDTH),
        torch.nn.Linear(TEXT_WIDTH, sum(sizes)),
    )
    optimizer = torch.optim.AdamW(
        [*text_encoder.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.01
    )
    accuracy = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        specs = [training_spec(rng) for _ in range(128)]
        rows = [token_ids_of(captions.caption(spec, rng, rng.choice(("en", "zh"))))[:64] for spec in specs]
        token_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, ids in zip(token_ids, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        last = torch.tensor([len(ids) - 1 for ids in rows])
        with torch.autocast("cpu", torch.bfloat16):
            states = read_words(text_encoder, token_ids)[torch.arange(len(rows)), last]
            told = head(states)
        answers = torch.tensor([_answers(spec) for spec in specs])
        loss, right, asked = torch.zeros(()), 0, 0
        for logits, answer in zip(told.float().split(sizes, dim=1), answers.unbind(1), strict=True):
            if (answer != _UNASKED).any():
                loss = loss + torch.nn.functional.cross_entropy(logits, answer, ignore_index=_UNASKED)
            right += int((logits.argmax(1) == answer).sum())
            asked += int((answer != _UNASKED).sum())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(text_encoder.parameters(), 1.0)
        optimizer.step()
        accuracy = right / asked
        if step % 50 == 0:
            log.info("text warm-up step %d loss %.3f accuracy %.3f", step, loss.item(), accuracy)
    return accuracy


# --- flow matching ------------------------------------------------------------------------------------


class Student(torch.nn.Module):
    """Text encoder and denoiser as one differentiable step; the loss is one number."""

    def __init__(self, text_encoder: Qwen3Model, transformer: ZImageTransformer2DModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.denoiser = BatchedDenoiser(transformer)

    def forward(
        self,
        clean: torch.Tensor,
        noise: torch.Tensor,
        sigma: torch.Tensor,
        token_ids: torch.Tensor,
        mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        words = read_words(self.text_encoder, token_ids)
        level = sigma[:, None, None, None]
        noisy = (clean * (1 - level) + noise * level).to(words.dtype)
        out = self.denoiser(noisy, (1 - sigma).to(words.dtype), words, mask, cos, sin)
        return (out.float() - (clean - noise)).square().mean(dim=(1, 2, 3))


def _is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Weights that Muon turns into orthogonal updates: the inner projections of every block."""
    inner = (
        "attention.",
        "feed_forward.",
        "self_attn.",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
        "adaLN_modulation",
    )
    return parameter.ndim == 2 and any(part in name for part in inner) and "final_layer" not in name


def train_denoiser(
    folder: Path,
    tokenizer: Qwen2Tokenizer,
    data: LatentSet,
    minutes: float,
    seed: int = 0,
    resume: Path | None = None,
    peak_rate: float = 2e-3,
    warm_up_steps: int = 500,
    compiled: bool = True,
) -> None:
    """Train for `minutes`, leaving `folder/student.pt` (weights and their average) every two minutes.

    The forward and backward passes run in bfloat16, as the released model does; the optimizers keep
    float32 weights. The rate warms up over 2 % of the time, stays, and falls to nothing over the last 40 %.
    `resume` continues from an earlier `student.pt`, without the warm-up of the text encoder.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    token_ids_of = TokenCache(tokenizer)
    text_encoder, transformer = new_text_encoder(len(tokenizer)), new_transformer()
    student = Student(text_encoder, transformer)
    if resume:
        student.load_state_dict(torch.load(resume, weights_only=True)["average"])
    else:
        warm_up_text_encoder(text_encoder, token_ids_of, warm_up_steps, seed)
    masters = {
        name: parameter.detach().clone().requires_grad_() for name, parameter in student.named_parameters()
    }
    average = {name: parameter.detach().clone() for name, parameter in masters.items()}
    student.to(torch.bfloat16)
    working = dict(student.named_parameters())
    matrices = [parameter for name, parameter in masters.items() if _is_matrix(name, parameter)]
    others = [parameter for name, parameter in masters.items() if not _is_matrix(name, parameter)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices, lr=peak_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw", ns_steps=4
        ),
        torch.optim.AdamW(others, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rotations = {length: student.denoiser.rotations(length, 8, 8) for length in (32, 64)}
    step_loss = torch.compile(student, dynamic=False) if compiled else student
    stream = batches(data.specs, token_ids_of, rng)
    started = shown = saved = time.monotonic()
    step, losses = 0, torch.zeros(2)
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        rate = peak_rate * min(1.0, done / 0.02 + 0.02, (1 - done) / 0.4)
        batch = next(stream)
        clean = (data.latents[batch.picks].float() - data.shift) * data.scale
        noise = torch.randn_like(clean)
        even = (torch.rand(BATCH) + torch.arange(BATCH)) / BATCH  # stratified: less noise in the gradient
        sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
        cos, sin = rotations[batch.token_ids.shape[1]]
        loss = step_loss(clean, noise, sigma, batch.token_ids, batch.mask, cos, sin).mean()
        loss.backward()
        for name, master in masters.items():
            gradient = working[name].grad
            master.grad = None if gradient is None else gradient.float()
            working[name].grad = None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(working.values()), list(masters.values()))
            keep = min(1 - 1 / AVERAGE_STEPS, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), list(masters.values()), 1 - keep)
        step += 1
        losses += torch.tensor([loss.item(), 1.0])
        now = time.monotonic()
        if now - shown > 20:
            log.info("step %d done %.3f loss %.4f rate %.5f", step, done, losses[0] / losses[1], rate)
            shown, losses = now, torch.zeros(2)
        if now - saved > 120:
            saved = now
            _save(folder, student, masters, average, step, now - started)
    _save(folder, student, masters, average, step, time.monotonic() - started)


def _save(
    folder: Path,
    student: Student,
    masters: dict[str, torch.Tensor],
    average: dict[str, torch.Tensor],
    step: int,
    seconds: float,
) -> None:
    buffers = {name: value for name, value in student.state_dict().items() if name not in masters}
    state = {
        "average": {**buffers, **average},
        "weights": {**buffers, **{k: v.detach() for k, v in masters.items()}},
    }
    part = folder / "student.pt.part"
    torch.save(state, part)
    part.replace(folder / "student.pt")
    progress = {"steps": step, "samples": step * BATCH, "seconds": round(seconds)}
    (folder / "progress.json").write_text(json.dumps(progress))
