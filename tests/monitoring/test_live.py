"""What Prometheus says of a real run is what the client counted, and no panel is empty."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import yaml

from monitoring.generate import RULES
from monitoring.panels import DASHBOARDS
from tests.monitoring.live import APPLICATION, TRACED, Observed, application_of, observed_application
from tests.monitoring.queries import filled_in, selectors

pytestmark = pytest.mark.server
OURS = f'application="{APPLICATION}"'


@pytest.fixture(scope="module")
def observed(prometheus: None) -> Iterator[Observed]:
    with observed_application() as observed:
        yield observed


def test_counters_agree_with_what_the_client_counted(observed: Observed) -> None:
    counted = observed.counted
    outcomes = observed.by("outcome", f"sum by (outcome) (zimage_requests_total{{{OURS}}})")
    assert {name: value for name, value in outcomes.items() if value} == counted.outcomes
    assert observed.by("", f"sum(zimage_pictures_total{{{OURS}}})")[""] == counted.pictures
    assert observed.by("", f"sum(zimage_pixels_total{{{OURS}}})")[""] == counted.pixels
    assert observed.by("", f"sum(zimage_request_seconds_count{{{OURS}}})")[""] == counted.outcomes["ok"]
    trips = observed.by("stage", f"sum by (stage) (zimage_guard_trips_total{{{OURS}}}) > 0")
    assert trips == {"denoise": counted.trips} and counted.trips > 0
    recovered = f'sum(zimage_guard_retries_total{{{OURS}, outcome="recovered"}})'
    assert observed.by("", recovered)[""] == counted.trips
    warnings = observed.by("code", f"sum by (code) (zimage_warnings_total{{{OURS}}})")
    assert warnings["guard_recovered"] == counted.warnings["guard_recovered"]
    assert observed.by("", f"sum(zimage_worker_retries_total{{{OURS}}})")[""] == 1


def test_both_ingresses_were_at_work_and_count_once_each(observed: Observed) -> None:
    by_ingress = observed.by("replica", f'sum by (replica) (zimage_requests_total{{{OURS}, outcome="ok"}})')
    assert len(by_ingress) == 2 and all(by_ingress.values()), by_ingress


def test_nothing_is_left_under_way(observed: Observed) -> None:
    assert observed.by("", f"sum(zimage_requests_in_flight{{{OURS}}})")[""] == 0
    assert observed.by("", f"sum(zimage_worker_busy{{{OURS}}})")[""] == 0
    assert observed.by("", f"application:zimage_queue_depth:sum{{{OURS}}}")[""] == 0


def test_the_killed_workers_series_end_and_the_new_one_has_its_own(observed: Observed) -> None:
    now = observed.by("replica", f"zimage_worker_up{{{OURS}}}")
    ever = observed.by("replica", f"max_over_time(zimage_worker_up{{{OURS}}}[10m])")
    assert len(now) == 2 and observed.killed not in now
    assert len(ever) == 3 and observed.killed in ever


def test_a_requests_id_stands_in_the_lines_of_the_ingress_and_of_the_worker(observed: Observed) -> None:
    """Ray puts the process before a line that it hands on."""
    lines = observed.log.read_text(encoding="utf-8").splitlines()
    about = [json.loads(line[line.index("{") :]) for line in lines if f'"request_id": "{TRACED}"' in line]
    by_logger = {line["logger"]: line for line in about}
    ended, drawn = by_logger["serve_app.requests"], by_logger["zimage_engine.engine"]
    assert (ended["outcome"], ended["pictures"]) == ("ok", 1)
    assert drawn["replica"] in observed.by("replica", f"zimage_worker_up{{{OURS}}}")
    assert ended["replica"] in observed.by("replica", f"zimage_build_info{{{OURS}}}")


def test_a_requests_id_stands_beside_the_bucket_that_it_fell_into(observed: Observed) -> None:
    asked: dict[str, str | float] = {
        "query": f"zimage_request_seconds_bucket{{{OURS}}}",
        "start": observed.began,
        "end": observed.ended,
    }
    series = observed.prometheus.get("/api/v1/query_exemplars", params=asked).json()["data"]
    assert TRACED in {each["labels"]["request_id"] for of in series for each in of["exemplars"]}


def test_every_query_of_every_panel_returns_data(observed: Observed) -> None:
    empty = [
        (dashboard.title, panel.title, query.expression)
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for query in panel.queries
        if not _figures(observed, filled_in(query.expression, application_of(panel)))
    ]
    assert empty == []


def test_every_rule_and_everything_that_alerts_look_at_returns_data(observed: Observed) -> None:
    empty = []
    for file in RULES.glob("*.yml"):
        for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]:
            for rule in group["rules"]:
                asked = [rule["record"]] if "record" in rule else selectors(rule["expr"])
                empty += [(rule, each) for each in asked if not _figures(observed, each)]
    assert empty == []


def test_prometheus_evaluates_every_rule(observed: Observed) -> None:
    groups = observed.prometheus.get("/api/v1/rules").json()["data"]["groups"]
    wrong = [
        (rule["name"], rule["lastError"])
        for group in groups
        for rule in group["rules"]
        if "lastError" in rule
    ]
    assert wrong == [] and groups


def _figures(observed: Observed, expression: str) -> bool:
    return any(
        math.isfinite(float(value)) for each in observed.over_time(expression) for _, value in each["values"]
    )
