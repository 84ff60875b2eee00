"""Load and faults on a server of our own, by real clients on loopback.

    python -m tests.chaos.serving load [--seconds 300] [--keys 3] [--seed 0] [--json FILE]
    python -m tests.chaos.serving chaos [--seconds 180]
    python -m tests.chaos.serving sigterm [--seconds 10]
    python -m tests.chaos.serving cancel [--tries 200]
    python -m tests.chaos.serving nodes [--seconds 60]

Each starts a server with the embedded demo model, ends by itself, and ends it; with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.serving.cancel import cancel
from tests.chaos.serving.load import Result, chaos, load, pictures, say, serving, sigterm
from tests.chaos.serving.nodes import lose_a_node, two_nodes

PICTURES = 48


def run_load(chosen: argparse.Namespace) -> Result:
    with serving(pictures(PICTURES, chosen.seed), chosen.keys) as (target, _):
        return asyncio.run(load(target, chosen.seconds or 300.0, chosen.seed))


def run_chaos(chosen: argparse.Namespace) -> Result:
    with serving(pictures(PICTURES, chosen.seed), chosen.keys) as (target, _):
        return asyncio.run(chaos(target, chosen.seconds or 180.0, chosen.seed))


def run_sigterm(chosen: argparse.Namespace) -> Result:
    with serving(pictures(PICTURES, chosen.seed), chosen.keys) as (target, _):
        return asyncio.run(sigterm(target, chosen.seconds or 10.0, chosen.seed))


def run_cancel(chosen: argparse.Namespace) -> Result:
    with serving(pictures(1, chosen.seed), keys=1) as (target, _):
        return asyncio.run(cancel(target, chosen.tries, chosen.seed))


def run_nodes(chosen: argparse.Namespace) -> Result:
    with two_nodes(pictures(PICTURES, chosen.seed)) as nodes:
        return asyncio.run(lose_a_node(nodes, chosen.seconds or 60.0, chosen.seed))


COMMANDS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "load": run_load,
    "chaos": run_chaos,
    "sigterm": run_sigterm,
    "cancel": run_cancel,
    "nodes": run_nodes,
}


def main() -> None:
    """Print what was found."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("command", choices=COMMANDS)
    asked.add_argument("--seconds", type=float)
    asked.add_argument("--tries", type=int, default=200)
    asked.add_argument("--keys", type=int, default=3)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--json", type=Path, help="Also write the figures there.")
    chosen = asked.parse_args()
    # Whoever ends this ends the server too: the blocks that started it are left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began = time.monotonic()
    found = COMMANDS[chosen.command](chosen)
    found.figures |= {"wall seconds": time.monotonic() - began, "load average": os.getloadavg()[0]}
    say(str(found))
    if chosen.json is not None:
        told = {"title": found.title, "figures": found.figures, "wrong": found.wrong}
        chosen.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if found.wrong else 0)


if __name__ == "__main__":
    main()
