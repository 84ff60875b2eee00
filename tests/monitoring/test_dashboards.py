"""The committed dashboards are what the tables give, load in Grafana's own types, and show every metric."""

from __future__ import annotations

import json
import re
from pathlib import Path

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.generate import HERE, RULES, derived_files
from monitoring.panels import DASHBOARDS
from serve_app.error_mapping import ROWS as ANSWERS
from serve_app.metrics import REPLICA, ROWS, SECONDS_BUCKETS
from tests.monitoring.queries import filled_in, matchers_in, names_in, row_of

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


def read_expressions() -> list[str]:
    queries = [filled_in(query.expression) for _, panel in PANELS for query in panel.queries]
    return queries + [rule["expr"] for group in RULE_GROUPS for rule in group["rules"]]


def read_names() -> set[str]:
    return {name for expression in read_expressions() for name in names_in(expression)}


def test_every_name_in_a_query_is_declared() -> None:
    unknown = {name for name in read_names() if row_of(name) is None} - RECORDED - {"up"}
    assert unknown == set()


def test_every_name_in_any_text_is_declared() -> None:
    """Runbooks, comments, variables and the page too; recorded series are written `level:name:operation`."""
    texts = [file for kind in ("*.md", "*.py", "*.yml", "*.yaml", "*.json") for file in HERE.rglob(kind)]
    named = {
        name
        for file in texts
        for name in re.findall(r"(?<![\w:])zimage_\w+(?!\w|:)", file.read_text(encoding="utf-8"))
    }
    rows = {row.name for row in ROWS}
    unknown = {name for name in named if row_of(name) is None and name not in rows}
    assert unknown - {"zimage_api_key"} == set() and len(named) > len(ROWS)


#: Labels that a scrape and the client library add.
ADDED = {REPLICA, "namespace", "application", "job", "le"}


def test_what_queries_narrow_by_is_in_the_closed_sets() -> None:
    """A label or a value that no series has would leave a panel empty and an alert silent for good."""
    wrong = []
    for name, label, values in (each for text in read_expressions() for each in matchers_in(text)):
        row = row_of(name)
        if row is None or label in ADDED:
            continue
        if not set(values) <= set(row.labels.get(label, ())):
            wrong.append((name, label, values))
    assert wrong == []


def test_the_share_that_fails_is_of_every_error_that_is_the_servers() -> None:
    (rule,) = [
        rule
        for group in RULE_GROUPS
        for rule in group["rules"]
        if rule.get("record") == "application:zimage_requests_failed:ratio_rate5m"
    ]
    failed, served = (values for _, label, values in matchers_in(rule["expr"]) if label == "outcome")
    # Whatever stopped the drawing, nobody waited for it any more.
    ours = {row.code for row in ANSWERS.values() if row.status >= 500} - {"cancelled"}
    assert set(failed) == ours and set(served) == ours | {"ok"}


def test_a_figure_is_what_is_true_now() -> None:
    for file in JSON_FILES:
        for panel in json.loads(file.read_text(encoding="utf-8"))["panels"]:
            asked = {(target.get("instant"), target.get("range")) for target in panel["targets"]}
            assert asked == {(True, False) if panel["type"] == "stat" else (False, True)}, panel["title"]


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
