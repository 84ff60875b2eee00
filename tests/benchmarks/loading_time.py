"""What loading through the adapter costs beyond the stock call: seconds, processor time, peak memory.

    python -m tests.benchmarks.loading_time [--gigabytes 4.2] [--pairs 5] [--folder /tmp]

Each load is a process of its own, timed after its imports; stock and adapter take turns, and the files are in
the page cache. Peak memory is that of one more load of each. `rss` counts mapped pages of the files, which
the kernel takes back when it needs them; `anonymous` is memory that nothing else can have. `first time` is
a load of what was not loaded and verified before; afterwards that is remembered.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.benchmarks.loading_cost import _Peaks, _print

MODULE = "tests.benchmarks.loading_time"
ALLOWED_PERCENT = 5.0
_IMPORTED = ("transformers", "diffusers.pipelines.z_image.pipeline_z_image", "zimage_engine.loading.verify")


def main() -> None:
    """Write the folders one after another, load each by turns, print the figures."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--gigabytes", type=float, default=4.2, help="in memory, in bfloat16")
    asked.add_argument("--pairs", type=int, default=5)
    asked.add_argument("--folder", type=Path, default=None)
    asked.add_argument("--skip-float32", action="store_true", help="it takes twice the disk")
    asked.add_argument(
        "--quick", action="store_true", help="processes that have the imports already, to see that it runs"
    )
    asked.add_argument("--load", nargs=4, default=None, help=argparse.SUPPRESS)
    chosen = asked.parse_args()
    if chosen.load is not None:
        who, path, cache_folder, watched = chosen.load
        _print(json.dumps(_load(who, Path(path), Path(cache_folder), watched == "watched")))
        return
    from tests.benchmarks.big_checkpoints import write_compiled_twin, write_z_image_folder

    about_bytes = int(chosen.gigabytes * 1e9)
    in_a_process = _in_a_ready_process if chosen.quick else _in_a_process
    _print(
        f"{'':<34}{'stock':>8}{'ours':>8}{'spread of ours':>17}  beyond stock  (allowed {ALLOWED_PERCENT} %)"
    )
    with tempfile.TemporaryDirectory(dir=chosen.folder) as base:
        root = Path(base)
        if not chosen.skip_float32:
            wide = write_z_image_folder(root / "wide", 2 * about_bytes, "float32")
            _compare("healthy, float32", wide, wide, root / "cache", chosen.pairs, in_a_process)
            shutil.rmtree(wide)
        healthy = write_z_image_folder(root / "healthy", about_bytes, "bfloat16")
        _compare("healthy, bfloat16", healthy, healthy, root / "cache", chosen.pairs, in_a_process)
        damaged = write_compiled_twin(root / "damaged", healthy, about_bytes, "bfloat16")
        _compare("repaired, found again", healthy, damaged, root / "cache", chosen.pairs, in_a_process)
    _print(f"load {os.getloadavg()[0]:.1f}")


def _compare(
    title: str,
    stock: Path,
    ours: Path,
    cache_folder: Path,
    pairs: int,
    in_a_process: Callable[[str, Path, Path, str], dict[str, float]],
) -> None:
    """One uncounted load of each first: it makes the view and fills the page cache."""
    os.sync()
    paths = {"stock": stock, "ours": ours}
    peaks = {who: in_a_process(who, path, cache_folder, "watched") for who, path in paths.items()}
    firsts = []
    for _ in range(min(pairs, 3)):
        shutil.rmtree(cache_folder.parent / "loads")  # what is remembered of loads before
        firsts.append(in_a_process("ours", ours, cache_folder, "timed"))
    taken: dict[str, list[dict[str, float]]] = {"stock": [], "ours": []}
    for number in range(pairs):
        for who in ("stock", "ours") if number % 2 else ("ours", "stock"):
            taken[who].append(in_a_process(who, paths[who], cache_folder, "timed"))
    for figure in ("wall", "processor"):
        median = {who: statistics.median(one[figure] for one in taken[who]) for who in taken}
        own = [one[figure] for one in taken["ours"]]
        beyond = 100 * (median["ours"] / median["stock"] - 1)
        spread = f"{min(own):.3f}-{max(own):.3f}"
        _print(
            f"{title:<22}  {figure:<10}{median['stock']:8.3f}{median['ours']:8.3f}{spread:>17}"
            f"{beyond:12.1f} %"
        )
    for figure in ("wall", "processor"):
        first = statistics.median(one[figure] for one in firsts)
        stock_median = statistics.median(one[figure] for one in taken["stock"])
        _print(
            f"{title:<22}  {figure:<10}{stock_median:8.3f}{first:8.3f}{'first time':>17}"
            f"{100 * (first / stock_median - 1):12.1f} %"
        )
    for kind in ("rss", "anonymous"):
        _print(
            f"{title:<22}  {kind:<10}" + "".join(f"{peaks[who][kind] / 1e9:8.2f}" for who in paths) + " GB"
        )


def _in_a_process(who: str, path: Path, cache_folder: Path, watched: str) -> dict[str, float]:
    command = [sys.executable, "-m", MODULE, "--load", who, str(path), str(cache_folder), watched]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _in_a_ready_process(who: str, path: Path, cache_folder: Path, watched: str) -> dict[str, float]:
    """The same in a copy of a process that has imported everything."""
    ready = multiprocessing.get_context("forkserver")
    ready.set_forkserver_preload([*_IMPORTED, MODULE])
    # Not a Pool: ending one kills its process, which may wait with a lock for ever.
    with ProcessPoolExecutor(1, mp_context=ready) as executor:
        return executor.submit(_load, who, path, cache_folder, watched == "watched").result()


def _load(who: str, path: Path, cache_folder: Path, is_watched: bool) -> dict[str, float]:
    import torch
    import transformers  # noqa: F401  imports are no part of what is measured
    from diffusers import ZImagePipeline

    import zimage_engine.loading.verify  # noqa: F401
    from zimage_engine import ModelLoaderAdapter

    said = {"torch_dtype": torch.bfloat16, "use_safetensors": True, "variant": None, "local_files_only": True}

    def load() -> object:
        if who == "ours":
            return ModelLoaderAdapter(path, cache_folder=cache_folder).load()
        return ZImagePipeline.from_pretrained(path, **said)

    if is_watched:
        with _Peaks() as peaks:
            load()
        return peaks.beyond
    began, began_processor = time.perf_counter(), time.process_time()
    load()
    return {"wall": time.perf_counter() - began, "processor": time.process_time() - began_processor}


if __name__ == "__main__":
    main()
