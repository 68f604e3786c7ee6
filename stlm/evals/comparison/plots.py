"""Figures of a comparison for papers, by matplotlib: one panel each, as SVG and PDF, or together on an HTML page."""

from __future__ import annotations

import html
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.extras import how_to_install
from data_pipeline.storage.atomic import atomic_file, write_errors_as, write_text
from stlm.errors import StlmError
from stlm.evals.comparison.paired import Comparison, comparison_text

# Okabe and Ito's colours, distinguishable with colour blindness, and line styles, distinguishable in black print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LINES = ("-", "--", "-.", ":")
_STYLE = {
    "font.size": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "lines.linewidth": 1.2,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.frameon": False,
    "pdf.fonttype": 42, "svg.hashsalt": "stlm",  # text as text; the same file for the same numbers
}  # fmt: skip
_WIDTH, _HEIGHT = 3.4, 2.4  # inches: one column of a paper


class Curve(NamedTuple):
    """One run's bits per byte in training or on the validation text, at each step where they were logged."""

    megabytes: list[float]  # read so far
    minutes: list[float]  # of training steps so far
    bits_per_byte: list[float]


class Figure(NamedTuple):
    """A figure with its caption."""

    drawn: Any  # matplotlib's Figure
    caption: str


def read_curve(run_dir: Path, split: str = "train") -> Curve | None:
    """Read the curve of a split ("train" or "validation") from metrics.jsonl; None where there is none."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return None
    steps, trained, minutes, before = [0.0], Curve([0.0], [0.0], [0.0]), 0.0, 0
    logged: list[tuple[float, float]] = []  # step and bits per byte
    text, _, _ = path.read_text(encoding="utf-8").rpartition("\n")  # a last line without its end is being written
    for line in text.splitlines():
        record = json.loads(line)
        if record["split"] == "train":
            minutes += (record["bytes_seen"] - before) / record["timing"]["bytes_per_second"] / 60
            before = record["bytes_seen"]
            steps.append(record.get("step", len(steps)))
            for values, value in zip(trained, (before / 1e6, minutes, record["bits_per_byte"]), strict=True):
                values.append(value)
        elif record["split"] == split and "bits_per_byte" in record:
            logged.append((record.get("step", steps[-1]), record["bits_per_byte"]))
    if split == "train":
        curve = Curve(trained.megabytes[1:], trained.minutes[1:], trained.bits_per_byte[1:])
    else:
        at = [step for step, _ in logged]
        read, spent = (np.interp(at, steps, values).tolist() for values in (trained.megabytes, trained.minutes))
        curve = Curve(read, spent, [value for _, value in logged])
    return curve if curve.bits_per_byte else None


@write_errors_as(StlmError)
def write_page(path: Path, comparison: Comparison, runs: Mapping[str, Path]) -> None:
    """Write a self-contained HTML page: tables, figures, and the settings of the runs.

    `runs`: the run folder of each model that belongs to a run.
    """
    title = next(iter(comparison.groups)) if len(comparison.groups) == 1 else "Comparison"
    parts = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(comparison_text(comparison))}</pre>"]
    for figure in figures(comparison, runs).values():
        parts.append(f"<figure>{_svg(figure)}<figcaption>{html.escape(figure.caption)}</figcaption></figure>")
    for name, folder in runs.items():
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        parts.append(
            f"<details><summary>Settings of {html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>"
        )
    style = (
        "body{font-family:sans-serif;max-width:75em;margin:2em auto;padding:0 1em}pre{overflow-x:auto}"
        "figure{display:inline-block;margin:1em;width:26em;vertical-align:top}figure svg{width:100%;height:auto}"
        "figcaption{font-size:85%;color:#444}"
    )
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>"
    write_text(path, head + "\n".join(parts) + "\n")


@write_errors_as(StlmError)
def write_figures(folder: Path, comparison: Comparison, runs: Mapping[str, Path]) -> list[Path]:
    """Write each figure as NAME.svg and NAME.pdf, and return the files."""
    files = []
    for name, figure in figures(comparison, runs).items():
        for kind, without in (("svg", "Date"), ("pdf", "CreationDate")):
            path = folder / f"{name}.{kind}"
            with atomic_file(path) as file, _style():
                figure.drawn.savefig(file, format=kind, metadata={without: None}, bbox_inches="tight")
            files.append(path)
    return files


def figures(comparison: Comparison, runs: Mapping[str, Path]) -> dict[str, Figure]:
    """Return the figures for which there are numbers, by file name."""
    found, labels = {}, _labels(list(comparison.groups))
    for split, label in (("validation", "validation bits per byte"), ("train", "training bits per byte")):
        curves = {
            labels[group]: [curve for model in models if model in runs and (curve := read_curve(runs[model], split))]
            for group, models in comparison.groups.items()
        }
        for place, (by, unit) in enumerate((("data", "MB of text read"), ("time", "minutes of training steps"))):
            if any(curves.values()):
                caption = f"{label[0].upper()}{label[1:]} over {unit}{_seeds_note(comparison)}."
                found[f"{split}_by_{by}"] = Figure(_curves(curves, place, unit, label), caption)
    for task in comparison.samples:
        found[f"score_{re.sub(r'[^A-Za-z0-9_.-]+', '_', task)}"] = _scores(comparison, task, labels)
    return found


def _seeds_note(comparison: Comparison) -> str:
    several = any(len(models) > 1 for models in comparison.groups.values())
    note = ": mean over seeds ± one standard deviation; one line for each seed where their ranges do not overlap"
    return note if several else ""


def _curves(curves: Mapping[str, Sequence[Curve]], place: int, unit: str, label: str) -> Any:
    with _style():
        figure, axes = _panel(_HEIGHT)
        for number, (name, of_seeds) in enumerate(curves.items()):
            if not of_seeds:
                continue
            look = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number % len(_LINES)]}
            x, mean, sd = _mean(of_seeds, place)
            if not len(x):  # one ended before another began, as runs on a busy machine may: each is its own line
                for seed, curve in enumerate(of_seeds):
                    axes.plot(curve[place], curve.bits_per_byte, label=None if seed else name, marker=".", **look)
                continue
            axes.plot(x, mean, label=name, marker="o" if len(x) < 2 else None, markersize=3, **look)
            if len(of_seeds) > 1:
                axes.fill_between(x, mean - sd, mean + sd, color=look["color"], alpha=0.2, linewidth=0)
        axes.set(xlabel=unit, ylabel=label)
        axes.set_xlim(left=0)
        if len(curves) > 1:
            axes.legend(handlelength=2.6)
    return figure


def _mean(of_seeds: Sequence[Curve], place: int) -> tuple[Any, Any, Any]:
    """Return x, mean and standard deviation over curves, where all curves are known."""
    xs = [np.asarray(curve[place]) for curve in of_seeds]
    low, high = max(x[0] for x in xs), min(x[-1] for x in xs)
    x = np.unique(np.concatenate(xs))
    x = x[(x >= low) & (x <= high)]
    values = np.stack([np.interp(x, own, curve.bits_per_byte) for own, curve in zip(xs, of_seeds, strict=True)])
    return x, values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(x))


def _scores(comparison: Comparison, task: str, labels: Mapping[str, str]) -> Figure:
    """Draw a row for each group: its runs, and the mean with error bars."""
    best, measure = comparison.best(task), comparison.measure(task).replace("_", " ")
    with _style():
        figure, axes = _panel(0.6 + 0.26 * max(2, len(comparison.groups)))
        for row, name in enumerate(comparison.groups):
            samples, colour = comparison.group_samples(task, name), _COLOURS[row % len(_COLOURS)]
            values = np.array([sample.value for sample in samples])
            estimate = samples[0].estimate()
            below = above = values.std(ddof=1) if len(values) > 1 else 0.0
            if len(values) == 1 and estimate.low is not None and estimate.high is not None:
                below, above = estimate.value - estimate.low, estimate.high - estimate.value
            bounds = [[max(0.0, below)], [max(0.0, above)]]
            axes.errorbar([values.mean()], [row], xerr=bounds, fmt="o", color=colour, markersize=4, capsize=2.5)
            if len(values) > 1:
                axes.plot(values, [row] * len(values), "|", color=colour, markersize=7, alpha=0.6)
        names = [labels[name] + (" *" if name == best else "") for name in comparison.groups]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("bits per byte (lower is better)" if measure == "bits per byte" else f"{task}: {measure}")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.1)
    groups = comparison.groups.values()
    bars = ["mean and standard deviation over seeds, one mark for each seed"] if any(len(m) > 1 for m in groups) else []
    bars += ["95 % interval over items"] if any(len(models) == 1 for models in groups) else []
    starred = "; *: better than all others" if best else ""
    return Figure(figure, f"{task}, {measure}: {'; of single runs, '.join(bars)}{starred}.")


def _panel(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Drawn

    figure = Drawn(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _style() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise StlmError(f"plots need matplotlib ({error}): {how_to_install('matplotlib')}") from error
    return matplotlib.rc_context(_STYLE)


def _svg(figure: Figure) -> str:
    """Return the figure's <svg> element, without the prolog of a file."""
    buffer = io.StringIO()
    with _style():
        figure.drawn.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Return short labels for paths: without their common folder, long ones cut to their ends."""
    folders = [os.path.join(os.path.dirname(name), "") for name in names]
    shared = os.path.dirname(os.path.commonprefix(folders))  # noqa: RUF071 (some may be absolute, others not)
    short = {name: (os.path.relpath(name, shared) if shared else name).removesuffix(".json") for name in names}
    return {name: text if len(text) <= 28 else f"…{text[-27:]}" for name, text in short.items()}
