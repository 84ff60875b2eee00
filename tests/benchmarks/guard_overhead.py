"""What the guard costs where nothing goes wrong, and what one transient fault costs.

    python -m tests.benchmarks.guard_overhead [--pairs 40] [--real-pairs 10] [--layers 2] [--side 512]

Stock diffusers and the guard draw by turns in one process, the first of a pair changing each time; a ratio is
the median of the pairs' ratios, so what slows both alike cancels out.

draw      the demo model from given prompt embeddings to the picture, with and without the guard
generate  the demo model from the prompt to the picture: the whole engine, its picture check included
real      a denoiser of Z-Image's real width with `--layers` of its 30 layers and random weights, two steps
guard     its own time a step: a scheduler's step with it less one without, latents of a 1024x1024 picture
retry     the demo model, the denoiser's answer to step 4 made NaN once: calls of the denoiser and time
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from zimage_engine import Engine, GenerationRequest
from zimage_engine.families import family_named
from zimage_engine.memory.snapshot import device_clock
from zimage_engine.sampling.guard import StepWatch, guarded_scheduler
from zimage_engine.sampling.pipeline import GuardedPipeline, PromptEmbeddings
from zimage_engine.sampling.plan import SamplingPlan

FAMILY = family_named("z-image-turbo")
PROMPT = "a red circle on a white background"
SEED, DEMO_STEPS, DEMO_SIDE_PX, REAL_STEPS = 7, 8, 256, 2
#: The guard may add this share to a step of real size.
MOST_RATIO = 1.01
FAULTY_STEP = 4
#: Z-Image's head width and the width of its text states; 30 heads make its width of 3840.
HEAD_WIDTH, TEXT_WIDTH, TEXT_TOKENS = 128, 2560, 77
LATENTS_OF_1024 = (1, 16, 128, 128)

Draw = Callable[[], object]


@dataclass(frozen=True)
class Pairs:
    """Medians of both, in seconds, the median of the pairs' ratios, and the quartiles of these."""

    stock_seconds: float
    ours_seconds: float
    ratio: float
    quartiles: tuple[float, float]


def measure_pairs(stock: Draw, ours: Draw, count: int) -> Pairs:
    """Draw `count` pairs after one that does not count, the first of a pair by turns."""
    stock(), ours()
    timed = []
    for index in range(count):
        first, second = (stock, ours) if index % 2 else (ours, stock)
        one, other = _seconds(first), _seconds(second)
        timed.append((one, other) if index % 2 else (other, one))
    ratios = [ours_seconds / stock_seconds for stock_seconds, ours_seconds in timed]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Pairs(
        statistics.median(seconds for seconds, _ in timed),
        statistics.median(seconds for _, seconds in timed),
        statistics.median(ratios),
        (low, high),
    )


def _seconds(draw: Draw) -> float:
    began = time.perf_counter()
    draw()
    return time.perf_counter() - began


def plan_for(side_px: int, steps: int, guidance_scale: float) -> SamplingPlan:
    return SamplingPlan(
        prompt=PROMPT,
        negative_prompt="",
        width_px=side_px,
        height_px=side_px,
        steps=steps,
        guidance_scale=guidance_scale,
        pipeline_guidance=FAMILY.to_pipeline_guidance(guidance_scale),
        seeds=(SEED,),
        refine=False,
        warnings=(),
    )


def both_ways(pipeline: Any, plan: SamplingPlan, embeddings: PromptEmbeddings) -> tuple[Draw, Draw]:
    """The same drawing by the stock pipeline and by the guarded one."""
    guarded = GuardedPipeline(pipeline, FAMILY, device_clock("cpu"))

    def stock() -> object:
        arguments = {name: list(tensors) for name, tensors in embeddings.arguments.items()}
        return pipeline(
            **arguments,
            width=plan.width_px,
            height=plan.height_px,
            num_inference_steps=plan.steps,
            guidance_scale=plan.pipeline_guidance,
            generator=torch.Generator("cpu").manual_seed(SEED),
        )

    def ours() -> object:
        return guarded.draw(plan, embeddings, SEED, check=lambda: None, on_step=lambda *_: None)

    return stock, ours


def measure_generate(engine: Engine, count: int) -> Pairs:
    """From the prompt to the picture: the engine against the pipeline's call alone."""
    request = GenerationRequest(
        PROMPT,
        negative_prompt="",
        width=DEMO_SIDE_PX,
        height=DEMO_SIDE_PX,
        num_inference_steps=DEMO_STEPS,
        guidance_scale=1.8,
        seed=SEED,
        enhance=False,
    )

    def stock() -> object:
        return engine.pipeline(
            PROMPT,
            width=DEMO_SIDE_PX,
            height=DEMO_SIDE_PX,
            num_inference_steps=DEMO_STEPS,
            guidance_scale=FAMILY.to_pipeline_guidance(1.8),
            generator=torch.Generator("cpu").manual_seed(SEED),
        )

    return measure_pairs(stock, lambda: engine.generate(request), count)


def real_width_pipeline(demo: Any, layers: int, heads: int) -> Any:
    """Z-Image's width with random weights in bfloat16, and a VAE too small to matter.

    The refiner layers are left out, so that exactly `layers` of the 30 are run.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformer = ZImageTransformer2DModel(
            dim=heads * HEAD_WIDTH,
            n_heads=heads,
            n_kv_heads=heads,
            n_layers=layers,
            n_refiner_layers=0,
            in_channels=16,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[32, 48, 48],
            axes_lens=[1536, 512, 512],
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8] * 4,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=1,
            mid_block_add_attention=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():  # diffusers leaves these as they lie in memory
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    pipeline = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae.eval(),
        demo.text_encoder,
        demo.tokenizer,
        transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure_real(pipeline: Any, side_px: int, count: int) -> Pairs:
    states = torch.randn(TEXT_TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    embeddings = PromptEmbeddings({"prompt_embeds": (states,), "negative_prompt_embeds": ()}, 0.0, ())
    return measure_pairs(*both_ways(pipeline, plan_for(side_px, REAL_STEPS, 1.0), embeddings), count)


def measure_guard(rounds: int) -> tuple[float, float]:
    """Median microseconds of one step of the scheduler: the stock one, and what the guard adds."""
    stock = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    generator = torch.Generator("cpu").manual_seed(0)
    watch = StepWatch(FAMILY.residual, generator, lambda _step: None, lambda _step, _latents: None)
    schedulers = {"stock": stock, "guarded": guarded_scheduler(stock, watch)}
    output = torch.randn(LATENTS_OF_1024, generator=generator)
    sample = torch.randn(LATENTS_OF_1024, generator=generator)
    took: dict[str, list[float]] = {name: [] for name in schedulers}
    for _ in range(rounds):
        for name, scheduler in schedulers.items():
            scheduler.set_timesteps(DEMO_STEPS)
            for timestep in scheduler.timesteps:
                began = time.perf_counter()
                scheduler.step(output, timestep, sample, return_dict=False)
                took[name].append((time.perf_counter() - began) * 1e6)
    medians = {name: statistics.median(values) for name, values in took.items()}
    return medians["stock"], medians["guarded"] - medians["stock"]


class OneFault:
    """Counts the calls of a denoiser, and makes its answer to call `at` (from 1) NaN; 0: to none."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0

    def __call__(self, _module: Any, _arguments: Any, output: Any) -> Any:
        self.calls += 1
        if self.calls != self.at:
            return None
        first = output[0]
        broken = [each * float("nan") for each in first] if isinstance(first, list) else first * float("nan")
        return (broken, *output[1:])


def measure_retry(pipeline: Any, undisturbed: Draw, count: int) -> tuple[Pairs, int, int]:
    """Pairs of undisturbed and disturbed drawings, and how often each calls the denoiser."""
    fault = OneFault()
    calls: dict[int, int] = {}

    def with_fault(at: int) -> object:
        fault.calls, fault.at = 0, at
        drawn = undisturbed()
        calls[at] = fault.calls
        return drawn

    handle = pipeline.transformer.register_forward_hook(fault)
    try:
        pairs = measure_pairs(lambda: with_fault(0), lambda: with_fault(FAULTY_STEP), count)
    finally:
        handle.remove()
    return pairs, calls[0], calls[FAULTY_STEP]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=40, help="of the demo model's pictures")
    parser.add_argument("--real-pairs", type=int, default=10)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=30)
    parser.add_argument("--side", type=int, default=512, help="pixels of the real-width picture")
    chosen = parser.parse_args()
    engine = Engine.load(device="cpu", exact=True)
    engine.pipeline.set_progress_bar_config(disable=True)
    plan = plan_for(DEMO_SIDE_PX, DEMO_STEPS, 1.8)
    guarded = GuardedPipeline(engine.pipeline, FAMILY, device_clock("cpu"))
    stock, ours = both_ways(engine.pipeline, plan, guarded.encode(plan, max_tokens=512))

    _print("            stock     guarded   ratio  quartiles")
    _row("draw", measure_pairs(stock, ours, chosen.pairs))
    _row("generate", measure_generate(engine, chosen.pairs))
    real = real_width_pipeline(engine.pipeline, chosen.layers, chosen.heads)
    pairs = measure_real(real, chosen.side, chosen.real_pairs)
    _row("real", pairs)
    step_microseconds = pairs.stock_seconds / REAL_STEPS * 1e6
    scheduler_microseconds, added = measure_guard(rounds=max(20, chosen.pairs * 4))
    _print(
        f"real: {chosen.layers} layers of width {chosen.heads * HEAD_WIDTH}, {chosen.side}x{chosen.side}: "
        f"{step_microseconds / 1e3:.1f} ms a step; median at most {MOST_RATIO} is wanted"
    )
    _print(
        f"guard: {added:.0f} us a step on top of the scheduler's {scheduler_microseconds:.0f} us, "
        f"{100 * added / step_microseconds:.4f} % of that step"
    )
    retried, before, after = measure_retry(engine.pipeline, ours, chosen.pairs)
    added_steps = (retried.ours_seconds - retried.stock_seconds) / (retried.stock_seconds / DEMO_STEPS)
    _row("retry", retried)
    _print(
        f"retry: {before} calls of the denoiser undisturbed, {after} with one fault at step {FAULTY_STEP}; "
        f"{added_steps:.1f} eighths of the undisturbed time more"
    )
    _print(f"load {os.getloadavg()[0]:.1f}")


def _row(name: str, pairs: Pairs) -> None:
    low, high = pairs.quartiles
    _print(
        f"{name:9}{pairs.stock_seconds * 1e3:8.1f}ms {pairs.ours_seconds * 1e3:8.1f}ms {pairs.ratio:7.4f}"
        f"  {low:.4f} to {high:.4f}"
    )


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
