"""Judges the suite's results against the targets and writes them down; pure but for the plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

GIB = 2**30
#: The targets; sizes and shares as they were set.
LEAN_GIB = 5.2
SPARE_GIB = 0.5
SLOWDOWN = 0.18
BUS_TOLERANCE = 0.10
PREDICTION_TOLERANCE = 0.08
GROWTH = 0.01
PICTURES = 200


@dataclass(frozen=True)
class Target:
    """`outcome` is PASS, FAIL or UNMEASURED; `found` says with which figures."""

    name: str
    outcome: str
    found: str


def targets(results: Sequence[Row]) -> tuple[Target, ...]:
    """Every target with what was found. What has no figures is unmeasured, not passed."""
    judges: tuple[tuple[str, Callable[[Sequence[Row]], tuple[bool | None, str]]], ...] = (
        (f"1024x1024 on a 12 GiB card leaves at least {SPARE_GIB} GiB", _fits_on_12),
        (f"a residency draws 1024x1024 within {LEAN_GIB} GiB", _is_lean),
        (f"that one is at most {SLOWDOWN:.0%} slower, or within {BUS_TOLERANCE:.0%} of the bus", _lean_speed),
        (f"predicted peaks are never under and at most {PREDICTION_TOLERANCE:.0%} over", _predictions),
        (f"reserved memory grows by at most {GROWTH:.0%} over {PICTURES} pictures", _growth),
        ("every residency draws the resident picture", _equality),
        ("stock diffusers draws the resident picture", _stock_equality),
        ("out of memory: drawn or refused as it should be, and equal afterwards", _ladder),
        ("the guard found nothing to mend", _trips),
    )
    found = []
    for name, judge in judges:
        passed, words = judge(results)
        outcome = "UNMEASURED" if passed is None else "PASS" if passed else "FAIL"
        found.append(Target(name, outcome, words))
    return tuple(found)


def _rows(results: Iterable[Row], part: str) -> list[Row]:
    return [row for result in results if result["part"] == part for row in result["rows"]]


def _drawn(results: Iterable[Row]) -> list[Row]:
    """Pictures under a residency, on any card."""
    found = [row for part in ("resident", "limited") for row in _rows(results, part)]
    return [row for row in found if row["outcome"] == "drawn"]


def _measured(results: Iterable[Row]) -> list[Row]:
    return [row for row in _drawn(results) if row["peak_allocated_bytes"] is not None]


def _unguided_1024(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["width_px"] == 1024 and row["guidance_scale"] <= 1.0]


def _fits_on_12(results: Sequence[Row]) -> tuple[bool | None, str]:
    rows = [
        row
        for row in _rows(results, "limited")
        if row["card_gib"] == 12 and row["width_px"] == 1024 and row["is_chosen"]
    ]
    tried = [row for row in rows if row.get("model_may_take_bytes") is not None]
    if not tried:
        return None, "no card was limited to 12 GiB"
    failed = [row for row in tried if row["outcome"] != "drawn"]
    if failed:
        return False, "; ".join(f"{_case(row)}: {row['outcome']}" for row in failed)
    spare = {_case(row): row["model_may_take_bytes"] - row["peak_reserved_bytes"] for row in tried}
    words = "; ".join(f"{case}: {size / GIB:.2f} GiB to spare" for case, size in spare.items())
    return min(spare.values()) >= SPARE_GIB * GIB, words


def _leanest(results: Sequence[Row]) -> Row | None:
    """The fastest within the lean bound, else the leanest of all; a card's figures as they are, unlimited."""
    rows = _unguided_1024(_measured([result for result in results if result["part"] == "resident"]))
    within = [row for row in rows if row["peak_allocated_bytes"] <= LEAN_GIB * GIB]
    if within:
        return min(within, key=lambda row: row["seconds"])
    return min(rows, key=lambda row: row["peak_allocated_bytes"], default=None)


def _is_lean(results: Sequence[Row]) -> tuple[bool | None, str]:
    row = _leanest(results)
    if row is None:
        return None, "no peak was measured at 1024x1024"
    peak = row["peak_allocated_bytes"]
    return peak <= LEAN_GIB * GIB, f"{row['way']}: {peak / GIB:.2f} GiB allocated, {_gib(row)} reserved"


def _lean_speed(results: Sequence[Row]) -> tuple[bool | None, str]:
    row = _leanest(results)
    if row is None or not row.get("resident"):
        return None, "no time was measured beside a resident one at 1024x1024"
    (speed,) = [result["speed"] for result in results if result["part"] == "resident"][:1]
    slowdown = row["seconds"] / row["resident"]["seconds"] - 1
    bound = bus_bound_seconds(row, speed["bus_bytes_per_second"])
    over = row["seconds"] / bound - 1
    words = (
        f"{row['way']}: {row['seconds']:.2f} s, {slowdown:+.0%} of {row['resident']['seconds']:.2f} s; "
        f"{over:+.0%} of max(compute, bus) {bound:.2f} s at {speed['bus_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    return slowdown <= SLOWDOWN or over <= BUS_TOLERANCE, words


def bus_bound_seconds(row: Row, bus_bytes_per_second: float) -> float:
    """The least that this way could take: each stage its computing or its copies, whichever is longer."""
    resident = row["resident"]
    encode = max(resident["encode_seconds"], row["fetched_bytes_at_encoding"] / bus_bytes_per_second)
    step = max(resident["step_seconds"], row["streamed_bytes_a_step"] / bus_bytes_per_second)
    return float(encode + row["steps"] * step + resident["decode_seconds"])


def _predictions(results: Sequence[Row]) -> tuple[bool | None, str]:
    rows = _measured(results)
    if not rows:
        return None, "no peak was measured"
    ratios = {(_case(row), row["way"]): _ratio(row) for row in rows}
    low, high = min(ratios, key=lambda key: ratios[key]), max(ratios, key=lambda key: ratios[key])
    wrong = sum(not 1.0 <= ratio <= 1 + PREDICTION_TOLERANCE for ratio in ratios.values())
    words = (
        f"{len(rows)} pictures, predicted / allocated from {ratios[low]:.3f} ({', '.join(low)}) "
        f"to {ratios[high]:.3f} ({', '.join(high)}); {wrong} outside"
    )
    return wrong == 0, words


def _ratio(row: Row) -> float:
    return float(row["predicted_peak_bytes"] / row["peak_allocated_bytes"])


def _growth(results: Sequence[Row]) -> tuple[bool | None, str]:
    rows = [row for row in _rows(results, "fragmentation") if row["with_measures"]]
    told = [row for row in rows if row.get("reserved_bytes") is not None]
    if not told:
        return None, "reserved memory was not told"
    grown = growth_of(told)
    if grown is None:
        return None, f"only {len(told)} pictures were drawn"
    words = f"{grown:+.2%} over {len(told)} pictures"
    left = growth_of(
        [
            row
            for row in _rows(results, "fragmentation")
            if not row["with_measures"] and row.get("reserved_bytes") is not None
        ]
    )
    words += (
        f"; {left:+.2%} without our measures" if left is not None else "; without our measures unmeasured"
    )
    if failed := [row["outcome"] for row in rows if row["outcome"] != "drawn"]:
        return False, f"{words}; {len(failed)} not drawn, the first: {failed[0]}"
    return (grown <= GROWTH if len(told) >= PICTURES else None), words


def growth_of(rows: Sequence[Row]) -> float | None:
    """By how much the most that was reserved in the last round exceeds that in the second. The first round
    meets every size for the first time; None where there were not three rounds."""
    sizes = len({(row["width_px"], row["height_px"]) for row in rows})
    if not sizes or len(rows) < 3 * sizes:
        return None
    early = max(row["reserved_bytes"] for row in rows[sizes : 2 * sizes])
    late = max(row["reserved_bytes"] for row in rows[-sizes:])
    return float(late / early - 1)


def _equality(results: Sequence[Row]) -> tuple[bool | None, str]:
    return _all_equal(_drawn(results))


def _stock_equality(results: Sequence[Row]) -> tuple[bool | None, str]:
    return _all_equal([row for row in _rows(results, "peers") if row["outcome"] == "drawn"])


def _all_equal(rows: Sequence[Row]) -> tuple[bool | None, str]:
    judged = [row for row in rows if row.get("equal_to_resident") is not None]
    if not judged:
        return None, "no picture was drawn beside a resident one"
    others = {str(row.get("peer") or row["way"]) for row in judged if not row["equal_to_resident"]}
    words = f"{len(judged)} pictures compared, {len(rows) - len(judged)} without a like"
    return not others, words + (f"; different: {', '.join(sorted(others))}" if others else "")


def _ladder(results: Sequence[Row]) -> tuple[bool | None, str]:
    rows = [row for row in _rows(results, "oom") if row["accident"] in ("drawn", "refused")]
    if not rows:
        return None, "nothing ran out of memory"
    wrong = [
        f"{row['stage']}: {row['accident']}, {row['expected']} expected; after: {row['after']}"
        for row in rows
        if row["accident"] != row["expected"]
        or row["after"] != "drawn"
        or False in (row.get("accident_equal"), row.get("after_equal"))
    ]
    kind = "real" if all(row["is_real"] for row in rows) else "raised by the suite"
    return not wrong, f"{len(rows)} accidents, {kind}" + "".join(f"; {line}" for line in wrong)


def _trips(results: Sequence[Row]) -> tuple[bool | None, str]:
    rows = _drawn(results)
    if not rows:
        return None, "nothing was drawn"
    trips = sum(row["guard_trips"] for row in rows)
    return trips == 0, f"{trips} trips in {len(rows)} pictures (they would make times unfair)"


# The report.

_RESIDENCY_COLUMNS = (
    "card",
    "picture",
    "residency",
    "allocated",
    "reserved",
    "predicted",
    "ratio",
    "s/picture",
    "s/step",
    "speed",
    "predicted speed",
    "equal",
)
_PEER_COLUMNS = ("card", "picture", "way", "allocated", "reserved", "s/picture", "s/step", "equal")
_POOL_COLUMNS = ("our measures", "picture", "reserved", "allocated", "fragments", "true ratio", "retries")
_OOM_COLUMNS = ("stage", "expected", "came out", "rungs", "went on with", "beside the hog", "after", "equal")


def markdown(results: Sequence[Row], picture: Path | None = None) -> str:
    """The whole report; tables of what was drawn, and a list of what was not and why."""
    lines = ["# Memory on the device", "", *_conditions(results), "", "## Targets", ""]
    lines += [f"- {target.outcome}: {target.name}. {target.found}" for target in targets(results)]
    tables = (
        ("Residencies", _RESIDENCY_COLUMNS, [_residency_cells(row) for row in _drawn(results)]),
        ("Peers", _PEER_COLUMNS, [_peer_cells(row) for row in _rows(results, "peers") if _is_drawn(row)]),
        ("Many sizes in a row", _POOL_COLUMNS, _pool_cells(_rows(results, "fragmentation"))),
        ("Out of memory", _OOM_COLUMNS, [_oom_cells(row) for row in _rows(results, "oom")]),
    )
    for name, columns, cells in tables:
        if cells:
            lines += ["", f"## {name}", "", *_table(columns, cells)]
        if name == "Many sizes in a row" and cells and picture is not None:
            lines += ["", f"![reserved memory and fragments]({picture.name})"]
    if missing := _missing(results):
        lines += ["", "## Not measured", "", *missing]
    return "\n".join(lines) + "\n"


def _conditions(results: Sequence[Row]) -> list[str]:
    """Machine, rates and model, once for each that differs."""
    told: dict[str, None] = {}
    for result in results:
        if "machine" not in result:
            continue
        machine, speed = result["machine"], result["speed"]
        told[
            f"{machine['name']}, {_size(machine['total_bytes'])}, of which the CUDA context takes "
            f"{_size(machine['context_bytes'])}; torch {machine['torch']}, CUDA {machine['cuda']}."
        ] = None
        shape = (
            "the published shape" if result["has_published_shape"] else "the tiny shape, not the published"
        )
        told[f"Random weights, {shape}, bfloat16, eager; captions fill all their places."] = None
        told[
            f"{result['part']} {result['job']}: {speed['flops_per_second'] / 1e12:.1f} TFLOP/s, "
            f"{speed['bus_bytes_per_second'] / 1e9:.1f} GB/s to the device, {result['allocator']}, "
            f"{result['seconds']:.0f} s."
        ] = None
    return [f"- {line}" for line in told]


def _table(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    rows = [columns, ["---"] * len(columns), *cells]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _residency_cells(row: Row) -> list[str]:
    chosen = " (planned)" if row["is_chosen"] else ""
    peak = row["peak_allocated_bytes"]
    speed = row["resident"]["seconds"] / row["seconds"] if row["resident"] else None
    return [
        _card(row),
        _case(row),
        row["way"] + chosen,
        _size(peak),
        _size(row["peak_reserved_bytes"]),
        _size(row["predicted_peak_bytes"]),
        "-" if peak is None else f"{_ratio(row):.3f}",
        f"{row['seconds']:.3f}",
        f"{row['step_seconds']:.4f}",
        "-" if speed is None else f"{speed:.2f}",
        f"{row['predicted_relative_speed']:.2f}",
        _yes(row["equal_to_resident"]),
    ]


def _peer_cells(row: Row) -> list[str]:
    return [
        _card(row),
        _case(row),
        row["peer"],
        _size(row["peak_allocated_bytes"]),
        _size(row["peak_reserved_bytes"]),
        f"{row['seconds']:.3f}",
        f"{row['step_seconds']:.4f}",
        _yes(row["equal_to_resident"]),
    ]


def _pool_cells(rows: Sequence[Row]) -> list[list[str]]:
    """One line a round, at its end."""
    return [
        [
            _yes(row["with_measures"]),
            str(row["number"] + 1),
            _size(row["reserved_bytes"]),
            _size(row["allocated_bytes"]),
            _share(row["fragmentation_ratio"]),
            _share(row["true_fragmentation_ratio"]),
            str(row["allocation_retries"]),
        ]
        for row in rows
        if row.get("is_end_of_round")
    ]


def _oom_cells(row: Row) -> list[str]:
    rungs = ", ".join(f"{name} x{count}" for name, count in row.get("accident_rungs", {}).items())
    return [
        row["stage"],
        row["expected"],
        row["accident"],
        rungs or "-",
        row.get("accident_way") or row.get("accident_message") or "-",
        row.get("beside_the_hog", "-"),
        row.get("after", "-"),
        _yes(row.get("after_equal")),
    ]


def _missing(results: Sequence[Row]) -> list[str]:
    """What there is no picture of, with the reason; parts that were not run."""
    run = {result["part"] for result in results}
    lines = [
        f"- {part}: not run"
        for part in ("resident", "limited", "peers", "fragmentation", "oom")
        if part not in run
    ]
    lines += [f"- {each['part']} {each['job']}: {each['failed']}" for each in results if "failed" in each]
    if any(
        not result["rows"] or result["machine"]["total_bytes"] is None
        for result in results
        if "failed" not in result
    ):
        lines.append("- memory: this device tells nothing of it, so every size is missing")
    for part in ("resident", "limited", "peers"):
        lines += [
            f"- {part}, {_card(row)}, {_case(row)}, {row.get('peer') or row['way']}: {row['outcome']}"
            for row in _rows(results, part)
            if not _is_drawn(row)
        ]
    lines += [
        f"- fragmentation, {'with' if row['with_measures'] else 'without'}, picture {row['number'] + 1}: "
        f"{row['outcome']}"
        for row in _rows(results, "fragmentation")
        if not _is_drawn(row)
    ]
    return lines


def _is_drawn(row: Row) -> bool:
    return bool(row["outcome"] == "drawn")


def _case(row: Row) -> str:
    guidance = "off" if row["guidance_scale"] <= 1.0 else f"{row['guidance_scale']:g}"
    return f"{row['width_px']}x{row['height_px']}, {row['steps']} steps, guidance {guidance}"


def _card(row: Row) -> str:
    return "whole" if row["card_gib"] is None else f"{row['card_gib']} GiB"


def _gib(row: Row) -> str:
    return _size(row["peak_reserved_bytes"])


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / GIB:.2f} GiB"


def _share(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2%}"


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "NO"


def plot(results: Sequence[Row], path: Path) -> Path | None:
    """Reserved memory and fragments over the pictures, with and without our measures; None where there is
    nothing to show or no matplotlib, and the data is then in the JSON alone."""
    rows = [row for row in _rows(results, "fragmentation") if row.get("reserved_bytes") is not None]
    if not rows:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for measures, name in ((True, "with our measures"), (False, "without")):
        chosen = [row for row in rows if row["with_measures"] is measures]
        numbers = [row["number"] + 1 for row in chosen]
        above.plot(numbers, [row["reserved_bytes"] / GIB for row in chosen], label=name)
        below.plot(numbers, [100 * (row["fragmentation_ratio"] or 0.0) for row in chosen], label=name)
    above.set_ylabel("reserved, GiB")
    below.set_ylabel("fragments, % of reserved")
    below.set_xlabel("picture")
    above.legend()
    figure.savefig(path, dpi=110)
    return path
