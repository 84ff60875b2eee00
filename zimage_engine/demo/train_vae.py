"""Trains the demo model's AutoencoderKL on pictures drawn as it goes; knows nothing of captions."""

from __future__ import annotations

import copy
import logging
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from zimage_engine.demo.pictures import SIDE_PX, Spec, draw, random_pair, random_scene, random_single

log = logging.getLogger(__name__)

#: Five levels make a factor of 16, so that 256x256 is 64 tokens after the 2x2 patches of the denoiser.
VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "block_out_channels": [16, 32, 64, 128, 128],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 1,
    "sample_size": SIDE_PX,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
}
#: One nat of latent costs as much as this share of the mean absolute pixel error: latents stay
#: smooth and near unit variance, and the decoder forgives a denoiser's small errors.
KL_WEIGHT = 1e-3
#: The first part of the run sees 128-pixel crops, which are four times as many; the rest sees whole
#: pictures, whose group statistics are those of real use.
CROP_SHARE = 0.6
CROP_PX = 128


def random_spec(rng: random.Random, scenes: float = 0.3) -> Spec:
    """A spec of any kind; `scenes` is the share of landscapes."""
    share = rng.random()
    if share < scenes:
        return random_scene(rng)
    return random_single(rng) if share < scenes + (1 - scenes) / 2 else random_pair(rng)


def picture_batch(rng: random.Random, count: int, crop_px: int | None = None) -> torch.Tensor:
    """Freshly drawn pictures as float32 `(count, 3, H, W)` in [-1, 1]."""
    arrays = []
    for _ in range(count):
        array = np.asarray(draw(random_spec(rng), rng))
        if crop_px:
            top, left = rng.randrange(SIDE_PX - crop_px + 1), rng.randrange(SIDE_PX - crop_px + 1)
            array = array[top : top + crop_px, left : left + crop_px]
        arrays.append(array)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(folder: Path, minutes: float, seed: int = 0) -> AutoencoderKL:
    """Train for `minutes` and leave `folder/vae.pt` (averaged weights) and latent statistics in the config.

    Learning rate: warm-up of 2 %, then a cosine down to nothing over the given time.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = AutoencoderKL(**VAE_CONFIG)
    for name, module in vae.named_modules():
        if name.endswith(".conv2"):  # each residual block starts as the identity: seen to learn faster
            torch.nn.init.zeros_(module.weight)
    with torch.no_grad():  # start with little noise on the latents: there is a signal to learn from at once
        vae.encoder.conv_out.bias[VAE_CONFIG["latent_channels"] :] = -5.0
    average = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    started, step, shown = time.monotonic(), 0, time.monotonic()
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        rate = 4e-4 * min(1, done / 0.02 + 0.05) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        whole = done > CROP_SHARE
        pictures = picture_batch(rng, 4 if whole else 8, None if whole else CROP_PX)
        with torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = vae.encoder(pictures).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-12, 4)
            sample = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            seen = vae.decoder(sample).float()
        error = (seen - pictures).abs().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = error + (seen - pictures).square().mean() + KL_WEIGHT * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - keep)
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            log.info(
                "vae step %d done %.2f error %.4f divergence %.3f",
                step,
                done,
                error.item(),
                divergence.item(),
            )
            torch.save(average.state_dict(), folder / "vae.pt")
    torch.save(average.state_dict(), folder / "vae.pt")
    return average
