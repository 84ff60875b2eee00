"""The committed dashboards are what the tables give, load in Grafana's own types, and show every metric."""

from __future__ import annotations

import json
from pathlib import Path

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.generate import HERE, RULES, derived_files
from monitoring.panels import DASHBOARDS
from serve_app.metrics import ROWS, SECONDS_BUCKETS
from tests.monitoring.queries import filled_in, names_in, row_of

JSON_FILES = sorted((HERE / "grafana" / "dashboards").glob("*.json"))
PANELS = [(dashboard, panel) for dashboard in DASHBOARDS for panel in dashboard.panels]
RULE_GROUPS = [
    group
    for file in sorted(RULES.glob("*.yml"))
    for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
]
RECORDED = {rule["record"] for group in RULE_GROUPS for rule in group["rules"] if "record" in rule}


def test_the_committed_files_are_what_the_generator_writes() -> None:
    for file, text in derived_files().items():
        assert file.read_text(encoding="utf-8") == text, f"run python -m monitoring.generate ({file.name})"
    assert {file for file in derived_files() if file.suffix == ".json"} == set(JSON_FILES)


@pytest.mark.parametrize("file", JSON_FILES, ids=lambda file: file.stem)
def test_grafanas_own_types_read_the_json_and_write_the_same(file: Path) -> None:
    register_default_plugins()
    content = json.loads(file.read_text(encoding="utf-8"))
    read = Dashboard.from_json(content)
    assert json.loads(json.dumps(read, cls=JSONEncoder)) == content
    assert [variable["name"] for variable in content["templating"]["list"]] == [
        "datasource",
        "namespace",
        "application",
    ]


@pytest.mark.parametrize("file", JSON_FILES, ids=lambda file: file.stem)
def test_every_panel_has_a_title_a_unit_and_a_description(file: Path) -> None:
    panels = json.loads(file.read_text(encoding="utf-8"))["panels"]
    assert panels
    for panel in panels:
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"] and panel["targets"], panel[
            "title"
        ]
        assert len(panel["description"]) > 20, panel["title"]
        for target in panel["targets"]:
            assert (
                target["legendFormat"] and "$namespace" in target["expr"] and "$application" in target["expr"]
            )
    assert len({panel["title"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("file", JSON_FILES, ids=lambda file: file.stem)
def test_panels_lie_side_by_side_and_none_on_another(file: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(file.read_text(encoding="utf-8"))["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells


def read_names() -> set[str]:
    queries = [filled_in(query.expression) for _, panel in PANELS for query in panel.queries]
    rules = [rule["expr"] for group in RULE_GROUPS for rule in group["rules"]]
    return {name for expression in (*queries, *rules) for name in names_in(expression)}


def test_every_name_in_a_query_is_declared() -> None:
    unknown = {name for name in read_names() if row_of(name) is None} - RECORDED - {"up"}
    assert unknown == set()


def shown_names() -> set[str]:
    """What panels read, and what the recorded series that they read are made of."""
    made_of = {
        rule["record"]: names_in(rule["expr"])
        for group in RULE_GROUPS
        for rule in group["rules"]
        if "record" in rule
    }
    names = {
        name
        for _, panel in PANELS
        for query in panel.queries
        for name in names_in(filled_in(query.expression))
    }
    while more := {name for recorded in names & set(made_of) for name in made_of[recorded]} - names:
        names |= more
    return names


def test_every_declared_metric_is_shown_on_a_dashboard() -> None:
    shown = {row.name for name in shown_names() if (row := row_of(name)) is not None}
    assert {row.name for row in ROWS} - shown == set()


def test_every_recorded_series_is_read() -> None:
    assert RECORDED - read_names() == set()


def test_rules_parse_and_the_objective_is_a_bound_of_the_histogram() -> None:
    for group in RULE_GROUPS:
        for rule in group["rules"]:
            promql_parser.parse(rule["expr"])
    assert 30 in SECONDS_BUCKETS
