"""The whole fault matrix: every fault in every family under every way of offloading, and what came of it.

    python -m tests.benchmarks.fault_matrix [--family z-image ...] [--offload none ...] [--markdown FILE]

A cell is wrong where the picture is not what it has to be, where anything but GuardExhausted was raised, or
where the control picture drawn after it differs from the one drawn before any fault. Ends with 1 if one is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.zimage_engine.sampling.faults import (
    FAMILIES,
    OFFLOADS,
    PLACES,
    Cell,
    Rigs,
    Verdict,
    full_matrix,
    judge,
)

_COLUMNS = ("cells", "recovered", "bit-identical", "exhausted", "wrong")


def judged(cells: Sequence[Cell], folder: Path) -> Iterable[Verdict]:
    """One verdict after another; those that are wrong are printed as they come."""
    rigs = Rigs(folder)
    for cell in cells:
        verdict = judge(rigs[cell], cell)
        if verdict.wrong:
            sys.stdout.write(f"WRONG {cell}: {'; '.join(verdict.wrong)}\n")
            sys.stdout.flush()
        yield verdict


def tallied(verdicts: Iterable[Verdict]) -> dict[tuple[str, str, str], Counter[str]]:
    """By family, offload and place, how many cells ended in which way."""
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    for verdict in verdicts:
        cell = verdict.cell
        row = rows.setdefault((cell.family, cell.offload, cell.place), Counter())
        row["cells"] += 1
        row[verdict.outcome] += 1
        row["wrong"] += bool(verdict.wrong)
        row["bit-identical"] += cell.times == "once" and verdict.outcome == "recovered" and not verdict.wrong
    return rows


def table(rows: dict[tuple[str, str, str], Counter[str]]) -> str:
    """A Markdown table with a row for each place and the sums below."""
    lines = [
        "| family | offload | fault in | " + " | ".join(_COLUMNS) + " |",
        "|---|---|---|" + "---:|" * len(_COLUMNS),
    ]
    total = sum(rows.values(), Counter())
    for names, counts in [*rows.items(), (("all", "", ""), total)]:
        lines.append("| " + " | ".join([*names, *(str(counts[column]) for column in _COLUMNS)]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Judge what was asked for and print the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--family", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    asked.add_argument("--offload", nargs="*", choices=list(OFFLOADS), default=list(OFFLOADS))
    asked.add_argument("--place", nargs="*", choices=PLACES, default=PLACES)
    asked.add_argument("--markdown", type=Path, help="write the table here as well")
    chosen = asked.parse_args()
    cells = [
        cell
        for cell in full_matrix()
        if cell.family in chosen.family and cell.offload in chosen.offload and cell.place in chosen.place
    ]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = tallied(judged(cells, Path(folder)))
    shown = table(rows)
    sys.stdout.write(f"{shown}\n\n{len(cells)} cells in {time.perf_counter() - started:.0f} s\n")
    if chosen.markdown:
        chosen.markdown.write_text(shown + "\n", encoding="utf-8")
    sys.exit(1 if any(row["wrong"] for row in rows.values()) else 0)


if __name__ == "__main__":
    main()
