"""Tasks of GLUE (Wang et al. 2018, arXiv 1804.07461), with examples to train on, `train`, and to evaluate on, `dev`.

Lines are {"id": text, "sentence": text, "label": number}, for tasks with two texts {"id", "sentence1", "sentence2",
"label"}.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.storage.atomic import sha256_file
from stlm.config.yaml.build import nearest
from stlm.errors import StlmError
from stlm.evals.items.hub import HubTask, Record, fetch_records
from stlm.evals.items.reading import number_field, parse_items, read_items, required_field, task_file, text_field

PREFIX = "glue_"  # of file names
_HIGHEST = 5.0  # of scores


class Example(NamedTuple):
    """One or two texts with their label: a class or a score."""

    id: str
    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class GlueTask:
    """The schema of a task's lines, and its measures. docs/evals_reference.md lists the sources."""

    measures: tuple[str, ...]  # of `SCORES`; settings are chosen by their mean
    num_texts: int = 1
    classes: int | None = 2  # labels are 0 … classes - 1; None: scores from 0 to 5
    hub_fields: tuple[str, ...] = ("sentence1", "sentence2")  # of the texts, in the hub's repository
    hub_split: str = "validation"

    def parse(self, record: dict[str, Any]) -> Example:
        """Parse the example of a line. Raises DataError where it breaks the schema."""
        names = ("sentence",) if self.num_texts == 1 else ("sentence1", "sentence2")
        id, *texts = (text_field(record, name).strip() for name in ("id", *names))
        if self.classes is None:
            return Example(id, tuple(texts), number_field(record, "label", 0, _HIGHEST))
        label = required_field(record, "label")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < self.classes:
            *others, last = range(self.classes)
            raise DataError(f"label: got {label!r}, expected {', '.join(map(str, others))} or {last}")
        return Example(id, tuple(texts), label)


_ONE = ("sentence",)
GLUE_TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(("matthews",), hub_fields=_ONE),
    "sst2": GlueTask(("accuracy",), hub_fields=_ONE),
    "mrpc": GlueTask(("f1", "accuracy"), 2),
    "qqp": GlueTask(("f1", "accuracy"), 2, hub_fields=("question1", "question2")),
    "stsb": GlueTask(("pearson", "spearman"), 2, None),
    "mnli": GlueTask(("accuracy",), 2, 3, ("premise", "hypothesis"), "validation_matched"),
    "qnli": GlueTask(("accuracy",), 2, hub_fields=("question", "sentence")),
    "rte": GlueTask(("accuracy",), 2),
    "wnli": GlueTask(("accuracy",), 2),
}


@dataclass(frozen=True)
class GlueData:
    """Both parts of a task, read and checked before any training."""

    name: str
    task: GlueTask
    train: list[Example]
    dev: list[Example]
    file_sha256: dict[str, str]  # of the file of each part; empty for fetched data

    def __post_init__(self) -> None:
        if len({one.label for one in self.train}) < 2:
            raise DataError(
                f"{PREFIX}{self.name}.train: every label is {self.train[0].label:g}; expected two "
                "labels or more, or there is nothing to learn"
            )

    @classmethod
    def read(cls, name: str, tasks_dir: str | os.PathLike[str] | None) -> GlueData:
        """Read DIR/glue_NAME.train.jsonl and DIR/glue_NAME.dev.jsonl, compressed or not. Raises DataError where one is
        missing or breaks the schema."""
        task = GLUE_TASKS[name]
        paths = {part: task_file(tasks_dir, f"{PREFIX}{name}.{part}") for part in ("train", "dev")}
        train, dev = (read_items(path, task.parse) for path in paths.values())
        return cls(name, task, train, dev, {part: sha256_file(path) for part, path in paths.items()})

    @classmethod
    def fetch(cls, name: str) -> GlueData:
        """Fetch the task from the Hugging Face hub. Raises DataError where that fails or the data have changed."""
        task = GLUE_TASKS[name]
        parts = []
        for split in ("train", task.hub_split):
            hub_task = HubTask("nyu-mll/glue", name, split, _converter(task))
            parts.append(parse_items(fetch_records(name, hub_task), task.parse, f"{name} on the hub"))
        return cls(name, task, parts[0], parts[1], {})

    @property
    def overlap(self) -> int:
        """The number of examples of dev whose texts are in train as well."""
        learned = {one.texts for one in self.train}
        return sum(one.texts in learned for one in self.dev)


def load_glue(names: str, tasks_dir: str | os.PathLike[str] | None, hub: bool = False) -> list[GlueData]:
    """Load the tasks of a list such as "cola,rte", from a folder or the hub. Raises StlmError where a name is unknown,
    DataError where examples are missing or break their schema."""
    chosen = dict.fromkeys(name.strip().removeprefix(PREFIX) for name in names.split(","))
    if unknown := [name for name in chosen if name not in GLUE_TASKS]:
        hints = [f"{name!r}{f' (nearest: {found[0]})' if (found := nearest(name, GLUE_TASKS)) else ''}"
                 for name in unknown]  # fmt: skip
        raise StlmError(f"--tasks: got {', '.join(hints)}, expected one or more of {', '.join(GLUE_TASKS)}")
    return [GlueData.fetch(name) if hub else GlueData.read(name, tasks_dir) for name in chosen]


def _converter(task: GlueTask) -> Callable[[Record, int], dict[str, Any]]:
    names = ("sentence",) if task.num_texts == 1 else ("sentence1", "sentence2")

    def convert(record: Record, number: int) -> dict[str, Any]:
        texts = {name: record[field] for name, field in zip(names, task.hub_fields, strict=True)}
        return {"id": str(record["idx"]), **texts, "label": record["label"]}

    return convert


def labels_of(examples: Sequence[Example]) -> NDArray[np.float64]:
    """Return all labels, [examples]."""
    return np.array([one.label for one in examples], float)
