"""Trains the demo model from nothing but the drawing code: `python -m zimage_engine.demo.train --help`.

    vae      pictures -> an autoencoder                     work/vae.pt
    encode   pictures -> latents, with their specs          work/latents.pt
    student  latents and captions -> text encoder, denoiser work/student.pt
    export   all of it as a ZImagePipeline folder           --out

Each stage leaves its result in the work folder and is skipped where that is there already, so a run
goes on where it was stopped; `--resume` trains an existing student further.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from zimage_engine.demo.model import new_text_encoder, new_transformer, write_pipeline
from zimage_engine.demo.pictures import SceneSpec, ShapesSpec, Spec, Thing
from zimage_engine.demo.tokenizer import build_tokenizer
from zimage_engine.demo.train_denoiser import LatentSet, Student, encode_pictures, train_denoiser
from zimage_engine.demo.train_vae import VAE_CONFIG, train_vae

log = logging.getLogger("zimage_engine.demo.train")


def main() -> None:
    """Run the stages that the arguments and the work folder ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m zimage_engine.demo.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for what the stages leave")
    parser.add_argument("--out", type=Path, help="write the finished ZImagePipeline folder here")
    parser.add_argument("--vae-minutes", type=float, default=20, help="time for the autoencoder (default 20)")
    parser.add_argument(
        "--minutes", type=float, default=90, help="time for the student (default 90; 0 only exports)"
    )
    parser.add_argument("--pictures", type=int, default=16_000, help="pictures to encode (default 16000)")
    parser.add_argument(
        "--rate", type=float, default=2e-3, help="peak learning rate of the student (default 0.002)"
    )
    parser.add_argument("--resume", action="store_true", help="train the student in the work folder further")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)

    if not (work / "vae.pt").exists():
        train_vae(work, arguments.vae_minutes, arguments.seed)
    if not (work / "latents.pt").exists():
        write_latents(work, arguments.pictures, arguments.seed)
    if arguments.minutes > 0 and (arguments.resume or not (work / "student.pt").exists()):
        train_denoiser(
            work,
            build_tokenizer(),
            read_latents(work),
            arguments.minutes,
            arguments.seed,
            resume=work / "student.pt" if arguments.resume else None,
            peak_rate=arguments.rate,
        )
    if arguments.out:
        export(work, arguments.out)


def write_latents(folder: Path, count: int, seed: int) -> None:
    """Encode `count` freshly drawn pictures into `folder/latents.pt` and their specs into `specs.json`."""
    specs, latents = encode_pictures(read_vae(folder), count, seed)
    (folder / "specs.json").write_text(json.dumps([asdict(spec) for spec in specs]))
    known = latents.float()
    statistics = {"shift": known.mean().item(), "scale": 1 / known.std().item()}
    torch.save({"latents": latents, **statistics}, folder / "latents.pt")


def read_latents(folder: Path) -> LatentSet:
    """What `write_latents` left."""
    stored = torch.load(folder / "latents.pt", weights_only=True)
    specs = [_spec(row) for row in json.loads((folder / "specs.json").read_text())]
    return LatentSet(specs, stored["latents"], stored["shift"], stored["scale"])


def _spec(row: dict) -> Spec:
    if "things" in row:
        return ShapesSpec(
            row["background"], tuple(Thing(**thing) for thing in row["things"]), row["relation"]
        )
    return SceneSpec(**{**row, "items": tuple(row["items"])})


def read_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder that `train_vae` left, in float32."""
    vae = AutoencoderKL(**VAE_CONFIG)
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True))
    return vae


def export(folder: Path, out: Path) -> None:
    """Write the averaged weights as a ZImagePipeline folder; the VAE's config tells their shift and scale."""
    tokenizer = build_tokenizer()
    stored = torch.load(folder / "latents.pt", weights_only=True, mmap=True)
    vae = read_vae(folder)
    vae.register_to_config(shift_factor=round(stored["shift"], 4), scaling_factor=round(stored["scale"], 4))
    student = Student(new_text_encoder(len(tokenizer)), new_transformer())
    student.load_state_dict(torch.load(folder / "student.pt", weights_only=True)["average"])
    write_pipeline(out, vae, student.text_encoder, student.denoiser.transformer, tokenizer)
    log.info("wrote %s", out)


if __name__ == "__main__":
    main()
