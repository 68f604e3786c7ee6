"""Run tasks on a model, or on several checkpoints of a run, and write the results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.storage.atomic import write_text
from stlm.evals.registry import DATA_TASKS, Task
from stlm.evals.report import markdown, overview_text
from stlm.evals.subject import Subject


@dataclass
class Evaluation:
    """Results of each model, in order, and of each scored item."""

    models: list[dict[str, Any]] = field(default_factory=list)  # values of a Subject, and "results" by task
    items: list[dict[str, Any]] = field(default_factory=list)  # with task and step


def evaluate(
    models: Iterable[str | os.PathLike[str]], tasks: Mapping[str, Task], log: Callable[[str], None], *,
    data: str | None = None, split: str = "validation",
) -> Evaluation:  # fmt: skip
    """Run `tasks` on each model and return all results; `log` takes texts for people, those of each task as it ends.

    `data`: a folder of prepared data; None: that of each model's run. `split`: validation or test.
    """
    found = Evaluation()
    for path in models:
        subject = Subject.open(path, data, not tasks.keys().isdisjoint(DATA_TASKS), split)
        log(f"\n{subject}" if found.models else str(subject))
        results = {}
        for name, task in tasks.items():
            result = task(subject)
            results[name] = result.values
            about = {"task": name, "step": subject.progress.get("step")}
            found.items += [{**about, **item.values()} for item in result.items]
            if result.text:
                log(f"\n{result.text}")
        if overview := overview_text(results):
            log(f"\n{overview}")
        found.models.append({**subject.values(), "results": results})
    return found


def write_results(found: Evaluation, output: str | None, items: str | None, several: bool) -> None:
    """Write results to `output`, FILE.json or FILE.md, and items to `items`, FILE.jsonl; None: not.

    `several`: in JSON, write a list of checkpoints, also if there is one.
    """
    if output and output.endswith(".md"):
        pages = [markdown({key: one[key] for key in one if key != "results"}, one["results"]) for one in found.models]
        write_text(output, "\n".join(pages))
    elif output:
        written: dict[str, Any] = {"checkpoints": found.models} if several else dict(found.models[0])
        if items:
            written["items_file"] = os.path.relpath(items, Path(output).parent)
        write_text(output, json.dumps(written, indent=2) + "\n")
    if items:
        write_text(items, "".join(json.dumps(item) + "\n" for item in found.items))
