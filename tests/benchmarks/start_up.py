"""How long from the start of a process to a model that is ready, beside what the disk alone would take.

    python -m tests.benchmarks.start_up [--gigabytes 20] [--model FOLDER] [--runs 3] [--launch] [--device cpu]

A model folder of that size is written, or one is taken; its files are put out of the page cache before each
run. `disk` reads them one after another in pieces of 16 MB and does nothing else. Each other row is a process
of its own, timed from its start until every weight is in memory, on the device where it has one: `read ahead`
as the program does it, `mapped` by `Engine.load` alone, `cached` with the files in the page cache, which is
what everything but the disk takes. `launch` is `zimage-turbo launch` until `/readyz` says so; in it `page` is
when its page answers. Rows take turns; medians and spread.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.benchmarks.loading_cost import _print
from tests.page_cache import part_in_memory, put_out
from tests.ports import free_ports

MODULE = "tests.benchmarks.start_up"
PIECE_BYTES = 16 * 2**20
#: Beyond this the files stayed in the cache, as on a file system in memory, and the figures are none.
MOST_LEFT = 0.05
LAUNCH_SECONDS = 900.0
END_SECONDS = 60.0


def main() -> None:
    """Write the folder or take one, run each row by turns, print the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--gigabytes", type=float, default=20.0, help="of weights, in bfloat16")
    asked.add_argument("--model", type=Path, default=None, help="a folder that is there already")
    asked.add_argument("--folder", type=Path, default=None, help="on the disk that is to be measured")
    asked.add_argument("--runs", type=int, default=3)
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--launch", action="store_true", help="the whole server too")
    asked.add_argument("--json", type=Path, default=None, help="the figures of every run, for programs")
    asked.add_argument("--load", nargs=3, default=None, help=argparse.SUPPRESS)
    chosen = asked.parse_args()
    if chosen.load is not None:
        _print(json.dumps(_load(*chosen.load)))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as base:
        model = chosen.model
        if model is None:
            from tests.benchmarks.big_checkpoints import write_z_image_folder

            model = write_z_image_folder(Path(base) / "model", int(chosen.gigabytes * 1e9), "bfloat16")
        figures = _measured(model.resolve(), Path(base) / "cache", chosen.device, chosen.runs, chosen.launch)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")
    _print(_table(figures))


def _measured(model: Path, cache: Path, device: str, runs: int, with_launch: bool) -> dict[str, object]:
    """The seconds of every run by row, and what they are of."""
    files = [path for path in sorted(model.rglob("*")) if path.is_file()]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    # A load that is not the first, as of a server that is started again: what it found is remembered.
    _run("mapped", model, device, environment)
    rows: dict[str, Callable[[], dict[str, float]]] = {
        "disk": lambda: _read_plainly(files),
        "read ahead": lambda: _run("ahead", model, device, environment),
        "mapped": lambda: _run("mapped", model, device, environment),
    }
    if with_launch:
        rows["launch"] = lambda: _launched(model, device, environment)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in (*rows, "cached")}
    left = 0.0
    for number in range(runs):
        for name in rows if number % 2 else reversed(rows):
            put_out(files)
            left = max(left, part_in_memory(files))
            taken[name].append(rows[name]())
        _read_plainly(files)
        taken["cached"].append(_run("ahead", model, device, environment))
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "device": device,
        "left_in_cache": left,
        "runs": taken,
        "load_average": os.getloadavg()[0],
    }


def _table(figures: dict[str, object]) -> str:
    """The rows beside the disk alone: how many times as long, and at which rate."""
    bytes_read, runs, left = figures["bytes"], figures["runs"], figures["left_in_cache"]
    assert isinstance(bytes_read, int) and isinstance(runs, dict) and isinstance(left, float)
    disk_seconds = statistics.median(run["seconds"] for run in runs["disk"])
    lines = [f"{'':<12}{'seconds':>9}{'spread':>16}{'GB/s':>7}{'x disk':>8}  of which"]
    for name, taken in runs.items():
        seconds = [run["seconds"] for run in taken]
        median = statistics.median(seconds)
        parts = {
            part: statistics.median(run[part] for run in taken) for part in taken[0] if part != "seconds"
        }
        told = ", ".join(f"{part} {value:.2f}" for part, value in parts.items())
        lines.append(
            f"{name:<12}{median:9.2f}{f'{min(seconds):.2f}-{max(seconds):.2f}':>16}"
            f"{bytes_read / median / 1e9:7.2f}{median / disk_seconds:8.2f}  {told}".rstrip()
        )
    lines.append(f"{bytes_read / 1e9:.2f} GB on {figures['device']}, load {figures['load_average']:.1f}")
    if left > MOST_LEFT:
        lines.append(f"the system kept {left:.0%} of the files in memory: the rows but `cached` say nothing")
    return "\n".join(lines)


def _read_plainly(files: list[Path]) -> dict[str, float]:
    began = time.perf_counter()
    piece = bytearray(PIECE_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(piece):
                pass
    return {"seconds": time.perf_counter() - began}


def _run(how: str, model: Path, device: str, environment: dict[str, str]) -> dict[str, float]:
    """A process of its own that loads the model; its parts are those that it tells."""
    began = time.time()
    command = [sys.executable, "-m", MODULE, "--load", how, str(model), device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    told = dict(json.loads(done.stdout.splitlines()[-1]))
    ready_at = told.pop("ready_at")
    return {"seconds": ready_at - began, **told}


def _load(how: str, model: str, device: str) -> dict[str, float]:
    """The model loaded, and every weight of it in memory."""
    began = time.perf_counter()
    if how == "ahead":
        from serve_app.local_engine import load_engine
        from serve_app.settings import load_settings

        engine = load_engine(load_settings(model=model, device=device))
    else:
        from zimage_engine import Engine

        engine = Engine.load(model, device, exact=True)
    loaded = time.perf_counter()

    import torch

    # One byte of each page of what is mapped.
    for part in engine.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for tensor in (*part.parameters(), *part.buffers()):
                if tensor.device.type == "cpu" and tensor.numel():
                    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
                    flat[:: mmap.PAGESIZE].sum()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return {
        "ready_at": time.time(),
        "imported and loaded": loaded - began,
        "the rest of the pages": time.perf_counter() - loaded,
    }


def _launched(model: Path, device: str, environment: dict[str, str]) -> dict[str, float]:
    """The server of its own, until it is ready; ended afterwards."""
    port = free_ports(1)[0]
    began = time.perf_counter()
    command = [sys.executable, "-m", "serve_app.cli", "launch", "--model", str(model), "--device", device]
    server = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    page_seconds = None
    try:
        while time.perf_counter() - began < LAUNCH_SECONDS and server.poll() is None:
            if page_seconds is None and _answers(f"http://127.0.0.1:{port}/"):
                page_seconds = time.perf_counter() - began
            if _answers(f"http://127.0.0.1:{port}/readyz"):
                seconds = time.perf_counter() - began
                return {"seconds": seconds, "page": seconds if page_seconds is None else page_seconds}
            time.sleep(0.05)
        raise SystemExit(f"zimage-turbo launch was not ready within {LAUNCH_SECONDS:.0f} s")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(END_SECONDS)


def _answers(address: str) -> bool:
    with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(address, timeout=2):
        return True
    return False


if __name__ == "__main__":
    main()
