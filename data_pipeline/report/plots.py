"""Histograms as inline SVG: no separate file, no script, colours from the page's style sheet.

They are drawn with matplotlib, which is imported when a plot is made.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.extras import how_to_install

# Placeholder colours, replaced by the page's variables so that the page chooses dark or light.
_COLOURS = {"#010101": "var(--ink)", "#020202": "var(--grid)"} | {
    f"#0303{number:02}": f"var(--series-{number})" for number in range(1, 7)
}
_INK, _GRID = "#010101", "#020202"
_SIZE = (4.4, 2.6)  # inches

BYTE_CLASSES = ("letters", "digits", "white space", "punctuation", "control", "beyond ASCII")


class PlotsMissing(DataError):
    """Error for a missing plotting library."""


def length_plot(lengths: dict[str, list[int]]) -> str:
    """Plot histograms of documents over their length in bytes, in powers of two. lengths: counts by name of split."""
    figure, axes = _figure("bytes in a document", "share of documents")
    last = max((len(counts) for counts in lengths.values()), default=0)
    first = min((next((i for i, count in enumerate(counts) if count), last) for counts in lengths.values()), default=0)
    places = np.arange(first, max(last, first + 1))
    width = 0.8 / len(lengths)
    for number, (name, counts) in enumerate(lengths.items()):
        values = np.pad(np.array(counts, dtype=np.float64), (0, last - len(counts)))[first:]
        offset = (number - (len(lengths) - 1) / 2) * width
        colour = f"#0303{number + 1:02}"
        axes.bar(places[: len(values)] + offset, 100 * values / max(values.sum(), 1), width, color=colour, label=name)
    axes.set_xticks(places, [_power(place) for place in places.tolist()], rotation=0 if len(places) < 12 else 45)
    return _svg(figure, axes, "lengths")


def byte_plot(counts: Sequence[int]) -> str:
    """Plot the frequency of each of the 256 byte values on a logarithmic scale, coloured by class."""
    figure, axes = _figure("value of the byte", "share of bytes")
    classes = np.array([_class_of(byte) for byte in range(256)])
    shares = 100 * np.array(counts) / max(sum(counts), 1)
    for number, name in enumerate(BYTE_CLASSES):
        mine = (classes == number) & (shares > 0)
        if mine.any():
            axes.bar(np.flatnonzero(mine), shares[mine], 1.0, color=f"#0303{number + 1:02}", label=name)
    axes.set_yscale("log")
    axes.set_xlim(-1, 256)
    axes.set_xticks([0, 32, 64, 96, 128, 160, 192, 224, 255])
    return _svg(figure, axes, "bytes")


def _class_of(byte: int) -> int:
    character = chr(byte)
    if byte >= 0x80:
        return 5
    if character.isalpha():
        return 0
    if character.isdigit():
        return 1
    if character in " \t\n\r":
        return 2
    return 3 if 0x20 < byte < 0x7F else 4


def _power(exponent: int) -> str:
    return f"{2 ** (exponent % 10)}{('', 'Ki', 'Mi', 'Gi')[exponent // 10]}"


def _figure(x: str, y: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsMissing(f"plots need matplotlib: {how_to_install('matplotlib')}") from error
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x, color=_INK, fontsize=9)
    axes.set_ylabel(y, color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    return figure, axes


def _svg(figure: Any, axes: Any, name: str) -> str:
    """Return the figure as an <svg> element; the same numbers give the same text."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8, labelcolor=_INK, handlelength=1
    )
    legend.set_in_layout(True)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'font: ([\d.]+px)[^;"]*', r"font: \1 var(--font)", text)
    for drawn, variable in _COLOURS.items():
        text = text.replace(drawn, variable)
    return text
