"""Writes each case's expected.json and the table of all in README.md, from what was seen.

    python -m tests.checkpoints.record [CASE ...]

What a case must come to is said in cases.py and held by the tests; this keeps, beside it, the details that
were seen, and stock diffusers' own outcome on the same files.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np

from tests.checkpoints.cases import ALL_MODELS, CASES
from tests.checkpoints.models import WRITERS, picture
from tests.checkpoints.outcome import outcome, stock_outcome
from zimage_engine import ModelLoaderAdapter

HERE = Path(__file__).parent


def main() -> None:
    wanted = set(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        healthy: dict[str, tuple[Path, np.ndarray]] = {}
        for case in CASES:
            if wanted and case.name not in wanted:
                continue
            if case.model not in healthy:
                made = WRITERS[case.model](root / case.model)
                healthy[case.model] = made, picture(ModelLoaderAdapter(made, cache_folder=root / "views"))
            model, reference = healthy[case.model]
            work = root / case.name
            (work / "stock").mkdir(parents=True)
            found = outcome(case, model, reference, work)
            found["stock"] = stock_outcome(case, model, reference, work / "stock")
            shutil.rmtree(work)
            target = HERE / case.name / "expected.json"
            target.parent.mkdir(exist_ok=True)
            text = json.dumps({"model": case.model, **found}, indent=2, ensure_ascii=False)
            target.write_text(text + "\n", encoding="utf-8")
            sys.stdout.write(f"{case.name}: {_in_words(found)}; stock: {found['stock']}\n")
            sys.stdout.flush()
    _write_table()


def _write_table() -> None:
    found = {}
    for case in CASES:
        file = HERE / case.name / "expected.json"
        if file.is_file():
            found[case] = json.loads(file.read_text(encoding="utf-8"))
    rows: dict[tuple[str, str, str], list[str]] = {}
    for case, seen in found.items():
        rows.setdefault((case.title, _in_words(seen), seen["stock"]), []).append(case.model)
    loads = sum("error" not in seen for seen in found.values())
    stock = sum(seen["stock"] == "fine" for seen in found.values())
    together = sum(case.together for case in found)
    lines = [
        f"| {title} | {_listed(models)} | {ours} | {theirs} |"
        for (title, ours, theirs), models in sorted(rows.items(), key=lambda row: _place(row[0][0]))
    ]
    (HERE / "README.md").write_text(
        "# Damaged checkpoints, and what comes of them\n\n"
        f"{len(found)} cases, {together} of them with two or three damages together, made from tiny models "
        'of the real classes by `cases.py`. "Loads" means that the picture is the undamaged model\'s, bit '
        "for bit (weights stored in 8 bits: within that rounding).\n"
        f"The adapter loads {loads} and refuses {len(found) - loads} with a sentence; stock diffusers "
        f"{diffusers.__version__} (`from_pretrained` with `torch_dtype=torch.bfloat16`) draws the right "
        f"picture for {stock}. Written by `python -m tests.checkpoints.record`.\n\n"
        f"The {len(ALL_MODELS)} models are {', '.join(ALL_MODELS)}. Each case has a folder of its own, named "
        "model and damage, with what was seen in detail.\n\n"
        "| damage | models | ModelLoaderAdapter | stock diffusers |\n|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n",
        encoding="utf-8",
    )


def _place(title: str) -> int:
    """Where the damage stands in cases.py."""
    return next(number for number, case in enumerate(CASES) if case.title == title)


def _listed(models: list[str]) -> str:
    others = [model for model in ALL_MODELS if model not in models]
    if not others:
        return f"all {len(models)}"
    return f"all but {', '.join(others)}" if len(others) < 3 else ", ".join(models)


def _in_words(found: dict[str, Any]) -> str:
    if found.get("error"):
        return f"refuses: {found['error']}"
    repairs = ", ".join(found["repairs"]) or "no repair"
    what = "loads" if found["picture"] in ("equal", "within rounding") else "**draws another picture**"
    return f"{what} ({repairs})"


if __name__ == "__main__":
    main()
