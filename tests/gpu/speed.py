"""Holds the published shape's speed on a GPU against its targets; `make bench-gpu` runs it last.

    python -m tests.gpu.speed [--device cuda:0] [--json OUT] [--tiny]

Nothing is downloaded: the model has random weights, so its pictures are noise, and their distances say how
far a lever moves noise. First all by the plain path beside stock diffusers, then what tuning chooses. What is
chosen is remembered for random weights alone. It takes about 21 GB of the host's memory, 25 GB of the card's
and, on a card of the newest kind, under ten minutes, most of them for compiling. `--tiny` runs the same code
with the narrow model, on the CPU too: its times mean nothing.

Exit status 1: a target was missed. Targets that need a card are not judged without one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure of a report and its bound; `at_most` False: it must not be lower."""

    name: str
    part: str
    bound: float
    at_most: bool
    read: Callable[[Row], float]

    def judged(self, reports: Row) -> Row:
        """The figure beside its bound."""
        figure = self.read(reports[self.part])
        met = figure <= self.bound if self.at_most else figure >= self.bound
        return {"target": self.name, "figure": figure, "bound": self.bound, "met": met}


def _ratio(name: str) -> Callable[[Row], float]:
    return lambda report: float(report["cases"][0]["ratios"][name]["median"])


def _gain_of_most(report: Row) -> float:
    return float(report["cases"][0]["at_once"][-1]["gain"])


TARGETS = (
    Target("denoising over its arithmetic's limit", "tuned", 1.35, True, _ratio("denoise_over_limit")),
    Target("speed-up over stock diffusers", "tuned", 1.15, False, _ratio("picture_speedup")),
    Target(
        "first picture over a later one",
        "plain",
        1.5,
        True,
        lambda report: float(report["start"]["first_over_steady"]),
    ),
    Target("pictures a second, 8 at once over one", "many", 1.5, False, _gain_of_most),
    Target("denoising with guidance over without", "guided", 1.9, True, _ratio("guidance_cost")),
)


def measured(device: str | None, tiny: bool, say: Callable[[str], None]) -> Iterator[tuple[str, Row]]:
    """Each part's name and figures, as they come."""
    from serve_app.cli_bench import SHARING_A_PASS, _packed
    from serve_app.settings import Settings
    from serve_app.worker_load import LoadedWorker
    from zimage_engine.bench.measuring import BenchWishes, measure
    from zimage_engine.bench.synthetic import NAMES, load_synthetic
    from zimage_engine.tuning import TuneWishes, tune

    large, small, steps = ((64, 64), (96, 64), 2) if tiny else ((1024, 1024), (512, 512), 8)
    repeat = 2 if tiny else 7
    loaded = load_synthetic(NAMES[0], device, tiny=tiny)

    def bench(size: tuple[int, int], guidance_scale: float, stock: bool, at_once: tuple[int, ...]) -> Row:
        wishes = BenchWishes((size,), steps, guidance_scale, repeat, stock, at_once, tiny)
        settings = Settings.model_construct(max_batch_size=SHARING_A_PASS)
        with LoadedWorker(lambda: loaded.engine, settings) as worker:
            crowd = worker.draw_at_once if at_once else None
            return measure(loaded, wishes, _packed, crowd, say, worker.in_thread)

    yield "plain", bench(large, 1.0, True, ())
    # Noise moves further than pictures do: what is wanted here is how quick each lever is.
    wishes = TuneWishes(repeat, tolerance=255.0, steps=steps, guidance_scale=1.0)
    yield "tuning", tune(loaded.engine, [large, small], wishes, say).to_dict()
    yield "tuned", bench(large, 1.0, True, ())
    yield "guided", bench(large, 1.8, False, ())
    yield "many", bench(small, 1.0, False, (1, 2) if tiny else (1, 2, 4, 8))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.speed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    reports: Row = {}
    for part, report in measured(asked.device, asked.tiny, lambda line: _tell(f"{line} ...")):
        reports[part] = report
        if asked.json is not None:  # as far as it has come: a later part may end the process
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            asked.json.write_text(json.dumps({"parts": reports}, indent=1), encoding="utf-8")
    _tell_levers(reports["tuning"])
    verdicts = [target.judged(reports) for target in TARGETS]
    if asked.json is not None:
        told = {"parts": reports, "targets": [*verdicts], "bounds": [_plain(target) for target in TARGETS]}
        asked.json.write_text(json.dumps(told, indent=1), encoding="utf-8")
    for verdict in verdicts:
        word = "met" if verdict["met"] else "missed"
        _tell(f"{verdict['target']}: {verdict['figure']:.2f}, bound {verdict['bound']:g}: {word}")
    on_card = str(reports["plain"]["machine"]["device"]).startswith("cuda")
    return int(on_card and not asked.tiny and not all(verdict["met"] for verdict in verdicts))


def _tell_levers(tuning: Row) -> None:
    for size in tuning["sizes"]:
        _tell(f"{size['width']}x{size['height']}: {', '.join(size['levers']) or 'nothing is quicker'}")
        for trial in size["trials"]:
            speedup = "" if trial["speedup"] is None else f" {trial['speedup']['median']:.2f} x"
            _tell(f"  {trial['lever']}{speedup}: {trial['because']}")


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _plain(target: Target) -> Row:
    return {name: value for name, value in asdict(target).items() if name != "read"}


if __name__ == "__main__":
    sys.exit(main())
