"""What was measured, for people: tables for a terminal, a Markdown page, and plots where matplotlib is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zimage_engine.speed.levers import lever_named

Row = Mapping[str, Any]

GIB = 2**30

#: The stages of a picture in their order, and what they are called.
STAGES = {
    "encode": "encode the prompts",
    "denoise": "denoise, all steps",
    "step": "one step",
    "decode": "decode",
    "picture": "the whole picture",
    "refine": "refine (if asked)",
    "pack": "PNG file",
    "answer": "worker's answer",
}
#: What each ratio says, and what of it is good.
RATIOS = {
    "picture_speedup": "stock time / ours, whole picture",
    "denoise_speedup": "stock time / ours, denoising",
    "step_speedup": "stock time / ours, one step",
    "encode_speedup": "stock time / ours, prompts",
    "decode_speedup": "stock time / ours, decoding",
    "acceleration": "exact picture / accelerated one",
    "guidance_cost": "denoising with guidance / without",
    "denoise_over_limit": "denoising / its arithmetic's limit",
    "worker_over_stock": "worker's answer / bare stock picture",
}


def text(report: Row) -> str:
    """The report in lines of at most 78 characters or so."""
    lines = [*_heading(report), ""]
    for case in report["cases"]:
        lines += [_title(case), ""]
        lines += _columns(_stage_rows(case), (">", "<"))
        if case["ratios"]:
            lines += ["", "  ratios, median (quartiles)"]
            lines += _columns(_ratio_rows(case), (">", "<"))
        if case["at_once"]:
            lines += ["", "  requests at once"]
            lines += _columns(_crowd_rows(case), (">", ">", ">", ">"))
        lines += ["", *(f"  {line}" for line in _case_facts(case)), ""]
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def markdown(report: Row, picture: Path | None = None) -> str:
    """The report as a page; `picture` is the plot that stands beside it."""
    lines = ["# How fast this machine draws", "", *(f"- {line}" for line in _heading(report))]
    for case in report["cases"]:
        lines += ["", f"## {_title(case)}", "", *_table(*_stage_rows(case))]
        if case["ratios"]:
            lines += ["", "Ratios, median and quartiles:", "", *_table(*_ratio_rows(case))]
        if case["at_once"]:
            lines += ["", *_table(*_crowd_rows(case))]
        lines += ["", *(f"- {line}" for line in _case_facts(case))]
    if picture is not None:
        lines += ["", f"![seconds by stage, and pictures a minute]({picture.name})"]
    if report["notes"]:
        lines += ["", "## To be known", "", *(f"- {note}" for note in report["notes"])]
    return "\n".join(lines) + "\n"


def _heading(report: Row) -> Iterator[str]:
    machine, model, start = report["machine"], report["model"], report["start"]
    memory = machine["device_memory_bytes"]
    if memory:
        yield f"{machine['device_name']}, {memory / GIB:.1f} GiB"
    yield (
        f"{machine['processor']}, {machine['cores_allowed']} processors, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / GIB:.0f} GiB"
    )
    versions = report["versions"]
    commit = f", commit {report['commit'][:10]}" if report["commit"] else ""
    yield (
        f"zimage-turbo {versions['zimage-turbo']}{commit}, torch {versions['torch']}, "
        f"diffusers {versions['diffusers']}"
    )
    layers = "" if model["layers"] is None else f" cut to {model['layers']} layers"
    yield (
        f"{model['id']}{layers}, {model['parameters']['denoiser'] / 1e6:,.1f} M in the denoiser, "
        f"{model['dtype']}"
    )
    yield (
        f"loaded in {start['load_seconds']:.1f} s; first picture {_seconds(start['first_picture_seconds'])}, "
        f"{start['first_over_steady']:.2f} x a later one"
    )
    rates = report["rates"]
    products = ", ".join(f"{_rate(rate['flops_per_second'])} {rate['dtype']}" for rate in rates["matmul"])
    bus = rates["to_device_bytes_per_second"]
    yield (
        f"measured: {products}; memory {rates['memory_bytes_per_second'] / 1e9:.1f} GB/s"
        + ("" if bus is None else f", bus {bus / 1e9:.1f} GB/s")
    )


def _title(case: Row) -> str:
    guidance = "off" if case["guidance_scale"] <= 1 else f"{case['guidance_scale']:g}"
    return f"{_size(case)}, {case['steps']} steps, guidance {guidance}"


def _stage_rows(case: Row) -> list[list[str]]:
    stock = None if case["stock"] is None else case["stock"]["stages"]
    heads = ["", "seconds", "quartiles", *([] if stock is None else ["stock", "quartiles"])]
    rows = []
    for name, title in STAGES.items():
        if name in case["stages"]:
            theirs = [] if stock is None else _spread(stock[name], _seconds) if name in stock else ["", ""]
            rows.append([title, *_spread(case["stages"][name], _seconds), *theirs])
    return [heads, *rows]


def _ratio_rows(case: Row) -> list[list[str]]:
    rows = [
        [name, *_spread(case["ratios"][name], lambda ratio: f"{ratio:.2f}"), meaning]
        for name, meaning in RATIOS.items()
        if name in case["ratios"]
    ]
    return [["", "ratio", "quartiles", "of what"], *rows]


def _crowd_rows(case: Row) -> list[list[str]]:
    rows = [
        [
            f"{row['at_once']}",
            f"{row['pictures_a_minute']:.1f}",
            f"{row['gain']:.2f}",
            _seconds(row["answer_seconds"]["median"]),
        ]
        for row in case["at_once"]
    ]
    return [["at once", "pictures a minute", "of one at a time", "answer, seconds"], *rows]


def _case_facts(case: Row) -> Iterator[str]:
    work, memory, limit = case["work"], case["memory"], case["limit"]
    yield (
        f"work: {_count(work['denoise_flops'])} to denoise, {_count(work['encode_flops'])} to encode, "
        f"{_count(work['decode_flops'])} to decode"
    )
    if limit is not None:
        yield (
            f"limit: {_seconds(limit['denoise_seconds'])} s at this machine's {limit['dtype']} rate; "
            f"{limit['share_reached']:.0%} of it reached"
        )
    if memory["peak_allocated_bytes"] is not None:
        yield (
            f"peak on the device: {memory['peak_allocated_bytes'] / GIB:.2f} GiB allocated, "
            f"{memory['peak_reserved_bytes'] / GIB:.2f} GiB reserved"
        )
    if case["accelerated_by"]:
        yield "accelerated by " + ", ".join(lever_named(name).title for name in case["accelerated_by"])
    yield f"peak of the process: {memory['peak_host_bytes'] / GIB:.2f} GiB, loading included"
    if case["stock"] is not None:
        pictures = case["stock"]["pictures"]
        worst = pictures["largest_difference"]
        yield f"{pictures['compared']} pictures beside stock diffusers': " + (
            "equal in every pixel"
            if not worst
            else f"at most {worst} of 255 levels apart, {pictures['mean_difference']:.3f} in the mean"
        )


def _spread(spread: Row, shown: Any) -> list[str]:
    return [shown(spread["median"]), f"{shown(spread['lower_quartile'])}-{shown(spread['upper_quartile'])}"]


def _columns(rows: Sequence[Sequence[str]], sides: Sequence[str]) -> Iterator[str]:
    """Rows under each other; `sides` are those of the columns after the first, the last for all the rest."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}"]
        for place, cell in enumerate(row[1:]):
            side = sides[min(place, len(sides) - 1)]
            cells.append(f"{cell:{side}{widths[place + 1]}}")
        yield ("  " + "  ".join(cells)).rstrip()


def _table(heads: Sequence[str], *rows: Iterable[str]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "| " + " | ".join(["---"] * len(heads)) + " |"
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def _size(case: Row) -> str:
    return f"{case['width_px']}x{case['height_px']}"


def _seconds(seconds: float) -> str:
    """As many digits as say something."""
    digits = next((digits for least, digits in ((100, 1), (10, 2), (0.1, 3)) if seconds >= least), 4)
    return f"{seconds:.{digits}f}"


def _rate(flops_per_second: float) -> str:
    return _count(flops_per_second) + "/s"


_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


def _count(flops: float) -> str:
    size, unit = next((each for each in _UNITS if flops >= each[0]), _UNITS[-1])
    return f"{flops / size:.3g} {unit}"


def plot(report: Row, path: Path) -> Path | None:
    """Seconds by stage, ours beside stock, and pictures a minute; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    cases = report["cases"]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    bars = [(f"{_size(case)}\nours", case["stages"]) for case in cases]
    bars += [(f"{_size(case)}\nstock", case["stock"]["stages"]) for case in cases if case["stock"]]
    bars.sort(key=lambda bar: [_size(case) for case in cases].index(bar[0].partition("\n")[0]))
    names = [name for name, _ in bars]
    below = [0.0] * len(bars)
    for stage in ("encode", "denoise", "decode", "pack"):
        heights = [stages[stage]["median"] if stage in stages else 0.0 for _, stages in bars]
        left.bar(names, heights, bottom=below, label=STAGES[stage])
        below = [sum(pair) for pair in zip(below, heights, strict=True)]
    left.set_ylabel("seconds, medians")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    for case in cases:
        rows = case["at_once"]
        right.plot(
            [row["at_once"] for row in rows],
            [row["pictures_a_minute"] for row in rows],
            marker="o",
            label=_size(case),
        )
    right.set_xlabel("requests at once")
    right.set_xticks(report["settings"]["at_once"])
    right.set_ylabel("pictures a minute")
    right.set_ylim(bottom=0)
    right.legend()
    machine = report["machine"]
    name = machine["device_name"] if machine["device_memory_bytes"] else machine["processor"]
    figure.suptitle(f"{report['model']['id']}, {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
