"""Results of probing as a table over tasks, for terminals and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stlm.evals.report import markdown_list, markdown_table, table

_HEADER = ["task", "train", "dev", "measure", "x 100", "±", "95 %", "majority"]

NOTES = """\
train: examples that each seed learns from; x 100: on dev, the mean over seeds; ±: the standard deviation over seeds;
95 %: bootstrap over the examples of dev; majority: the commonest label of train for every example (docs/evals.md)"""


def probe_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return a row for each measure of each task, the header first."""
    rows = [_HEADER]
    for name, values in results.items():
        for measure, found in values["measures"].items():
            train = f"{values['train_examples']:,}"
            if values["train_examples"] < values["train_available"]:
                train += f" of {values['train_available']:,}"
            spread = "" if found["std"] is None else _times_100(found["std"])
            bounds = "" if found["low"] is None else f"{_times_100(found['low'])} to {_times_100(found['high'])}"
            numbers = [_times_100(found["value"]), spread, bounds, _times_100(found["majority"])]
            rows.append([name, train, f"{values['dev_examples']:,}", measure, *numbers])
    return rows


def probe_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table for a terminal."""
    header, *rows = probe_rows(results)
    return table(rows, header, "lrrlrrrr")


def probe_markdown(head: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a page with the table, and the chosen settings of each task."""
    parts = ["# Learning on top", markdown_list({name: value for name, value in head.items() if value is not None})]
    parts += [markdown_table(probe_rows(results)), NOTES]
    for name, values in results.items():
        plain = {key: value for key, value in values.items() if isinstance(value, str | int | float)}
        columns = list(values["draws"][0])
        rows = [[_cell(draw[column]) for column in columns] for draw in values["draws"]]
        parts += [f"## {name}", markdown_list(plain), markdown_table([columns, *rows])]
    return "\n\n".join(parts) + "\n"


def _times_100(share: float) -> str:
    return f"{100 * share:.1f}"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
