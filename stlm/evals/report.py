"""Results as tables in text and Markdown: one over all tasks, and one for each task with groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_HEADER = ["task", "items", "accuracy", "95 %", "per byte", "95 %", "truth", "95 %", "chance", "published 50M"]
_LONGEST_TABLE = 20  # groups; larger tables are in the JSON file only

NOTES = """\
accuracy: the true choice is the most probable one (1/k in a tie of k); per byte: by log-probability per byte;
truth: probability of the true choice among the choices; 95 %: bootstrap interval over items;
published: a 50M model (arXiv 2405.14159), scored by another protocol (docs/evals.md)"""


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), align: str = "") -> str:
    """Format rows as a table with columns as wide as their widest cell. `align`: l or r for each column, l by default.

    Example: `table([["xz", "2.1"], ["gzip", "12.3"]], ["name", "bits"], "lr")`
    """
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    sides = align.ljust(len(widths), "l")
    if header:
        lines.insert(1, ["─" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(line, widths, sides, strict=True)
        ).rstrip()
        for line in lines
    )


def overview_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of the table over all tasks with choices, the header first; only the header if there are none."""
    rows = [[name, *_measures(values), percent(values["published_50m"])]
            for name, values in results.items() if "accuracy" in values]  # fmt: skip
    return [_HEADER, *rows]


def overview_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table over all tasks with choices for a terminal, in percent; empty if there are none."""
    header, *rows = overview_rows(results)
    return f"{table(rows, header, 'l' + 'r' * 9)}\n\n{NOTES}" if rows else ""


def curve_text(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with one line for each checkpoint and the headline number of each task."""
    names = list(evaluations[0]["results"])
    rows = [[f"{one['step']:,}", *(headline(one["results"][name]) for name in names)] for one in evaluations]
    return table(rows, ["step", *names], "r" * (1 + len(names)))


def headline(values: Mapping[str, Any]) -> str:
    """Return a task's main number: accuracy in percent, correlation or mean reciprocal rank times 100, bits per byte,
    calibration error or share of distinct bigrams."""
    for name in ("accuracy", "spearman", "mrr"):
        if name in values:
            return percent(values[name]["value"])
    found = (values[name] for name in ("bits_per_byte", "calibration_error", "distinct_2") if name in values)
    return f"{next(found):.4f}"


def groups_text(name: str, values: Mapping[str, Any]) -> str:
    """Return a table of a task's measures for each kind of group; empty if it has none, or too many for a table."""
    tables = []
    for kind, groups in values["groups"].items():
        if 1 < len(groups) <= _LONGEST_TABLE:
            rows = [[group, *_measures(part)] for group, part in groups.items()]
            tables.append(table(rows, [f"{name}: {kind}", *_HEADER[1:-1]], "l" + "r" * 8))
    return "\n\n".join(tables)


def markdown(subject: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return all results as a page of Markdown."""
    parts = ["# Evaluation", markdown_list({name: value for name, value in subject.items() if value is not None})]
    header, *rows = overview_rows(results)
    if rows:
        parts += [markdown_table([header, *rows]), NOTES]
    for name, values in results.items():
        parts.append(f"## {name}")
        plain = {key: value for key, value in values.items() if isinstance(value, str | int | float)}
        parts.append(markdown_list(plain))
        if "groups" not in values and (rows := _estimated(values)):
            parts.append(markdown_table([["measure", "x 100", "95 %"], *rows]))
        for kind, groups in values.get("groups", {}).items():
            of_groups = [[group, *_measures(part)] for group, part in groups.items()]
            parts.append(markdown_table([[kind, *_HEADER[1:-1]], *of_groups]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _estimated(values: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each value that has an interval."""
    found = {name: value for name, value in values.items() if isinstance(value, Mapping) and "value" in value}
    return [[name, *percents(one)] for name, one in found.items()]


def _measures(values: Mapping[str, Any]) -> list[str]:
    cells = [f"{values['items']:,}"]
    for name in ("accuracy", "accuracy_per_byte", "truth_probability"):
        cells += percents(values[name])
    return [*cells, percent(values["chance"])]


def percent(fraction: float | None) -> str:
    """Return a fraction in percent; empty for None."""
    return "" if fraction is None else f"{100 * fraction:.1f}"


def percents(estimate: Mapping[str, Any]) -> list[str]:
    """Return an estimate and its interval in percent; the interval is empty where there is none."""
    interval = "" if estimate["low"] is None else f"{percent(estimate['low'])} to {percent(estimate['high'])}"
    return [percent(estimate["value"]), interval]


def markdown_list(values: Mapping[str, Any]) -> str:
    """Return a Markdown list with a line for each value."""
    return "\n".join(f"- {name}: {value}" for name, value in values.items())


def markdown_table(rows: list[list[str]]) -> str:
    """Return a Markdown table whose first row is its header."""
    header, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
