"""Writes what is derived: Grafana's dashboards from panels.py, and the PrometheusRule from the rule files.

    python -m monitoring.generate

What it writes is committed, so nobody needs this to use it. Needs the extra `test`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

from monitoring.panels import DASHBOARDS, Dashboard, Level, Panel

HERE = Path(__file__).parent
RULES = HERE / "prometheus" / "rules"

#: Grafana's grid is 24 wide.
FIGURES_IN_A_ROW, FIGURE_HEIGHT = 6, 4
LINES_IN_A_ROW, LINE_HEIGHT = 3, 8
DATA_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
#: The variables at the top of each dashboard, and where their values come from.
VARIABLES = {
    "namespace": "label_values(zimage_build_info, namespace)",
    "application": 'label_values(zimage_build_info{namespace=~"$namespace"}, application)',
}


def grafana_json(dashboard: Dashboard) -> str:
    """One dashboard as the file that Grafana's provisioning reads."""
    built = (
        dashboards.Dashboard(dashboard.title)
        .uid(dashboard.uid)
        .description(dashboard.description)
        .tags(["zimage-turbo"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboards.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .link(
            dashboards.DashboardLink("zimage-turbo")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["zimage-turbo"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
    )
    for name, values in VARIABLES.items():
        built.with_variable(
            dashboards.QueryVariable(name)
            .label(name.capitalize())
            .datasource(DATA_SOURCE)
            .query(values)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    for number, (panel, place) in enumerate(_placed(dashboard.panels), start=1):
        built.with_panel(_panel(panel).id(number).grid_pos(place))
    return json.dumps(built.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _placed(panels: tuple[Panel, ...]) -> Iterator[tuple[Panel, models.GridPos]]:
    """Figures in a row on top, each row filled; below them the lines."""
    figures = [panel for panel in panels if panel.is_figure]
    lines = [panel for panel in panels if not panel.is_figure]
    top = 0
    for group, most, height in (
        (figures, FIGURES_IN_A_ROW, FIGURE_HEIGHT),
        (lines, LINES_IN_A_ROW, LINE_HEIGHT),
    ):
        for start in range(0, len(group), most):
            row = group[start : start + most]
            width = 24 // len(row)
            for index, panel in enumerate(row):
                yield panel, models.GridPos(h=height, w=width, x=index * width, y=top)
            top += height


def _panel(panel: Panel) -> Any:
    built = _figure(panel) if panel.is_figure else _lines(panel)
    built.title(panel.title).description(panel.description).unit(panel.unit).datasource(DATA_SOURCE)
    if panel.highest is not None:
        built.max(panel.highest)
    for letter, query in zip("ABCDEF", panel.queries, strict=False):
        target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(letter)
        # A figure is what is true now: over time, the last one would still stand there when nothing answers.
        target = target.instant() if panel.is_figure else target.range()
        if panel.has_exemplars:
            target.exemplar(True)
        built.with_target(target.datasource(DATA_SOURCE))
    return built


def _figure(panel: Panel) -> Any:
    levels = panel.levels or (Level(0, "text"),)
    return (
        stat.Panel()
        .graph_mode(common.BigValueGraphMode.NONE)
        .color_mode(common.BigValueColorMode.VALUE)
        .text_mode(
            common.BigValueTextMode.VALUE_AND_NAME
            if len(panel.queries) > 1 or "{{" in panel.queries[0].legend
            else common.BigValueTextMode.VALUE
        )
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value("none")
        .thresholds(
            dashboards.ThresholdsConfig()
            .mode(models.ThresholdsMode.ABSOLUTE)
            .steps(
                [
                    models.Threshold(value=level.above if index else None, color=level.colour)
                    for index, level in enumerate(levels)
                ]
            )
        )
    )


def _lines(panel: Panel) -> Any:
    built = (
        timeseries.Panel()
        .min(0)
        .line_width(1)
        .fill_opacity(30 if panel.is_stacked else 8)
        .show_points(common.VisibilityMode.NEVER)
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .no_value("none")
    )
    if panel.is_stacked:
        built.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    return built


def prometheus_rule() -> str:
    """Every group of the rule files as an object of the Prometheus operator."""
    groups = [
        group
        for file in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
    ]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "zimage-turbo", "labels": {"app.kubernetes.io/part-of": "zimage-turbo"}},
        "spec": {"groups": groups},
    }
    note = "# Written by `python -m monitoring.generate` from ../prometheus/rules; change it there.\n"
    return note + yaml.safe_dump(rule, sort_keys=False, width=110, allow_unicode=True)


def derived_files() -> dict[Path, str]:
    """Every derived file and what belongs into it."""
    folder = HERE / "grafana" / "dashboards"
    return {folder / f"{dashboard.uid}.json": grafana_json(dashboard) for dashboard in DASHBOARDS} | {
        HERE / "kubernetes" / "prometheusrule.yaml": prometheus_rule()
    }


def main() -> None:
    for file, text in derived_files().items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
