"""What Prometheus says of a real run is what the client counted, and no panel is empty."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator

import pytest
import yaml

from monitoring.generate import RULES
from monitoring.panels import DASHBOARDS
from tests.monitoring.live import (
    APPLICATION,
    QUICK,
    TRACED,
    URL,
    Observed,
    application_of,
    observed_application,
    replicas_of,
    until,
)
from tests.monitoring.queries import filled_in, selectors
from tests.serve_app.test_metrics import MOST_SERIES

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
    warnings = observed.by("code", f"sum by (code) (zimage_warnings_total{{{OURS}}}) > 0")
    assert warnings == counted.warnings and warnings["guard_recovered"] > 0
    assert observed.by("", f"sum(zimage_worker_retries_total{{{OURS}}})")[""] == 1


def test_each_stage_was_timed_once_for_each_picture_or_request(observed: Observed) -> None:
    counted = observed.counted
    stages = observed.by("stage", f"sum by (stage) (zimage_generation_seconds_count{{{OURS}}})")
    of_requests = dict.fromkeys(("enhance", "encode_file"), counted.outcomes["ok"])
    of_pictures = dict.fromkeys(("encode", "denoise", "decode", "total"), counted.pictures)
    assert stages == of_requests | of_pictures | {"refine": counted.refined} and counted.refined > 0


def test_each_prompt_was_looked_for_once_among_those_encoded_before(observed: Observed) -> None:
    """A prompt and a negative one; all ask for the same, so each of three workers reads them once at most."""
    lookups = observed.by("outcome", f"sum by (outcome) (zimage_prompt_cache_total{{{OURS}}})")
    assert sum(lookups.values()) == 2 * observed.counted.outcomes["ok"]
    assert 0 < lookups["miss"] <= 2 * 3, lookups


def test_both_ingresses_were_at_work_and_count_once_each(observed: Observed) -> None:
    by_ingress = observed.by("replica", f'sum by (replica) (zimage_requests_total{{{OURS}, outcome="ok"}})')
    assert len(by_ingress) == 2 and all(by_ingress.values()), by_ingress


def test_no_replica_has_more_series_than_are_said(observed: Observed) -> None:
    series = observed.by("replica", f'count by (replica) ({{__name__=~"zimage_.+", replica!="", {OURS}}})')
    assert len(series) == 4 and max(series.values()) <= MOST_SERIES, series


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
    with_dots = [panel for dashboard in DASHBOARDS for panel in dashboard.panels if panel.has_exemplars]
    assert with_dots
    for panel in with_dots:
        for query in panel.queries:
            found = observed.exemplars(filled_in(query.expression, APPLICATION))
            assert TRACED in {each["labels"]["request_id"] for each in found}, panel.title


def test_rays_and_serves_own_metrics_are_beside_ours(observed: Observed) -> None:
    assert observed.by("", "max(ray_node_cpu_count)")[""] > 0
    served = observed.by("application", "sum by (application) (ray_serve_deployment_replica_healthy)")
    assert served[APPLICATION] >= 4, "two ingresses and two workers"


def test_every_query_of_every_panel_returns_data(observed: Observed) -> None:
    empty = [
        (dashboard.title, panel.title, query.expression)
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for query in panel.queries
        if not _figures(observed, filled_in(query.expression, application_of(panel)), panel.is_figure)
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


def test_an_ingress_that_is_started_anew_counts_nothing_twice(observed: Observed) -> None:
    """The last test, for it changes what the others look at."""
    served = f'sum(max_over_time(zimage_requests_total{{{OURS}, outcome="ok"}}[30m]))'
    answered = observed.counted.outcomes["ok"]
    old = set(observed.by("replica", f"zimage_build_info{{{OURS}}}"))
    replicas_of(observed.process, "PromptEnhancer")[0].kill()

    def there_is_a_new_one() -> bool:
        now = set(observed.by("replica", f"zimage_build_info{{{OURS}}}"))
        return len(now) == 2 and now != old

    until(there_is_a_new_one)
    assert observed.by("", served)[""] == answered
    statuses = [observed.application.post(URL, json=QUICK).status_code for _ in range(4)]
    assert statuses == [200] * 4
    until(lambda: observed.by("", served)[""] >= answered + 4)
    time.sleep(5)  # until after the next scrape
    assert observed.by("", served)[""] == answered + 4


def _figures(observed: Observed, expression: str, now: bool = False) -> bool:
    """Whether there is a number in it: at some moment of the run, or now, as a single figure needs it."""
    if now:
        points = [each["value"] for each in observed.query(expression)]
    else:
        points = [point for each in observed.over_time(expression) for point in each["values"]]
    return any(math.isfinite(float(value)) for _, value in points)
