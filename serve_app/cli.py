"""The command line: `zimage-turbo launch`, `generate` and `download`.

Reads what a person typed, calls one function of the server or the engine, and prints what came of
it. Help and version import no torch, Ray or Gradio; what a command needs it imports when it runs.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve_app.cli_batch import batch
from serve_app.cli_bench import bench
from serve_app.cli_cache import cache_app
from serve_app.cli_check_config import check_config
from serve_app.cli_inspect import inspect
from serve_app.cli_keys import keys_app
from serve_app.cli_names import with_launch_options, with_option_names
from serve_app.cli_plan import plan
from serve_app.cli_reproduce import reproduce
from serve_app.cli_tune import tune
from serve_app.terminal import DownloadBar, StepBar, say
from zimage_engine.errors import EngineError, InvalidRequest
from zimage_engine.types import GenerationReport, GenerationRequest, PictureReport, PromptCacheUse

if TYPE_CHECKING:
    from serve_app.image_codec import FileFormat, ImageEncoding

EXIT_FAILED = 1
EXIT_INVALID_INPUT = 2
EXIT_INTERRUPTED = 130

#: What the end of a file's name says about its format.
FORMAT_OF_SUFFIX: dict[str, FileFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def _examples(*commands: str) -> str:
    # \b keeps the lines of a help text as they are, so that a command can be copied whole.
    return "\n".join(("\b", "Examples:", *(f"  {command}" for command in commands)))


app = typer.Typer(
    name="zimage-turbo",
    help="Draw pictures from words with 8-step models, on your own machine.",
    epilog=_examples(
        "zimage-turbo launch",
        'zimage-turbo generate "a red circle on a white background" -o circle.png',
        "zimage-turbo download --model Tongyi-MAI/Z-Image-Turbo",
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(inspect)
app.command()(plan)
app.command()(bench)
app.command()(tune)
app.command()(reproduce)
app.command()(batch)
app.command("check-config")(check_config)
app.add_typer(cache_app, name="cache")
app.add_typer(keys_app, name="keys")

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH_OR_ID",
        help="A model's folder or file, or its id on the hub (owner/name). Without it: the small demo"
        " model that comes with the program.",
        show_default=False,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH_OR_ID",
        help="A whole model of the same kind, for what a single file lacks (text encoder, VAE, tokenizer).",
        show_default=False,
    ),
]
FamilyOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What kind of model it is, where its files do not tell; `zimage-turbo inspect` says which fit.",
        show_default=False,
    ),
]
TextEncoderOption = Annotated[
    str | None,
    typer.Option(
        "--text-encoder",
        metavar="PATH_OR_ID",
        help="A folder or file with the text encoder, where the model has none.",
        show_default=False,
    ),
]
VaeOption = Annotated[
    str | None,
    typer.Option(
        "--vae",
        metavar="PATH_OR_ID",
        help="A folder or file with the VAE, where the model has none.",
        show_default=False,
    ),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="PATH[=WEIGHT]",
        help="A LoRA file and how strongly it acts: 1 (the default) is as trained, 0 not at all. May be given"
        " several times.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What to compute in: bfloat16, float32 (twice the memory), or float16 where the model bears it;"
        " auto measures whether this processor is faster in bfloat16 or float32. Without it: bfloat16.",
        show_default=False,
    ),
]
OffloadOption = Annotated[
    str | None,
    typer.Option(
        metavar="WAY",
        help="How weights that do not fit on the card get there: auto, none, model, stream, sequential, disk"
        " (default: auto, the fastest that fits).",
        show_default=False,
    ),
]
VramOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The most of the card's memory that may be used, such as 12GiB (default: what is free).",
        show_default=False,
    ),
]
Float8Option = Annotated[
    bool,
    typer.Option(
        "--float8", help="Keep the denoiser's matrices in float8: half the memory, a little coarser."
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="WAY",
        help="Quantise the denoiser's matrices, int8 or fp8: half the memory, a little other pictures;"
        " int8-dynamic and fp8-dynamic multiply in the small type too, where the card does"
        " (default: not at all).",
        show_default=False,
    ),
]
ExactOption = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Draw by the plain path, bit for bit as stock diffusers does, whatever `zimage-turbo tune` found"
        " to be quicker.",
    ),
]
EmbeddingCacheOption = Annotated[
    str | None,
    typer.Option(
        "--embedding-cache",
        metavar="SIZE",
        help="Memory of the host in which a worker keeps encoded prompts, so that one that returns is not"
        " encoded again; 0 is none (default: 64MiB).",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="Where to compute: cuda, cuda:1, mps or cpu. Without it: the best that is there.",
        metavar="DEVICE",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        metavar="COUNT",
        help="Threads that a CPU computes with (default: every core that the process may use).",
        show_default=False,
    ),
]


def main() -> None:
    """The entry point of `zimage-turbo`."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"zimage-turbo {version('zimage-turbo')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Draw pictures from words with 8-step models, on your own machine."""


@app.command(
    epilog=_examples(
        "zimage-turbo launch",
        "zimage-turbo launch --model Tongyi-MAI/Z-Image-Turbo --port 8000",
        "ZIMAGE_API_KEY=secret zimage-turbo launch --host 0.0.0.0",
        "zimage-turbo launch --config server.yaml",
        "zimage-turbo launch --model models/z-image-turbo --lora style.safetensors=0.8",
    ),
)
def launch(
    model: ModelOption = None,
    base: BaseOption = None,
    text_encoder: TextEncoderOption = None,
    vae: VaeOption = None,
    family: FamilyOption = None,
    lora: LoraOption = None,
    lora_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder whose .safetensors files requests may name as LoRAs; what comes and goes there while"
            " the server runs is seen (default: none).",
            show_default=False,
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="NAME=PATH_OR_ID",
            help="Another model, loaded when a request names it. May be given several times.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = None,
    offload: OffloadOption = None,
    vram: VramOption = None,
    float8: Float8Option = False,
    quantize: QuantizeOption = None,
    exact: ExactOption = False,
    embedding_cache: EmbeddingCacheOption = None,
    port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT", help="Port of the page and of the API (default: 7860).", show_default=False
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen on; for others than this machine a key is needed, in the environment as"
            " ZIMAGE_API_KEY or from `zimage-turbo keys` (default: 127.0.0.1).",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            help="Workers that draw, each with the model on a GPU of its own (default: 1).",
            show_default=False,
        ),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Collector that gets an OpenTelemetry trace of each request, such as http://127.0.0.1:4318"
            " (default: no traces).",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML file with any of the settings. What is given here, or in the environment as"
            " ZIMAGE_<SETTING>, goes before it.",
            show_default=False,
        ),
    ] = None,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Serve the API alone, without the page.")] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Keep nothing of what is drawn on the page.")
    ] = False,
) -> None:
    """Start the server: the page and the images API.

    The page is at http://127.0.0.1:7860, and OpenAI's images API beside it under /v1. The command
    says when both are ready. Ctrl-C ends it and everything that it started.
    """
    from serve_app.settings import CONFIG_FILE_VARIABLE, SettingsError, load_settings

    with _errors_as_sentences():
        if config is not None:
            if not config.is_file():
                raise InvalidRequest(
                    f"--config must name a YAML file, and there is none at {config}", "config"
                )
            # By the environment, because the server's other processes read their settings too.
            os.environ[CONFIG_FILE_VARIABLE] = str(config.resolve())
        chosen = {
            "model": model,
            "base": base,
            "text_encoder": text_encoder,
            "vae": vae,
            "family": family,
            "loras": lora or None,
            "lora_folder": lora_folder,
            "models": also or None,
            "dtype": dtype,
            "offload": offload,
            "vram": vram,
            "float8": float8 or None,
            "quantize": quantize,
            "exact": exact or None,
            "embedding_cache": embedding_cache,
            "port": port,
            "host": host,
            "device": device,
            "cpu_threads": threads,
            "num_replicas": replicas,
            "otlp_endpoint": otlp_endpoint,
            "ui": False if no_ui else None,
            "history": False if no_history else None,
        }
        try:
            settings = load_settings(**chosen)
        except SettingsError as wrong:
            typed = {name for name, value in chosen.items() if value is not None}
            raise InvalidRequest(with_launch_options(str(wrong), typed)) from wrong

        from serve_app.app import launch as launch_server
        from serve_app.local_cluster import LaunchFailed

        try:
            launch_server(settings)
        except LaunchFailed as failed:
            say(f"zimage-turbo: {failed}")
            raise typer.Exit(EXIT_FAILED) from failed


@app.command(
    epilog=_examples(
        'zimage-turbo generate "a red circle, white background" -o circle.png',
        'zimage-turbo generate "白色背景上的红色圆形" -o circle.webp --seed 7',
        'zimage-turbo generate "a small blue star" -o star.png --n 3',
        'zimage-turbo generate "a small blue star" -o star.png --lora style.safetensors=0.8',
    ),
)
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw, in English or Chinese.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to write the picture; the ending chooses the format: .png, .jpg, .jpeg or .webp.",
            show_default=False,
        ),
    ],
    model: ModelOption = None,
    base: BaseOption = None,
    text_encoder: TextEncoderOption = None,
    vae: VaeOption = None,
    family: FamilyOption = None,
    lora: LoraOption = None,
    dtype: DtypeOption = None,
    offload: OffloadOption = None,
    vram: VramOption = None,
    float8: Float8Option = False,
    quantize: QuantizeOption = None,
    exact: ExactOption = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            help="The same seed draws the same picture again. Without it: a new one, which is printed.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="Width and height in pixels, such as 256x256. Without it: the model's own size.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            help="Steps from noise to picture; 8 is right for turbo models.",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="How closely to follow the words, best from 1.5 to 2.5; 1 turns it off and halves the work.",
            show_default=False,
        ),
    ] = None,
    guidance_until: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            help="Guidance only up to this part of the way from noise to picture, 0 to 1: quicker, and a"
            " little another picture; for Z-Image models (default: 1, all of it).",
            show_default=False,
        ),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What should not be in the picture.", show_default=False),
    ] = None,
    n: Annotated[
        int,
        typer.Option(
            "--n",
            "-n",
            min=1,
            max=100,
            metavar="COUNT",
            help="How many pictures, each with the next seed, written as star-1.png, star-2.png ...",
        ),
    ] = 1,
    no_enhance: Annotated[
        bool, typer.Option("--no-enhance", help="Draw the prompt as it stands, without added quality words.")
    ] = False,
    refine: Annotated[
        bool | None,
        typer.Option(
            "--refine/--no-refine",
            help="Strengthen fine detail of the finished picture (default: with enhancement).",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole report as JSON instead of a line a picture.")
    ] = False,
) -> None:
    """Draw a picture into a file, without a server.

    The file carries the prompt, the seed and all settings, for image viewers that show them.
    """
    with _errors_as_sentences():
        encoding = _encoding_for(output)
        files = output_files(output, n)
        width, height = parse_size(size)
        seed_of_first = first_seed(seed, n)
        request = GenerationRequest(
            prompt=prompt,
            negative_prompt=negative,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            guidance_until=guidance_until,
            enhance=not no_enhance,
            refine=refine,
            exact=exact,
        )
        from zimage_engine.loading.lora_layouts import check_loras
        from zimage_engine.loading.lora_weight import parse_lora
        from zimage_engine.memory.residency import MemoryWishes, parse_memory

        loras = [parse_lora(text) for text in lora or ()]
        check_loras(loras)
        from serve_app.settings import allocator_environment

        # Torch reads it once, when a card is first used.
        os.environ.update(allocator_environment())
        from zimage_engine import Engine

        memory = MemoryWishes(
            offload=None if offload == "auto" else offload,
            vram_bytes=None if vram is None else parse_memory(vram),
            float8=float8,
            quantize=quantize,
        )
        say(f"Loading {model or 'the demo model'} ...", only_on_a_terminal=True)
        engine = Engine.load(
            model,
            device,
            family=family,
            base=base,
            text_encoder=text_encoder,
            vae=vae,
            loras=loras,
            dtype=dtype,
            memory=memory,
            threads=threads,
            exact=exact,
            may_compile=False,  # it takes longer than a picture or ten
        )
        if because := engine.description.dtype_because:
            say(f"Computing in {engine.description.dtype}: {because}", only_on_a_terminal=True)
        reports: list[GenerationReport] = []
        # One call a picture, so that what is drawn is on the disk at once, whatever happens to the next.
        for index, file in enumerate(files):
            with StepBar(number=index + 1, of=n) as bar:
                result = engine.generate(replace(request, seed=seed_of_first + index), on_step=bar.on_step)
            _write_picture(file, result.images[0], encoding, result.report)
            reports.append(result.report)
            if not as_json:
                _tell_picture(file, result.report, first=index == 0)
        if as_json:
            facts = {**join_reports(reports).to_dict(), "files": [str(file) for file in files]}
            typer.echo(json.dumps(facts, ensure_ascii=False, indent=2))


@app.command(
    epilog=_examples(
        "zimage-turbo download --model Tongyi-MAI/Z-Image-Turbo",
        "zimage-turbo download --model Tongyi-MAI/Z-Image-Turbo --dest models/z-image-turbo",
        "HF_ENDPOINT=https://hub.example.org zimage-turbo download --model Tongyi-MAI/Z-Image-Turbo",
    ),
)
def download(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="ID", help="The model's id on the hub: owner/name.", show_default=False
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A branch, tag or commit (default: main).", show_default=False),
    ] = None,
    dest: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Make a plain folder of it here. Without it: the Hugging Face cache (HF_HUB_CACHE, HF_HOME),"
            " where launch and generate find it by its id.",
            show_default=False,
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            envvar="HF_ENDPOINT", metavar="URL", help="Address of the hub or of a mirror.", show_default=False
        ),
    ] = None,
) -> None:
    """Fetch a model and check that all of it arrived.

    What is interrupted goes on from where it was when the same command is run again. Sizes and
    hashes are compared with those that the hub announces. For private and gated models set HF_TOKEN.
    """
    from zimage_engine.loading.hub import download_model, gigabytes

    with _errors_as_sentences(when_interrupted="what has arrived is kept; run it again to go on from there"):
        with DownloadBar() as bar:
            report = download_model(
                model, revision=revision, dest=dest, endpoint=endpoint, on_progress=bar.on_progress
            )
        typer.echo(
            f"{report.model_id} at {report.commit[:7]}: {report.file_count} files,"
            f" {gigabytes(report.total_bytes)}, all whole"
        )
        typer.echo(f"fetched {gigabytes(report.fetched_bytes)} in {report.seconds:.0f} s into {report.path}")
        if report.left_out:
            typer.echo(
                f"left out {len(report.left_out)} files that are not needed, such as {report.left_out[0][0]}"
            )
        typer.echo(f"next: zimage-turbo launch --model {report.path if dest else report.model_id}")


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """ "512x256" as (512, 256); None and "auto" as (None, None), the model's own size."""
    if text is None or text.strip().lower() == "auto":
        return None, None
    size = re.fullmatch(r"(\d{1,6})\s*[xX×*]\s*(\d{1,6})", text.strip())
    if size is None:
        raise InvalidRequest(
            f"--size must be width x height in pixels, such as 512x512, got {text!r}", "size"
        )
    return int(size[1]), int(size[2])


def first_seed(seed: int | None, n: int) -> int:
    """The seed of the first of `n` pictures: the one that was asked for, or a new one with room for all.

    Raises InvalidRequest if the last picture would have none.
    """
    from zimage_engine.sampling.plan import MAX_SEED

    if seed is None:
        return secrets.randbelow(MAX_SEED - n + 2)
    if not 0 <= seed <= MAX_SEED - n + 1:
        raise InvalidRequest(
            f"--seed must be from 0 to {MAX_SEED - n + 1} for {n} picture(s), each of which takes the next;"
            f" got {seed}",
            "seed",
        )
    return seed


def output_files(output: Path, n: int) -> list[Path]:
    """The files of `n` pictures: the one that was named, or star-1.png, star-2.png, ... for star.png.

    Raises InvalidRequest if its folder cannot take them.
    """
    folder = output.parent
    if output.is_dir():
        raise InvalidRequest(f"-o must name a file, and {output} is a folder; add a name such as picture.png")
    if not folder.is_dir():
        raise InvalidRequest(
            f"there is no folder {folder} to write {output.name} into; make it first", "output"
        )
    if not os.access(folder, os.W_OK):
        raise InvalidRequest(f"the folder {folder} may not be written to; choose another for -o", "output")
    if n == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, n + 1)]


def join_reports(reports: list[GenerationReport]) -> GenerationReport:
    """One report of pictures that were drawn one by one from the same request."""
    first = reports[0]
    pictures: tuple[PictureReport, ...] = tuple(picture for report in reports for picture in report.pictures)
    uses = [report.prompt_cache for report in reports if report.prompt_cache is not None]
    return replace(
        first,
        pictures=pictures,
        seconds=sum(report.seconds for report in reports),
        prompt_cache=PromptCacheUse(sum(use.hits for use in uses), sum(use.misses for use in uses))
        if uses
        else None,
    )


def _encoding_for(output: Path) -> ImageEncoding:
    from serve_app.image_codec import ImageEncoding

    if output.suffix.lower() not in FORMAT_OF_SUFFIX:
        got = f"got {output.suffix}" if output.suffix else f"got none in {output.name}"
        raise InvalidRequest(f"the file after -o must end in {', '.join(FORMAT_OF_SUFFIX)}; {got}", "output")
    return ImageEncoding(FORMAT_OF_SUFFIX[output.suffix.lower()])


def _write_picture(file: Path, image: Any, encoding: ImageEncoding, report: GenerationReport) -> None:
    """The picture under its name, whole or not at all."""
    from serve_app.image_codec import encode, facts_of

    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(encode(image, encoding, facts_of(report, 0)))
        unfinished.replace(file)
    except OSError as failed:
        say(
            f"zimage-turbo: could not write {file} ({failed.strerror}); "
            f"the seed was {report.pictures[0].seed}"
        )
        raise typer.Exit(EXIT_FAILED) from failed
    finally:
        unfinished.unlink(missing_ok=True)


def _tell_picture(file: Path, report: GenerationReport, first: bool) -> None:
    picture = report.pictures[0]
    typer.echo(f"{file}  seed {picture.seed}  {picture.seconds:.1f} s")
    for notice in (*(report.warnings if first else ()), *picture.warnings):
        say(f"warning: {with_option_names(notice.message)}")


@contextmanager
def _errors_as_sentences(when_interrupted: str = "") -> Iterator[None]:
    """What the engine raises on purpose becomes one sentence on stderr and an exit code."""
    try:
        yield
    except EngineError as failed:
        say(f"zimage-turbo: {with_option_names(str(failed))}")
        raise typer.Exit(
            EXIT_INVALID_INPUT if isinstance(failed, InvalidRequest) else EXIT_FAILED
        ) from failed
    except KeyboardInterrupt:
        say("interrupted" + (f": {when_interrupted}" if when_interrupted else ""))
        raise typer.Exit(EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
