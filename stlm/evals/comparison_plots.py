"""Plots beside a comparison: the curves of training, and the scores with their intervals. By matplotlib."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.atomic import write_text
from data_pipeline.extras import how_to_install
from stlm.errors import StlmError
from stlm.evals.comparison import Comparison, comparison_text


class Curve(NamedTuple):
    """Training of one run, at each of its logged steps."""

    megabytes: list[float]  # read so far
    minutes: list[float]  # of training steps so far
    bits_per_byte: list[float]


def read_curve(run_dir: Path) -> Curve | None:
    """From metrics.jsonl; None where there is none."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return None
    curve, minutes, before = Curve([], [], []), 0.0, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["split"] != "train":
            continue
        minutes += (record["bytes_seen"] - before) / record["timing"]["bytes_per_second"] / 60
        before = record["bytes_seen"]
        for values, value in zip(curve, (before / 1e6, minutes, record["bits_per_byte"]), strict=True):
            values.append(value)
    return curve


def write_plots(path: Path, comparison: Comparison, curves: Mapping[str, Curve]) -> None:
    """A PNG of all plots, or one page of HTML that needs no other file and has the tables too."""
    if path.suffix not in (".html", ".png"):
        raise StlmError(
            f"--output: got {str(path)!r}, expected a name that ends in .html or .png; {path.stem}.html works"
        )
    figure = _figure(comparison, curves)
    if path.suffix == ".png":
        figure.savefig(path, dpi=150)
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    image = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(comparison_text(comparison))
    write_text(
        path,
        "<!doctype html><meta charset=utf-8><title>Comparison</title>"
        f"<body style='font-family: sans-serif; max-width: 75em; margin: 2em auto'><h1>Comparison</h1>"
        f"<pre>{text}</pre><img style='max-width: 100%' alt='curves and scores' src='data:image/png;base64,{image}'>\n",
    )


def _figure(comparison: Comparison, curves: Mapping[str, Curve]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise StlmError(f"plots need matplotlib ({error}): {how_to_install('matplotlib')}") from error
    number = (2 if curves else 0) + len(comparison.samples)
    figure = Figure(figsize=(4.2 * number, 3.6), layout="constrained")
    axes = list(figure.subplots(1, number, squeeze=False)[0])
    if curves:
        over_bytes, over_time = axes.pop(0), axes.pop(0)
        for name, curve in curves.items():
            over_bytes.plot(curve.megabytes, curve.bits_per_byte, label=_short(name))
            over_time.plot(curve.minutes, curve.bits_per_byte, label=_short(name))
        over_bytes.set(xlabel="MB read", ylabel="bits per byte in training")
        over_time.set(xlabel="minutes of steps")
        over_bytes.legend(frameon=False)
    for task, plot in zip(comparison.samples, axes, strict=True):
        for place, (name, sample) in enumerate(comparison.samples[task].items()):
            value, low, high = sample.estimate()
            spread = [[value - (value if low is None else low)], [(value if high is None else high) - value]]
            plot.errorbar([place], [value], yerr=spread, fmt="*" if comparison.best(task) == name else "o", capsize=3)
        names = [_short(name) for name in comparison.samples[task]]
        plot.set_xticks(range(len(names)), names, rotation=20)
        plot.set(title=task, ylabel=next(iter(comparison.samples[task].values())).measure)
        plot.margins(x=0.3)
    return figure


def _short(name: str) -> str:
    """The end of a long path, which tells runs apart and leaves room for the plot."""
    return name if len(name) <= 24 else f"…{name[-23:]}"
