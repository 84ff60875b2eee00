"""Every alert is made to fire, alone, and to stay silent just before that; promtool computes."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from monitoring.generate import RULES
from tests.running_server import ROOT

pytestmark = pytest.mark.usefixtures("prometheus")

RULE_FILES = sorted(RULES.glob("*.yml"))
ALERTS = {
    rule["alert"]
    for group in yaml.safe_load((RULES / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
}

#: A sound application for eight hours: a request a second, served in time by two workers. By minutes.
SOUND = {
    'up{job="zimage-turbo"}': "1x480",
    "zimage_model_loaded": "1x480",
    'zimage_workers_wanted{replica="front"}': "2x480",
    'zimage_worker_up{replica="a"}': "1x480",
    'zimage_worker_up{replica="b"}': "1x480",
    'zimage_worker_busy{replica="a"}': "1x480",
    'zimage_worker_busy{replica="b"}': "1x480",
    'zimage_requests_in_flight{replica="front"}': "4x480",
    'zimage_requests_total{replica="front",outcome="ok"}': "0+60x480",
    'zimage_requests_total{replica="front",outcome="internal_error"}': "0x480",
    'zimage_requests_total{replica="front",outcome="cancelled"}': "0+30x480",
    'zimage_request_seconds_bucket{replica="front",le="30.0"}': "0+60x480",
    'zimage_request_seconds_count{replica="front"}': "0+60x480",
    'zimage_pictures_total{replica="front"}': "0+60x480",
    'zimage_guard_trips_total{replica="front",stage="denoise"}': "0x480",
    'zimage_oom_total{replica="a",stage="decode",outcome="freed"}': "0x480",
    'zimage_vram_bytes{replica="a",kind="used"}': "50x480",
    'zimage_vram_bytes{replica="a",kind="total"}': "100x480",
    'zimage_vram_fragmentation_ratio{replica="a"}': "0.1x480",
    'zimage_store_bytes{replica="a",kind="free"}': "50x480",
    'zimage_store_bytes{replica="a",kind="total"}': "100x480",
}

#: From minute 400 on one worker is gone: its series end.
GONE = "1x399 stale"
IN_TIME = 'zimage_request_seconds_bucket{replica="front",le="30.0"}'
MISTAKEN = 'zimage_requests_total{replica="front",outcome="invalid_value"}'
FAILED = 'zimage_requests_total{replica="front",outcome="internal_error"}'
TRIPS = 'zimage_guard_trips_total{replica="front",stage="denoise"}'
IN_FLIGHT = 'zimage_requests_in_flight{replica="front"}'
OOM = 'zimage_oom_total{replica="a",stage="decode",outcome="freed"}'
USED = 'zimage_vram_bytes{replica="a",kind="used"}'
FRAGMENTS = 'zimage_vram_fragmentation_ratio{replica="a"}'
FREE = 'zimage_store_bytes{replica="a",kind="free"}'
ONE_DEAD = {'zimage_worker_up{replica="b"}': GONE, 'zimage_worker_busy{replica="b"}': GONE}
NO_MODEL = {
    "zimage_model_loaded": "1x399 0x80",
    **{f'zimage_worker_{what}{{replica="{name}"}}': GONE for what in ("up", "busy") for name in "ab"},
}


@dataclass(frozen=True)
class Case:
    """The sound application but for `changed`, at `minute`: exactly `firing` fires."""

    name: str
    changed: Mapping[str, str]
    minute: int
    firing: frozenset[str] = field(default_factory=frozenset)


def fires(*names: str) -> frozenset[str]:
    return frozenset(f"Zimage{name}" for name in names)


CASES = (
    Case("all is well", {}, 479),
    Case("a scrape fails", {'up{job="zimage-turbo"}': "1x399 0 1x80"}, 404),
    Case("no scrape succeeds", {'up{job="zimage-turbo"}': "1x399 0x80"}, 404, fires("ServerUnreachable")),
    Case("another program is down", {'up{job="node"}': "0x480"}, 479),
    Case("the model is being loaded", NO_MODEL, 414),
    Case("the model is not loaded", NO_MODEL, 417, fires("ModelNotLoaded")),
    Case("a worker is replaced", ONE_DEAD, 404),
    Case("a worker stays away", ONE_DEAD, 408, fires("WorkerDown")),
    Case(
        "a worker comes back under another name",
        ONE_DEAD | {'zimage_worker_up{replica="c"}': "_x402 1x77"},
        479,
    ),
    Case("the queue is long and shrinks", {IN_FLIGHT: "4x399 80-1x60 20x20"}, 440),
    Case("the queue grows and is short", {IN_FLIGHT: "4x470 4+0.5x9"}, 479),
    Case("the queue grows", {IN_FLIGHT: "4x399 4+1x80"}, 425, fires("QueueGrowing")),
    Case("half are slow", {IN_TIME: "0+30x480"}, 479, fires("LatencyBudgetBurnsSlowly")),
    Case("a quarter is slow", {IN_TIME: "0+45x480"}, 479),
    Case(
        "nearly all are slow",
        {IN_TIME: "0+60x399 23940+6x80"},
        470,
        fires("LatencyBudgetBurnsFast"),
    ),
    Case("nearly all were slow and are no more", {IN_TIME: "0+60x399 23940+6x60 24300+60x20"}, 470),
    Case("three in a hundred fail", {FAILED: "0+2x480"}, 479),
    Case("one in ten fails", {FAILED: "0+10x480"}, 479, fires("RequestsFail")),
    Case(
        "one in ten fails among many mistaken ones",
        {FAILED: "0+10x480", MISTAKEN: "0+6000x480"},
        479,
        fires("RequestsFail"),
    ),
    Case("only callers' mistakes", {MISTAKEN: "0+6000x480"}, 479),
    Case("one bad value in ten pictures", {TRIPS: "0+6x480"}, 479),
    Case("one bad value in two pictures", {TRIPS: "0+30x480"}, 479, fires("GuardTripsOften")),
    Case("out of memory once, long ago", {OOM: "0x399 1x80"}, 440),
    Case("out of memory", {OOM: "0x399 1x80"}, 405, fires("OutOfMemory")),
    Case("the device is rather full", {USED: "94x480"}, 479),
    Case("the device is full", {USED: "97x480"}, 479, fires("VramNearlyFull")),
    Case("some fragments", {FRAGMENTS: "0.3x480"}, 479),
    Case("many fragments", {FRAGMENTS: "0.5x480"}, 479, fires("VramFragmented")),
    Case("the disk is rather full", {FREE: "12x480"}, 479),
    Case("the disk is full", {FREE: "8x480"}, 479, fires("StoreNearlyFull")),
)


def named(series: str) -> str:
    """The series with the labels that every scrape adds."""
    name, _, labels = series.partition("{")
    return f'{name}{{namespace="n",application="z",{labels or "}"}'


def as_promtool_test(case: Case) -> dict[str, object]:
    return {
        "name": case.name,
        "interval": "1m",
        "input_series": [
            {"series": named(series), "values": values}
            for series, values in {**SOUND, **case.changed}.items()
        ],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{case.minute}m",
                "exp_samples": [
                    {"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(case.firing)
                ],
            }
        ],
    }


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_alone_and_each_stays_silent(tmp_path: Path) -> None:
    file = tmp_path / "cases.yml"
    content = {
        "rule_files": [str(rules) for rules in RULE_FILES],
        "evaluation_interval": "1m",
        "tests": [as_promtool_test(case) for case in CASES],
    }
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    promtool("test", "rules", str(file))


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    assert frozenset[str]().union(*(case.firing for case in CASES)) == ALERTS


def test_promtool_finds_nothing_wrong() -> None:
    promtool("check", "rules", *map(str, RULE_FILES))
    promtool("check", "config", "monitoring/prometheus/prometheus.yml")


def test_every_alert_says_what_happened_and_what_to_do() -> None:
    readme = (RULES.parents[1] / "README.md").read_text(encoding="utf-8")
    for group in yaml.safe_load((RULES / "alerts.yml").read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("critical", "warning")
            assert len(rule["annotations"]["runbook"]) > 100, rule["alert"]
            assert rule["annotations"]["summary"].endswith("."), rule["alert"]
            assert rule["alert"] in readme
