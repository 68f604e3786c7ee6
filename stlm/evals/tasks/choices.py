"""Multiple-choice tasks: prompts, scoring and summaries."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.plurals import number_of
from data_pipeline.storage.atomic import sha256_file
from stlm.errors import StlmError
from stlm.evals.items.hub import hub_records
from stlm.evals.items.reading import (
    BLANK,
    Item,
    Parse,
    blank_item,
    choice_item,
    json_sha256,
    minimal_pair,
    parse_items,
    read_items,
    sample_items,
    target_item,
    task_file,
)
from stlm.evals.likelihood import Likelihood, Row, log_likelihoods, longest_continuation
from stlm.evals.measures import Measures, calibration_error, estimates, measures_of
from stlm.evals.sharding import WHOLE, EvalShard
from stlm.stlm import STLM

QUESTION = "Question: {context}\nAnswer:"
PASSAGE = "{context}\nAnswer:"  # the context ends with the question
PLAIN = "{context}"


@dataclass(frozen=True)
class ChoiceTask:
    """The schema and prompt of a task's items. docs/evals_reference.md lists their sources."""

    parse: Parse = choice_item
    prompt: str = PLAIN  # followed by one space and a choice; not used where a blank is filled
    published: float | None = None  # accuracy of the research line's 50M baseline (arXiv 2405.14159)

    @property
    def takes_shots(self) -> bool:
        return self.parse is not minimal_pair


CHOICE_TASKS: dict[str, ChoiceTask] = {
    "blimp": ChoiceTask(minimal_pair, published=0.78),
    "hellaswag": ChoiceTask(published=0.30),
    "arc_easy": ChoiceTask(prompt=QUESTION, published=0.39),
    "arc_challenge": ChoiceTask(prompt=QUESTION),
    "winogrande": ChoiceTask(blank_item, published=0.50),
    "wsc273": ChoiceTask(blank_item),
    "mmlu": ChoiceTask(prompt=QUESTION, published=0.24),
    "piqa": ChoiceTask(prompt=QUESTION),
    "boolq": ChoiceTask(prompt=PASSAGE),
    "copa": ChoiceTask(),
    "openbookqa": ChoiceTask(),
    "siqa": ChoiceTask(prompt=PASSAGE),
    "commonsenseqa": ChoiceTask(prompt=QUESTION),
    "race": ChoiceTask(prompt=PASSAGE),
    "mctest": ChoiceTask(prompt=PASSAGE),
    "lambada": ChoiceTask(target_item),
}


class ScoredItem(NamedTuple):
    """An item with a model's scores."""

    item: Item
    log_probabilities: tuple[float, ...]  # nats, of each choice (with a blank: of the text after it)
    measures: Measures

    def values(self) -> dict[str, Any]:
        """Return the item's scores for a JSON file."""
        return {
            "id": self.item.id,
            "answer": self.item.answer,
            "log_probabilities": self.log_probabilities,
            **self.measures._asdict(),
            **({} if self.item.passage is None else {"passage": self.item.passage}),
        }


@dataclass(frozen=True)
class LoadedTask:
    """The items of a task, read and checked before any is scored."""

    name: str
    task: ChoiceTask
    items: list[Item]
    shots: list[Item]
    file_sha256: str | None  # None where items are made or fetched
    sampled_from: int | None = None  # number of available items, where only some are scored

    @classmethod
    def fetch(cls, name: str) -> LoadedTask:
        """Fetch the task from the Hugging Face hub, without shots. Raises DataError where that fails."""
        task = CHOICE_TASKS[name]
        return cls(name, task, parse_items(hub_records(name), task.parse, f"{name} on the hub"), [], None)

    @classmethod
    def read(cls, name: str, tasks_dir: str | os.PathLike[str] | None, num_shots: int) -> LoadedTask:
        """Read the items from DIR/NAME.jsonl and the shots from DIR/NAME.shots.jsonl.

        Raises DataError where a file is missing or breaks the schema, StlmError where `num_shots` does not fit.
        """
        task = CHOICE_TASKS[name]
        if num_shots and not task.takes_shots:
            raise no_prompts(name, num_shots)
        path = task_file(tasks_dir, name)
        items = read_items(path, task.parse)
        shots = read_items(task_file(tasks_dir, f"{name}.shots"), task.parse) if num_shots else []
        if len(shots) < num_shots:
            raise StlmError(f"--shots: got {num_shots}, expected at most {len(shots)}, as many as {name}.shots holds")
        if repeated := {shot.context for shot in shots} & {item.context for item in items}:
            raise StlmError(f"{name}.shots: {min(repeated)!r} is scored as well; remove it from one of the two files")
        return cls(name, task, items, shots[:num_shots], sha256_file(path))

    def sampled(self, number: int | None) -> LoadedTask:
        """Return the task with at most `number` of its items."""
        items = sample_items(self.items, number)
        return self if len(items) == len(self.items) else replace(self, items=items, sampled_from=len(self.items))

    def questions(self) -> list[list[Row]]:
        """Return the rows to score: for each item a row for each choice."""
        shots = "".join(f"{_shot(self.task, shot)}\n\n" for shot in self.shots)
        return [rows_of(self.task, item, shots) for item in self.items]

    def score(self, model: STLM, shard: EvalShard = WHOLE) -> tuple[list[ScoredItem], dict[str, Any]]:
        """Return the scored items and their `summary`, with what was scored and how."""
        questions = self.questions()
        if self.task.parse is target_item:
            self._check_targets(model, questions)
        found = log_likelihoods(model, questions, self.name, shard)
        scored = [scored_item(self.task, item, of) for item, of in zip(self.items, found.by_question, strict=True)]
        values = summary(scored)
        values["published_50m"] = self.task.published
        values["shots"] = len(self.shots)
        values["contexts_cut"] = found.num_cut
        if self.sampled_from is not None:
            values["sampled_from"] = self.sampled_from
        values["sha256"] = fingerprint(questions, self.items)
        if self.file_sha256 is not None:
            values["file_sha256"] = self.file_sha256
        return scored, values

    def _check_targets(self, model: STLM, questions: Sequence[Sequence[Row]]) -> None:
        """Raise StlmError where a target is longer than the context: windows do not give `greedy`."""
        context = model.config.context_length
        for item, rows in zip(self.items, questions, strict=True):
            if (length := longest_continuation(model.tokenizer, rows)) > context:
                raise StlmError(
                    f"{item.place or item.id}: its target has {number_of(length, 'id')}, expected at most {context}, "
                    "the model's context length; remove the item"
                )


def no_prompts(name: str, num_shots: int) -> StlmError:
    """Return the error for shots of a task without prompts."""
    return StlmError(
        f"--shots: got {num_shots} for {name}, which has no prompts; leave it out, or evaluate {name} separately"
    )


def rows_of(task: ChoiceTask, item: Item, shots: str = "") -> list[Row]:
    """Return the rows to score for an item: choices after the prompt, the text after a filled blank, or sentences.

    With a blank, choices are compared by the same text, given a context that ends with the choice: "partial" scoring
    (Trinh and Le 2018, arXiv 1806.02847, section 3.1), in which a frequent word has no advantage.
    """
    if task.parse is blank_item:
        before, after = item.context.split(BLANK)
        return [Row(shots + before + choice, after) for choice in item.choices]
    prompt = shots + task.prompt.format(context=item.context)
    return [Row(prompt, f" {choice}" if prompt else choice) for choice in item.choices]


def _shot(task: ChoiceTask, item: Item) -> str:
    return "".join(rows_of(task, item)[item.answer])


def scored_item(task: ChoiceTask, item: Item, found: Sequence[Likelihood]) -> ScoredItem:
    """Return the item scored by the likelihoods of its rows."""
    log_probabilities = tuple(likelihood.log_probability for likelihood in found)
    if task.parse is target_item:
        (target,) = found
        return ScoredItem(
            item, log_probabilities, Measures(target.greedy, target.greedy, math.exp(target.log_probability))
        )
    if task.parse is blank_item:  # the scored text is the same for all choices
        num_bytes = [1] * len(item.choices)
    else:
        num_bytes = [len(choice.encode()) for choice in item.choices]
    return ScoredItem(item, log_probabilities, measures_of(log_probabilities, num_bytes, item.answer))


def summary(scored: Sequence[ScoredItem]) -> dict[str, Any]:
    """Return every measure with its interval, and the accuracy of guessing, for all items and for each group."""
    kinds = sorted({kind for one in scored for kind in one.item.groups})
    groups = {}
    for kind in kinds:
        names = sorted({one.item.groups[kind] for one in scored if kind in one.item.groups})
        groups[kind] = {name: _summarize(one for one in scored if one.item.groups.get(kind) == name) for name in names}
    return {**_summarize(scored), "calibration_error": _choice_calibration(scored), "groups": groups}


def _choice_calibration(scored: Sequence[ScoredItem]) -> float | None:
    """Return the calibration error of the most probable choice's probability; None where there is only one choice."""
    if len(scored[0].item.choices) < 2:
        return None
    log_probabilities = [np.array(one.log_probabilities) for one in scored]
    confidence = [float(1 / np.exp(nats - nats.max()).sum()) for nats in log_probabilities]
    return calibration_error(confidence, [one.measures.accuracy for one in scored])


def _summarize(scored: Iterable[ScoredItem]) -> dict[str, Any]:
    scored = list(scored)
    found = estimates(np.array([one.measures for one in scored]))
    chances = [1 / len(one.item.choices) if len(one.item.choices) > 1 else 0.0 for one in scored]
    return {
        "items": len(scored),
        **{name: estimate._asdict() for name, estimate in zip(Measures._fields, found, strict=True)},
        "chance": sum(chances) / len(chances),
    }


def fingerprint(questions: Sequence[Sequence[Row]], items: Sequence[Item]) -> str:
    """Return the sha256 of what was scored (every context, continuation and truth), whatever the file's compression."""
    return json_sha256([item.id, rows, item.answer] for rows, item in zip(questions, items, strict=True))
