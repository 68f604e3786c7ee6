"""Items of tasks from the Hugging Face hub, converted to this project's schema.

Field names are those of the data sets' cards. Every fetched record passes the same checks as a line of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from data_pipeline.errors import DataError

Record = Mapping[str, Any]


class HubTask(NamedTuple):
    """A task's repository and split, and the conversion of a record, with its number from 0, to the schema."""

    repository: str
    configuration: str | None
    split: str
    convert: Callable[[Record, int], dict[str, Any]]


def _labelled(question: str) -> Callable[[Record, int], dict[str, Any]]:
    """Return a converter for records with labelled choices, whose `answerKey` is the label of the truth."""

    def convert(record: Record, number: int) -> dict[str, Any]:
        choices = record["choices"]
        answer = list(choices["label"]).index(record["answerKey"])
        return {"id": record["id"], "context": record[question], "choices": list(choices["text"]), "answer": answer}

    return convert


def _hellaswag(record: Record, number: int) -> dict[str, Any]:
    context = f"{record['activity_label']}: {record['ctx']}"
    return {"id": str(number), "context": context, "choices": record["endings"], "answer": int(record["label"])}


def _winogrande(record: Record, number: int) -> dict[str, Any]:
    choices = [record["option1"], record["option2"]]
    return {"id": str(number), "context": record["sentence"], "choices": choices, "answer": int(record["answer"]) - 1}


def _mmlu(record: Record, number: int) -> dict[str, Any]:
    same = {name: record[name] for name in ("choices", "answer", "subject")}
    return {"id": str(number), "context": record["question"], **same}


def _boolq(record: Record, number: int) -> dict[str, Any]:
    context = f"{record['passage']}\nQuestion: {record['question']}?"
    return {"id": str(number), "context": context, "choices": ["no", "yes"], "answer": int(record["answer"])}


def _copa(record: Record, number: int) -> dict[str, Any]:
    word = {"cause": "because", "effect": "therefore"}[record["question"]]
    choices = [text[0].lower() + text[1:] for text in (record["choice1"], record["choice2"])]
    context = f"{record['premise'].rstrip('. ')} {word}"
    return {"id": str(record["idx"]), "context": context, "choices": choices, "answer": record["label"]}


def _race(record: Record, number: int) -> dict[str, Any]:
    context = f"{record['article']}\nQuestion: {record['question']}"
    answer = "ABCD".index(record["answer"])
    return {"id": str(number), "context": context, "choices": record["options"], "answer": answer}


def _lambada(record: Record, number: int) -> dict[str, Any]:
    context, _, word = record["text"].rpartition(" ")
    return {"id": str(number), "context": context, "choices": [word], "answer": 0}


def _blimp(record: Record, number: int) -> dict[str, Any]:
    fields = ("sentence_good", "sentence_bad", "UID", "linguistics_term")
    return {**{name: record[name] for name in fields}, "pairID": str(record["pair_id"])}


HUB_TASKS: dict[str, HubTask] = {
    "blimp": HubTask("nyu-mll/blimp", "*", "train", _blimp),
    "hellaswag": HubTask("Rowan/hellaswag", None, "validation", _hellaswag),
    "arc_easy": HubTask("allenai/ai2_arc", "ARC-Easy", "test", _labelled("question")),
    "arc_challenge": HubTask("allenai/ai2_arc", "ARC-Challenge", "test", _labelled("question")),
    "winogrande": HubTask("allenai/winogrande", "winogrande_xl", "validation", _winogrande),
    "mmlu": HubTask("cais/mmlu", "all", "test", _mmlu),
    "boolq": HubTask("google/boolq", None, "validation", _boolq),
    "copa": HubTask("aps/super_glue", "copa", "validation", _copa),
    "openbookqa": HubTask("allenai/openbookqa", "main", "test", _labelled("question_stem")),
    "commonsenseqa": HubTask("tau/commonsense_qa", None, "validation", _labelled("question")),
    "race": HubTask("ehovy/race", "all", "test", _race),
    "lambada": HubTask("EleutherAI/lambada_openai", "default", "test", _lambada),
}


def hub_records(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, record in the schema) for every item.

    Raises DataError where the task is not on the hub, cannot be fetched or has changed.
    """
    if name not in HUB_TASKS:
        raise DataError(f"{name}: not fetched from the hub; expected --tasks-dir DIR, or one of {', '.join(HUB_TASKS)}")
    return fetch_records(name, HUB_TASKS[name])


def fetch_records(name: str, task: HubTask) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of `task`, as `hub_records` does. `name`: how messages call the task."""
    import datasets

    repository, configuration, split, convert = task
    try:
        every = datasets.get_dataset_config_names(repository) if configuration == "*" else [configuration]
        parts = [(part, datasets.load_dataset(repository, part, split=split)) for part in every]
    except Exception as error:  # network, hub and client errors have no common class
        raise DataError(f"{name}: {repository} cannot be fetched ({error}); put its items into a folder and pass it as "
                        "--tasks-dir (docs/evals_reference.md)") from None  # fmt: skip
    for part, records in parts:
        for number, record in enumerate(records):
            place = f"{repository}{f' {part}' if part else ''} {split}[{number}]"
            try:
                yield place, convert(record, number)
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise DataError(f"{place}: its fields have changed since this task was written ({error!r})") from None
