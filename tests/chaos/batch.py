"""`zimage-turbo batch` killed with -9 at random moments while it draws, and run again until it is done.

    python -m tests.chaos.batch [--pictures 200] [--kills 5] [--seed 0]

Afterwards every picture must be there, noted as drawn once, and byte for byte that of a run that nobody
disturbed. Half of the lines leave their seed to the program: the undisturbed run is told those that the
killed one had noted.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.batch import MANIFEST

#: For one start with its imports, on a machine that has other things to do.
START_SECONDS = 180.0


@dataclass(frozen=True)
class CameOfIt:
    """Pictures at the end, kills that met a run at work, and what was wrong in sentences."""

    pictures: int
    kills: int
    wrong: tuple[str, ...]


def batch_killed(model: Path, folder: Path, pictures: int, kills: int, seed: int) -> CameOfIt:
    """Kill it `kills` times, each while it draws, and let it end; all files are below `folder`."""
    chance = random.Random(seed)
    lines: list[dict[str, Any]] = [
        {"prompt": f"picture {number}", "size": "64x64", "num_inference_steps": 2, "guidance_scale": 1}
        | ({"seed": number} if number % 2 else {})
        for number in range(pictures)
    ]
    killed, undisturbed = folder / "killed", folder / "undisturbed"
    prompts = _written(folder / "prompts.jsonl", lines)
    done_kills = 0
    for kill in range(kills):
        process = _started(prompts, killed, model)
        # Evenly over the pictures, and at any moment of one.
        _wait_for(killed, (kill + chance.random()) / (kills + 1) * pictures, process)
        time.sleep(chance.random() * 0.05)
        done_kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = _started(prompts, killed, model)
    wrong = [] if last.wait(START_SECONDS + pictures) == 0 else ["the last run failed"]
    records = [json.loads(line) for line in (killed / MANIFEST).read_text().splitlines()]
    seeds = {record["line"]: record["seed"] for record in records if "seed" in record}
    told = [{**line, "seed": seeds[number]} for number, line in enumerate(lines, 1)]
    if _started(_written(folder / "told.jsonl", told), undisturbed, model).wait(START_SECONDS + pictures):
        wrong.append("the undisturbed run failed")
    wrong += _wrong_of(killed, undisturbed, records, pictures)
    return CameOfIt(len(list(killed.glob("*.png"))), done_kills, tuple(wrong))


def _wrong_of(killed: Path, undisturbed: Path, records: list[dict[str, Any]], pictures: int) -> Iterator[str]:
    # The hash in a name is of its line, in which the undisturbed run's have a seed more.
    files, others = (
        {file.name.partition("-")[0]: file.read_bytes() for file in place.glob("*.png")}
        for place in (killed, undisturbed)
    )
    if len(list(killed.glob("*.png"))) != pictures or len(files) != pictures:
        yield f"{len(files)} of {pictures} lines have pictures"
    yield from (f"picture {name} is another one" for name in files if files[name] != others.get(name))
    for state in ("planned", "drawn"):
        noted = Counter(record["file"] for record in records if record["state"] == state)
        yield from (
            f"{file} was noted as {state} {times} times" for file, times in noted.items() if times > 1
        )
        if len(noted) != pictures:
            yield f"{len(noted)} pictures were noted as {state}"
    yield from (f"{file.name} was left behind" for file in killed.glob(".*.part"))


def _written(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _started(prompts: Path, folder: Path, model: Path) -> subprocess.Popen[bytes]:
    command = [
        "batch",
        str(prompts),
        "-o",
        str(folder),
        "--model",
        str(model),
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    return subprocess.Popen([sys.executable, "-m", "serve_app.cli", *command], stdout=subprocess.DEVNULL)


def _wait_for(folder: Path, pictures: float, process: subprocess.Popen[bytes]) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while len(list(folder.glob("*.png"))) < pictures and process.poll() is None:
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"{folder} did not get {pictures:.0f} pictures")
        time.sleep(0.005)


def main() -> int:
    """The long form; 1 where anything was wrong."""
    from tests.zimage_engine.tiny_models import write_tiny_z_image

    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--pictures", type=int, default=200)
    options.add_argument("--kills", type=int, default=5)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_z_image(Path(folder) / "tiny-z-image")
        came_of_it = batch_killed(model, Path(folder), chosen.pictures, chosen.kills, chosen.seed)
    sys.stdout.write(f"{came_of_it.pictures} pictures, killed {came_of_it.kills} times\n")
    sys.stdout.write("".join(f"wrong: {sentence}\n" for sentence in came_of_it.wrong))
    return 1 if came_of_it.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
