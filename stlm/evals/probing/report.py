"""Results of probing as a table over tasks, for terminals and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stlm.evals.report import markdown_list, markdown_table, percent, percents, table

_HEADER = ["task", "train", "dev", "measure", "x 100", "±", "95 %", "majority"]

NOTES = """\
train: training examples of each seed; x 100: mean over seeds, on dev; ±: standard deviation over seeds;
95 %: bootstrap interval over the examples of dev; majority: score of always predicting the commonest label of train
(docs/evals_reference.md)"""


def probe_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return a row for each measure of each task, the header first."""
    rows = [_HEADER]
    for name, values in results.items():
        for measure, found in values["measures"].items():
            train = f"{values['train_examples']:,}"
            if values["train_examples"] < values["train_available"]:
                train += f" of {values['train_available']:,}"
            mean, interval = percents(found)
            numbers = [mean, percent(found["std"]), interval, percent(found["majority"])]
            rows.append([name, train, f"{values['dev_examples']:,}", measure, *numbers])
    return rows


def probe_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table for a terminal."""
    header, *rows = probe_rows(results)
    return table(rows, header, "lrrlrrrr")


def probe_markdown(head: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a page with the table, and the chosen settings of each task."""
    parts = ["# Probing", markdown_list({name: value for name, value in head.items() if value is not None})]
    parts += [markdown_table(probe_rows(results)), NOTES]
    for name, values in results.items():
        plain = {key: value for key, value in values.items() if isinstance(value, str | int | float)}
        columns = list(values["draws"][0])
        rows = [[_cell(draw[column]) for column in columns] for draw in values["draws"]]
        parts += [f"## {name}", markdown_list(plain), markdown_table([columns, *rows])]
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
