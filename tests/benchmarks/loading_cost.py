"""What repairing a single file costs: peak memory beyond what the process had before, seconds, MB/s.

    python -m tests.benchmarks.loading_cost [--gigabytes 4] [--stored float32] [--folder /tmp]

Writes a file of that size with Z-Image's fused names and noise in it, and has a process of its own make a
view of it: split the fused tensors and write bfloat16. `rss` counts pages of the mapped source too, which the
kernel takes back when it needs them; `pss` shares those out among the processes that map them; `anonymous` is
memory that nothing else can have.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from zimage_engine.checkpoint.parts import Recipe
from zimage_engine.checkpoint.weight_files import read_weight_file
from zimage_engine.loading.tensor_writer import write_safetensors
from zimage_engine.loading.view import ensure_view
from zimage_engine.loading.view_key import key_of
from zimage_engine.loading.view_plan import ViewPlan, WrittenWeights

DIM = 3840
FEED_FORWARD = 10240
STORED_BYTES = {"float32": 4, "bfloat16": 2}
SECONDS_BETWEEN_LOOKS = 0.02
#: What a repair of N bytes may take: this part of N and this much more.
TARGET_PART, TARGET_BYTES = 0.35, 1_000_000_000


def main() -> None:
    """Write the file, repair it in a fresh process, print the figures."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--gigabytes", type=float, default=4.0)
    asked.add_argument("--stored", choices=STORED_BYTES, default="float32")
    asked.add_argument("--folder", type=Path, default=None)
    asked.add_argument("--repair", type=Path, default=None, help=argparse.SUPPRESS)
    chosen = asked.parse_args()
    if chosen.repair is not None:
        _print(json.dumps(_repair(chosen.repair)))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        file = Path(folder) / "model.safetensors"
        _write_fused(file, int(chosen.gigabytes * 1e9), chosen.stored)
        size_bytes = file.stat().st_size
        command = [sys.executable, "-m", "tests.benchmarks.loading_cost", "--repair", str(file)]
        figures = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    allowed = TARGET_PART * size_bytes + TARGET_BYTES
    _print(f"source {size_bytes / 1e9:.2f} GB of {chosen.stored}, load {os.getloadavg()[0]:.1f}")
    for name in ("rss", "pss", "anonymous"):
        peak = figures[name]
        _print(f"peak {name:<10}{peak / 1e9:6.2f} GB beyond the baseline ({allowed / 1e9:.2f} GB allowed)")
    _print(f"key        {figures['key_seconds']:6.2f} s")
    _print(f"made in    {figures['seconds']:6.1f} s  {size_bytes / figures['seconds'] / 1e6:.0f} MB/s read")
    _print(f"found in   {figures['again_seconds']:6.3f} s the second time")


def _layer(number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    name = f"model.diffusion_model.layers.{number}"
    yield f"{name}.attention.qkv.weight", (3 * DIM, DIM)
    yield f"{name}.attention.out.weight", (DIM, DIM)
    yield f"{name}.feed_forward.w1.weight", (FEED_FORWARD, DIM)
    yield f"{name}.feed_forward.w2.weight", (DIM, FEED_FORWARD)
    yield f"{name}.feed_forward.w3.weight", (FEED_FORWARD, DIM)


def _write_fused(file: Path, about_bytes: int, stored: str) -> None:
    """Layers until the file has about that size, written one tensor at a time, so that any size fits."""
    layer_bytes = sum(rows * columns for _, (rows, columns) in _layer(0)) * STORED_BYTES[stored]
    shapes = dict(row for number in range(max(1, round(about_bytes / layer_bytes))) for row in _layer(number))
    noise = torch.randn(3 * DIM * DIM, dtype=torch.float32)
    sample = file.with_name("one.safetensors")
    save_file({"noise": noise[:1]}, sample)
    (facts,) = read_weight_file(sample).tensors
    sample.unlink()
    write_safetensors(
        file,
        [Recipe(name, shape, name) for name, shape in shapes.items()],
        lambda name: noise[: shapes[name][0] * shapes[name][1]].view(shapes[name]),
        [type(facts)(name, facts.dtype, shape) for name, shape in shapes.items()],
        stored,
    )


def _recipes(names: Iterator[tuple[str, tuple[int, ...]]]) -> Iterator[Recipe]:
    for name, shape in names:
        own = name.removeprefix("model.diffusion_model.")
        if not own.endswith(".qkv.weight"):
            yield Recipe(own, shape, name)
            continue
        for place, part in enumerate("qkv"):
            rows = (place * DIM, (place + 1) * DIM)
            yield Recipe(own.replace(".qkv.", f".to_{part}."), (DIM, DIM), name, rows=rows)


def _repair(file: Path) -> dict[str, float]:
    import zimage_engine.loading.tensor_files  # noqa: F401  its imports belong to the baseline

    source = read_weight_file(file)
    stored = iter((tensor.name, tensor.shape) for tensor in source.tensors)
    weights = WrittenWeights("transformer/model.safetensors", tuple(_recipes(stored)), (source,), "bfloat16")
    plan = ViewPlan("benchmark", file.parent, (), (), (weights,))
    began = time.perf_counter()
    key_of(plan)
    key_seconds = time.perf_counter() - began
    with _Peaks() as peaks:
        began = time.perf_counter()
        ensure_view(plan, file.parent / "cache")
        seconds = time.perf_counter() - began
    began = time.perf_counter()
    ensure_view(plan, file.parent / "cache")
    again_seconds = time.perf_counter() - began
    return {**peaks.beyond, "key_seconds": key_seconds, "seconds": seconds, "again_seconds": again_seconds}


class _Peaks:
    """Watches this process from a thread; `beyond` has the peaks less what there was at the start."""

    def __enter__(self) -> _Peaks:
        self._before = self._peak = _memory()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        # The kernel's own peak misses nothing between two looks.
        self._peak["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.beyond = {name: float(self._peak[name] - self._before[name]) for name in self._before}

    def _watch(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
            now = _memory()
            self._peak = {name: max(now[name], self._peak[name]) for name in now}


def _memory() -> dict[str, int]:
    """Bytes that this process has, from Linux's smaps_rollup."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {
        name: kilobytes[key] * 1024
        for name, key in (("rss", "Rss"), ("pss", "Pss"), ("anonymous", "Anonymous"))
    }


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
