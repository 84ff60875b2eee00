"""Draws each panel with what a real run gives its queries, for the documentation; Grafana is not needed.

    python -m tests.monitoring.render monitoring/pictures

starts the application and Prometheus as the tests do, which takes some two minutes.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from monitoring.panels import DASHBOARDS, Dashboard, Panel
from tests.monitoring.live import Observed, application_of, observed_application
from tests.monitoring.queries import filled_in

#: Panels side by side, and how large each is, in inches.
FIGURES, LINES = 6, 3
WIDTH, FIGURE_HEIGHT, LINE_HEIGHT = 16.0, 1.6, 2.7
COLOURS = {"green": "#37872d", "orange": "#d9730d", "red": "#c4162a", "text": "#333333"}

#: The text of a PNG that tells the panels on it.
PANELS = "panels"

Series = list[tuple[str, list[float], list[float]]]


def shown(value: float, unit: str) -> str:
    """A value as Grafana writes it in this unit, nearly."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "bool_yes_no":
        return "Yes" if value else "No"
    if unit == "bytes":
        return f"{value / 2**30:.3g} GiB"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 or not value else f"{1000 * value:.3g} ms"
    if unit == "short" and value >= 1000:
        return f"{value / 1000:.3g} K"
    return f"{value:.3g}" + (" req/s" if unit == "reqps" else "")


def series_of(observed: Observed, panel: Panel) -> Series:
    """Each series' name, moments since the run began, and values; of a figure the one value of now."""
    found: Series = []
    for query in panel.queries:
        expression = filled_in(query.expression, application_of(panel))
        asked = observed.query(expression) if panel.is_figure else observed.over_time(expression)
        for each in asked:
            timed = [each["value"]] if panel.is_figure else each["values"]
            points = [(float(at) - observed.began, float(value)) for at, value in timed]
            points = [(at, value) for at, value in points if math.isfinite(value)]
            if points:
                found.append((_legend(query.legend, each["metric"]), *map(list, zip(*points, strict=True))))  # type: ignore[arg-type]
    return found


def _legend(words: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), words).strip()


def draw_dashboard(observed: Observed, dashboard: Dashboard, file: Path) -> None:
    """The dashboard's panels, nearly as Grafana lays them out, in one PNG."""
    figures = [panel for panel in dashboard.panels if panel.is_figure]
    lines = [panel for panel in dashboard.panels if not panel.is_figure]
    rows = -(-len(lines) // LINES)
    height = FIGURE_HEIGHT + rows * LINE_HEIGHT + 0.6
    sheet = pyplot.figure(figsize=(WIDTH, height), dpi=75, layout="constrained")
    top, below = sheet.subfigures(2, 1, height_ratios=[FIGURE_HEIGHT, rows * LINE_HEIGHT])
    sheet.suptitle(f"{dashboard.title}. {dashboard.description}", fontsize=12, fontweight="bold")
    for axes, panel in zip(top.subplots(1, len(figures), squeeze=False)[0], figures, strict=True):
        _draw_figure(axes, panel, series_of(observed, panel))
    cells = below.subplots(rows, LINES, squeeze=False).ravel()
    for axes, panel in zip(cells, lines, strict=False):
        _draw_lines(axes, panel, series_of(observed, panel))
        if panel.has_exemplars:
            _draw_dots(axes, observed, panel)
    for axes in cells[len(lines) :]:
        axes.axis("off")
    drawn = io.BytesIO()
    sheet.savefig(drawn)
    pyplot.close(sheet)
    told = PngInfo()
    told.add_text(PANELS, panels_of(dashboard))
    few_colours = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    few_colours.save(file, optimize=True, pnginfo=told)


def panels_of(dashboard: Dashboard) -> str:
    """What a picture of it shows; it stands in the PNG under PANELS, so that an old picture is known."""
    return "\n".join(
        f"{panel.title}: {query.expression}" for panel in dashboard.panels for query in panel.queries
    )


def _draw_figure(axes: Any, panel: Panel, series: Series) -> None:
    axes.axis("off")
    axes.set_title(_title(panel), fontsize=9)
    several = len(series) > 1 or "{{" in panel.queries[0].legend
    for index, (name, _, values) in enumerate(series[:3]):
        levels = [level.colour for level in panel.levels if values[-1] >= level.above]
        text = shown(values[-1], panel.unit)
        axes.text(
            0.5,
            0.85 - (index + 0.5) * 0.85 / min(3, max(1, len(series))),
            "\n".join(textwrap.wrap(f"{name}: {text}", 30)) if several else text,
            fontsize=10 if several else 20,
            ha="center",
            va="center",
            color=COLOURS[levels[-1] if levels else "text"],
        )


def _draw_lines(axes: Any, panel: Panel, series: Series) -> None:
    axes.set_title(_title(panel), fontsize=9)
    if panel.is_stacked and series:
        moments = sorted({at for _, times, _ in series for at in times})
        stacks = [
            [dict(zip(times, values, strict=True)).get(at, 0.0) for at in moments]
            for _, times, values in series
        ]
        axes.stackplot(moments, stacks, labels=[name for name, *_ in series], alpha=0.6)
    else:
        for name, times, values in series:
            axes.plot(times, values, label=name, linewidth=1.2)
    highest = max((value for *_, values in series for value in values), default=0.0)
    if panel.is_stacked:
        highest = axes.get_ylim()[1]
    # Room for the names above the lines, and below them, so that a line at zero is seen.
    top = panel.highest or 1.35 * (highest or 1.0)
    axes.set_ylim(bottom=-0.02 * top, top=1.02 * top if panel.highest else top)
    axes.set_xlabel("seconds", fontsize=7, labelpad=1)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, panel.unit)))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize=6.5, loc="upper left", ncols=2 if len(series) > 4 else 1, framealpha=0.6)


def _draw_dots(axes: Any, observed: Observed, panel: Panel) -> None:
    """Single requests, as Grafana shows exemplars."""
    found = {
        (float(each["timestamp"]) - observed.began, float(each["value"]))
        for query in panel.queries
        for each in observed.exemplars(filled_in(query.expression, application_of(panel)))
    }
    at, seconds = zip(*sorted(found), strict=True) if found else ((), ())
    axes.plot(at, seconds, "D", markersize=3, color="#37872d", alpha=0.7, label="single requests")
    axes.legend(fontsize=6.5, loc="upper left", framealpha=0.6)


def _title(panel: Panel) -> str:
    return panel.title + (" (made-up figures)" if panel.needs_gpu else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw every panel from a real run.")
    parser.add_argument("folder", type=Path, help="where the PNGs go")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with observed_application() as observed:
        for dashboard in DASHBOARDS:
            draw_dashboard(observed, dashboard, folder / f"{dashboard.uid}.png")


if __name__ == "__main__":
    main()
