"""`zimage-turbo cache` over views that the engine really made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner, Result

from serve_app.cli import app
from serve_app.cli_cache import parse_bytes
from zimage_engine.loading.known_loads import KnownLoad, KnownLoads
from zimage_engine.loading.view import MANIFEST, ensure_view, list_views
from zimage_engine.loading.view_plan import ViewPlan, WrittenText


def run(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, ["cache", *arguments], input=typed)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Three views of 1000, 2000 and 3000 bytes; the largest was used longest ago."""
    for number, last_used in ((1, 3000), (2, 2000), (3, 1000)):
        text = WrittenText("config.json", "x" * 1000 * number)
        view = ensure_view(ViewPlan(f"model {number}", tmp_path, (), (text,), ()), tmp_path / "cache")
        os.utime(view / MANIFEST, (last_used, last_used))
    return tmp_path / "cache"


def titles(cache: Path) -> set[str]:
    return {view.title for view in list_views(cache)}


def test_ls_shows_a_line_for_each_view_the_last_used_first(cache: Path) -> None:
    shown = run("ls", "--folder", str(cache))
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["MODEL", "SIZE", "LAST", "USED", "KEY"]
    assert [line.split()[1] for line in lines[1:]] == ["1", "2", "3"]
    assert "3.0 kB" in lines[3] and "days ago" in lines[3] and lines[3].endswith(list_views(cache)[2].key)


def test_ls_as_json_gives_every_fact(cache: Path) -> None:
    rows = json.loads(run("ls", "--folder", str(cache), "--json").stdout)
    assert [(row["title"], row["size_bytes"], row["last_used_at"]) for row in rows] == [
        ("model 1", 1000, 3000.0),
        ("model 2", 2000, 2000.0),
        ("model 3", 3000, 1000.0),
    ]
    assert all(Path(row["path"]).is_dir() and row["is_whole"] for row in rows)


def test_ls_of_an_empty_cache_says_where_it_looked(tmp_path: Path) -> None:
    shown = run("ls", "--folder", str(tmp_path / "none"))
    assert (shown.exit_code, shown.stdout) == (0, f"no repaired copies in {tmp_path / 'none'}\n")


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (("--max-size", "3kB"), {"model 1", "model 2"}),
        (("--max-size", "2999"), {"model 1"}),
        (("--all",), set()),
        ((), {"model 1", "model 2", "model 3"}),
    ],
)
def test_prune_keeps_what_was_used_last(arguments: tuple[str, ...], kept: set[str], cache: Path) -> None:
    done = run("prune", *arguments, "--yes", "--folder", str(cache))
    assert done.exit_code == 0, done.stderr
    assert titles(cache) == kept
    assert done.stdout.startswith(f"removed {3 - len(kept)} of 3 copies, ")


def test_prune_takes_keys_by_their_beginning(cache: Path) -> None:
    views = list_views(cache)
    assert run("prune", views[1].key[:12], "--yes", "--folder", str(cache)).exit_code == 0
    assert titles(cache) == {"model 1", "model 3"}


def test_prune_asks_first_and_takes_no_for_an_answer(cache: Path) -> None:
    assert run("prune", "--all", "--folder", str(cache), typed="n\n").exit_code == 1
    assert len(titles(cache)) == 3
    assert run("prune", "--all", "--folder", str(cache), typed="y\n").exit_code == 0
    assert titles(cache) == set()


def test_prune_all_forgets_what_was_found_sound(cache: Path) -> None:
    loads = KnownLoads(cache)
    loads.remember("a", KnownLoad("sdxl", "bfloat16", True, None, "", ()))
    assert run("prune", "--yes", "--folder", str(cache)).exit_code == 0
    assert loads.recall("a") is not None
    assert run("prune", "--all", "--yes", "--folder", str(cache)).exit_code == 0
    assert loads.recall("a") is None


def test_prune_leaves_what_is_in_use_and_says_so(cache: Path) -> None:
    busy = list_views(cache)[0]
    with FileLock(cache / ".locks" / f"{busy.key}.lock"):
        done = run("prune", "--all", "--yes", "--folder", str(cache))
    assert (done.exit_code, titles(cache)) == (1, {"model 1"})
    assert busy.key in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nokey",), "0 begin with 'nokey'"),
        (("--max-size", "many"), "such as 20GB"),
        (("--max-size", "1GB", "--all"), "not several"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: tuple[str, ...], words: str, cache: Path) -> None:
    refused = run("prune", *arguments, "--yes", "--folder", str(cache))
    assert refused.exit_code == 2 and words in refused.stderr
    assert len(titles(cache)) == 3


@pytest.mark.parametrize(
    ("text", "count"),
    [("20GB", 20 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 500 * 10**6), ("12", 12), ("0", 0)],
)
def test_sizes_as_people_write_them(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_it_brings_no_torch(cache: Path) -> None:
    program = (
        "import sys; from serve_app.cli import app\n"
        f"app(['cache', 'prune', '--all', '--yes', '--folder', {str(cache)!r}], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
