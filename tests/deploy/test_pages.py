"""The operator's pages say what is so: sizes as the planner computes them, a way out for each alert."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serve_app import cli
from tests.deploy.manifests import OVERLAYS, ROOT

PAGES = tuple(ROOT / folder / "README.md" for folder in ("docker", "k8s", "monitoring"))
#: The first of the last row has room for everything.
CARDS_GIB = (8, 12, 16, 24)
GIB = 1 << 30


def rows(page: Path, first_cell: str) -> list[list[str]]:
    """The cells of every table row of a page whose first cell matches a pattern."""
    lines = page.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if re.fullmatch(first_cell, row[0])]


def planned(card_gib: int) -> dict[str, Any]:
    asked = ["plan", "--model", "z-image-turbo", "--vram", f"{card_gib}GiB", "--json"]
    answer = CliRunner().invoke(cli.app, asked)
    assert answer.exit_code == 0, answer.output
    chosen: dict[str, Any] = json.loads(answer.stdout)["chosen"]
    return chosen


def in_words(plan: dict[str, Any]) -> str:
    if plan["residency"] == "stream":
        return f"{plan['resident_blocks']} of {plan['blocks']} blocks, the rest streamed"
    return "all but the text encoder, which is streamed" if plan["stream_text_encoder"] else "everything"


def test_the_sizing_table_is_what_the_planner_computes_today() -> None:
    expected = []
    for card_gib in CARDS_GIB:
        plan = planned(card_gib)
        host = f"{plan['host_bytes'] / GIB:.2f} GiB" if plan["host_bytes"] else "0"
        name = f"{card_gib} GiB" + " and more" * (card_gib == CARDS_GIB[-1])
        expected.append([name, in_words(plan), f"{plan['peak_bytes'] / GIB:.2f} GiB", host])
    assert expected[-1][1] == "everything"
    written = "\n".join(f"| {' | '.join(row)} |" for row in expected)
    assert rows(ROOT / "k8s" / "README.md", r"\d+ GiB.*") == expected, f"k8s/README.md should say:\n{written}"


def test_every_alert_has_one_entry_that_says_what_to_do_and_no_entry_is_stale() -> None:
    groups = yaml.safe_load((ROOT / "monitoring/prometheus/rules/alerts.yml").read_bytes())["groups"]
    alerts = [rule for group in groups for rule in group["rules"]]
    entries = rows(ROOT / "monitoring" / "README.md", r"Zimage\w+")
    assert sorted((entry[0], entry[1]) for entry in entries) == sorted(
        (rule["alert"], rule["labels"]["severity"]) for rule in alerts
    )
    assert all(len(entry[2]) > 20 for entry in entries)
    assert all(rule["annotations"]["runbook"] for rule in alerts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_and_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    # In what is typed or quoted as code; "make" is a verb elsewhere.
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    named = set(re.findall(r"(?<![\w-])make ([a-z][\w-]*)", code))
    assert named <= targets, named - targets
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"(?:k8s|docker|monitoring|tests)/[\w./-]+\.(?:yaml|yml|py|md)", code):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:base|gpu|overlays|examples)/[\w./-]+\.yaml)`", text):
        assert (ROOT / "k8s" / path).exists(), path


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.parent.name)
def test_pages_tell_how_to_upgrade_and_go_back(page: Path) -> None:
    assert "\n## Upgrade and rollback\n" in page.read_text(encoding="utf-8")


def test_every_overlay_is_in_the_list() -> None:
    listed = {row[0].strip("`") for row in rows(ROOT / "k8s" / "README.md", r"`overlays/.*`")}
    assert listed == {f"overlays/{overlay}" for overlay in OVERLAYS}
