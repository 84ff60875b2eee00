"""Measures memory and speed of the published shape on a GPU; `make bench-gpu` runs all of it.

    python -m tests.gpu.bench [--part resident|limited|peers|fragmentation|oom|all|report] [--only JOB]
                              [--minutes 9.5] [--tiny] [--device cuda:0] [--json OUT] [--markdown OUT]

Nothing is downloaded: the model has random weights (`random_model.py`). Where the project is not installed,
run it from the repository's root; of what it depends on it needs torch, diffusers, transformers, accelerate,
peft, psutil, platformdirs and their like, and no server. It takes about 21 GB of the host's
memory, twice that while weights are locked, and 21 GB of disk in the temporary folder for the residency that
reads from there. Each part ends within `--minutes`; a part consists of jobs, which share its time, and
`--only` runs one of them with all of it. Every job has a process of its own, because the allocator is told
how to work before CUDA starts; what it measured before it failed or ran late is kept. With `--json`, parts
run one by one are gathered in the same file, and the report is made of all that is there; `--part report`
only makes it again, where matplotlib is, say. `--tiny` runs the same code in this process with the tiny
model, on the CPU too: its times mean nothing, and memory figures are left out.

All of it takes up to 48 minutes. Half an hour in three commands of ten minutes is enough for every target:

    python -m tests.gpu.bench --json J --part resident --minutes 4.7
    python -m tests.gpu.bench --json J --part limited --only 12GiB --minutes 4.7
    python -m tests.gpu.bench --json J --part fragmentation --minutes 9.5
    python -m tests.gpu.bench --json J --part peers --only unlimited --minutes 4.7
    python -m tests.gpu.bench --json J --part oom --only denoise --minutes 4.7

Exit status 1: a target was missed or a job failed. What was not measured is no miss, and is named.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.gpu.parts import Bench

Row = dict[str, Any]

ALLOCATOR = "PYTORCH_ALLOC_CONF"
#: What the server starts its workers with, and what PyTorch does by itself.
EXPANDABLE, PLAIN = "expandable_segments:True", "expandable_segments:False"
#: A job may take so much longer than it was given before it is ended: a picture or a move was under way.
GRACE_SECONDS = 25.0


@dataclass(frozen=True)
class Job:
    """One process's work. `run` is given the bench and gives its rows as they come."""

    part: str
    name: str
    run: Callable[[Bench], Iterator[Row]] = field(repr=False)
    allocator: str = EXPANDABLE
    cards_gib: tuple[int, ...] = ()


def jobs(tiny: bool) -> tuple[Job, ...]:
    """Every job, in the order of the report."""
    from tests.gpu import parts

    sizes = parts.scale(tiny).cards_gib
    return (
        Job("resident", "unlimited", lambda bench: parts.residencies(bench, None)),
        *(Job("limited", f"{gib}GiB", _limited(gib)) for gib in sizes),
        Job("peers", "unlimited", lambda bench: parts.peers(bench, None)),
        *(() if tiny else (Job("peers", "12GiB", lambda bench: parts.peers(bench, 12)),)),
        Job("fragmentation", "with", lambda bench: parts.fragmentation(bench, True, 12)),
        Job("fragmentation", "without", lambda bench: parts.fragmentation(bench, False, 12), PLAIN),
        Job("oom", "encode", lambda bench: parts.oom(bench, "encode", 24)),
        Job("oom", "denoise", lambda bench: parts.oom(bench, "denoise", 24)),
        Job("oom", "decode", lambda bench: parts.oom(bench, "decode", 24)),
    )


def _limited(card_gib: int) -> Callable[[Bench], Iterator[Row]]:
    from tests.gpu import parts

    return lambda bench: parts.residencies(bench, card_gib)


PARTS = ("resident", "limited", "peers", "fragmentation", "oom")


def run_job(
    job: Job, device: str, tiny: bool, seconds: float, keep: Callable[[Row], None] = lambda so_far: None
) -> Row:
    """The job in this process: what was measured, where, and how long it took. `keep` is given what there is
    after each row, marked as failed: what comes next may end the process."""
    from tests.gpu.parts import Bench

    started = time.monotonic()
    gc.freeze()  # what torch and its like are made of need not be searched at each of the many collections
    try:
        with tempfile.TemporaryDirectory(prefix="zimage-bench-") as scratch:
            bench = Bench(device, tiny, seconds, Path(scratch))
            result: Row = {
                "part": job.part,
                "job": job.name,
                "tiny": tiny,
                "has_published_shape": bench.model.has_published_shape,
                "allocator": os.environ.get(ALLOCATOR, "as PyTorch has it"),
                "speed": asdict(bench.speed),
                "rows": [],
            }
            for row in job.run(bench):
                result["rows"].append(row)
                result |= {"machine": bench.card.facts(), "seconds": time.monotonic() - started}
                keep({**result, "failed": "the job did not come to its end"})
    finally:
        gc.unfreeze()
    return result | {"machine": bench.card.facts(), "seconds": time.monotonic() - started}


def run_apart(job: Job, device: str, tiny: bool, seconds: float) -> Row:
    """The job in a process of its own, which is ended when it takes clearly longer than it was given. What it
    had measured until then is kept."""
    with tempfile.TemporaryDirectory(prefix="zimage-bench-") as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", "tests.gpu.bench", "--part", job.part, "--only", job.name]
        command += ["--device", device, "--minutes", str(seconds / 60), "--answer", str(answer)]
        command += ["--tiny"] if tiny else []
        # Weights on the disk lie in here too, and go with it however the process ends.
        environment = {**os.environ, ALLOCATOR: job.allocator, "HF_HUB_OFFLINE": "1", "TMPDIR": scratch}
        environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)  # the name before; both must not disagree
        reason = f"the job took longer than {seconds:.0f} s; give it more with --minutes or --only"
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended = subprocess.run(command, env=environment, timeout=seconds + GRACE_SECONDS, check=False)
            reason = f"the job's process ended with status {ended.returncode}"
        told: Row = {"part": job.part, "job": job.name, "tiny": tiny, "failed": reason, "rows": []}
        if answer.is_file():
            told = json.loads(answer.read_text())
    return {**told, "failed": reason} if "failed" in told else told


def run_part(
    chosen: Sequence[Job], device: str, tiny: bool, seconds: float, store: Callable[[Row], None]
) -> None:
    """The jobs one after the other, the time that is left shared evenly among those still to come."""
    ends = time.monotonic() + seconds
    for number, job in enumerate(chosen):
        share = max(0.0, (ends - time.monotonic()) / (len(chosen) - number))
        say(f"{job.part} {job.name}: at most {share:.0f} s")
        run = run_job if tiny else run_apart
        store(run(job, device, tiny, share))


def merged(earlier: Sequence[Row], result: Row) -> list[Row]:
    """The results with this one in the place of an earlier one of the same job."""
    kept = [row for row in earlier if (row["part"], row["job"]) != (result["part"], result["job"])]
    return [*kept, result]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0 where nothing that was measured missed its target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=(*PARTS, "all", "report"), default="all")
    parser.add_argument("--only", help="one job of the part, such as 12GiB")
    parser.add_argument("--minutes", type=float, default=9.5, help="the most that each part may take")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", help="default: cuda:0, with --tiny the CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    device = asked.device or ("cpu" if asked.tiny else "cuda:0")
    if asked.part == "report":
        return _report_again(asked.json, asked.markdown)
    if (problem := _problem(device, asked.tiny)) is not None:
        say(problem)
        return 2
    wanted = [
        job for job in jobs(asked.tiny) if asked.part in (job.part, "all") and asked.only in (None, job.name)
    ]
    if not wanted:
        names = sorted({f"{job.part} {job.name}" for job in jobs(asked.tiny)})
        say(f"there is no job {asked.only!r} in the part {asked.part}; there are: {', '.join(names)}")
        return 2
    if asked.answer is not None:
        write = partial(_write_answer, asked.answer)
        write(run_job(wanted[0], device, asked.tiny, 60 * asked.minutes, write))
        return 0
    try:
        results = _earlier(asked.json, asked.tiny)
    except ValueError as error:
        say(str(error))
        return 2

    def store(result: Row) -> None:
        nonlocal results
        results = merged(results, result)
        write_reports(results, asked.json, asked.markdown)

    for part in PARTS:
        chosen = [job for job in wanted if job.part == part]
        if chosen:
            run_part(chosen, device, asked.tiny, 60 * asked.minutes, store)
    return _told(results)


def _report_again(to_json: Path | None, to_markdown: Path | None) -> int:
    """The reports of what the file holds; nothing is measured."""
    if to_json is None or not to_json.is_file():
        say("--part report makes the report of results that are there; name them with --json")
        return 2
    results: list[Row] = json.loads(to_json.read_text())["results"]
    write_reports(results, to_json, to_markdown)
    return _told(results)


def _told(results: Sequence[Row]) -> int:
    """Print the report; 1 where something was missed or failed."""
    from tests.gpu.report import markdown, targets

    say(markdown(results))
    is_missed = any(target.outcome == "FAIL" for target in targets(results))
    return 1 if is_missed or any("failed" in result for result in results) else 0


def _write_answer(path: Path, result: Row) -> None:
    """Whole or not at all: the process may be ended meanwhile."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(result))
    beside.replace(path)


def _problem(device: str, tiny: bool) -> str | None:
    """Why nothing can be measured on `device`, in a sentence."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        return f"no CUDA device here, and {device} was asked for; --tiny runs the same code on the CPU"
    if device == "cpu" and not tiny:
        return "the published shape is measured on a CUDA device; --tiny runs the same code on the CPU"
    return None


def _earlier(path: Path | None, tiny: bool) -> list[Row]:
    """What the file holds of earlier parts. Raises ValueError where it is of the other scale."""
    if path is None or not path.is_file():
        return []
    found: list[Row] = json.loads(path.read_text())["results"]
    if any(result["tiny"] != tiny for result in found):
        raise ValueError(f"{path} holds results {'without' if tiny else 'with'} --tiny; name another file")
    return found


def write_reports(
    results: Sequence[Mapping[str, Any]], to_json: Path | None, to_markdown: Path | None
) -> None:
    """Both reports as they stand, after each job: what follows may fail."""
    from tests.gpu.report import markdown, plot, targets

    for path in (to_json, to_markdown):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if to_json is not None:
        lines = [asdict(target) for target in targets(results)]
        to_json.write_text(json.dumps({"targets": lines, "results": results}, indent=1) + "\n")
    if to_markdown is not None:
        picture = plot(results, to_markdown.with_suffix(".png"))
        to_markdown.write_text(markdown(results, picture))


if __name__ == "__main__":
    sys.exit(main())
