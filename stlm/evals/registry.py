"""The tasks of `scripts/evaluate.py --tasks`, by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from data_pipeline.extras import how_to_install
from data_pipeline.plurals import number_of
from data_pipeline.storage.id_stream import IdStream
from stlm.config.yaml.build import nearest
from stlm.errors import StlmError
from stlm.evals.items.reading import Item, minimal_pair, sample_items
from stlm.evals.measures import Estimate
from stlm.evals.probing.glue import GLUE_TASKS, PREFIX
from stlm.evals.report import groups_text, table
from stlm.evals.subject import Subject
from stlm.evals.tasks.bits_per_byte import ScoredDocument, SplitScore, score_split, scored_documents, text_fingerprint
from stlm.evals.tasks.choices import CHOICE_TASKS, ChoiceTask, LoadedTask, ScoredItem, no_prompts
from stlm.evals.tasks.compression import compressed_bits_per_byte
from stlm.evals.tasks.corruptions import NUM_PASSAGES, corruption_items, score_corruptions
from stlm.evals.tasks.embeddings import Measure, load_retrieval, load_similarity
from stlm.evals.tasks.extrapolation import bits_by_position, next_id_calibration
from stlm.evals.tasks.minimal_pairs import minimal_pairs
from stlm.evals.tasks.robustness import measure_robustness
from stlm.evals.tasks.text_quality import measure_text, write_texts
from stlm.stlm import STLM


class Options(NamedTuple):
    """The user's options for tasks."""

    tasks_dir: str | os.PathLike[str] | None = None
    shots: int = 0
    stride: int | None = None
    precision: str = "fp32"
    hub: bool = False  # fetch items from the Hugging Face hub rather than read them from tasks_dir
    reference: str | None = None  # run, checkpoint or model that judges text
    items: int | None = None  # how many items of each task are scored; None: all


@dataclass(frozen=True)
class TaskResult:
    """The result of a task, for people and for machines."""

    text: str  # details that do not fit into one line of the overview
    values: dict[str, Any]  # goes into JSON
    items: Sequence[ScoredItem | ScoredDocument] = field(default=())


Task = Callable[[Subject], TaskResult]

_ROBUST_PAIRS = 340
# Tasks that read prepared data rather than items of their own.
DATA_TASKS = ("bits_per_byte", "corruptions", "robustness", "extrapolation", "calibration", "text_quality")
VECTOR_TASKS = {"similarity": load_similarity, "retrieval": load_retrieval}
TASKS = (*DATA_TASKS, "minimal_pairs", *VECTOR_TASKS, *CHOICE_TASKS)
_ITEM_TASKS = frozenset({*VECTOR_TASKS, *CHOICE_TASKS})
_USED_BY = {  # options that change nothing without one of these tasks
    "tasks_dir": _ITEM_TASKS | {"robustness"},
    "hub": _ITEM_TASKS,
    "stride": frozenset({"bits_per_byte"}),
    "reference": frozenset({"text_quality"}),
}


def load_tasks(names: str, options: Options, key: str = "--tasks") -> dict[str, Task]:
    """Load the tasks of a list such as "bits_per_byte,blimp". `key`: the option or key that holds the list.

    Items are read and checked before any is scored. Raises StlmError where a name is unknown, DataError where items
    are missing or break their schema.
    """
    chosen = dict.fromkeys(name.strip() for name in names.split(","))
    if unknown := [name for name in chosen if name not in TASKS]:
        hints = [f"{name!r}{_hint(name)}" for name in unknown]
        raise StlmError(f"{key}: got {', '.join(hints)}, expected one or more of {', '.join(TASKS)}")
    if options.shots < 0:
        raise StlmError(f"--shots: got {options.shots}, expected 0 or more")
    for option, users in _USED_BY.items():
        if getattr(options, option) not in (None, False) and users.isdisjoint(chosen):
            expected = f"expected one of {', '.join(sorted(users))}, or leave it out"
            setting = f"evals.{option}" if key.startswith("evals.") else f"--{option.replace('_', '-')}"
            raise StlmError(f"{setting}: no effect on {', '.join(chosen)}; {expected}")
    return {name: _at_precision(_load_task(name, options), options.precision) for name in chosen}


def _at_precision(task: Task, precision: str) -> Task:
    """Return the task with matrix products in this precision; nats are summed in fp32 or better in either case."""

    def score(subject: Subject) -> TaskResult:
        with torch.autocast(subject.model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            result = task(subject)
        result.values["precision"] = precision
        return result

    return score


def _hint(name: str) -> str:
    if name.removeprefix(PREFIX) in GLUE_TASKS:
        return " (evaluated by scripts/probe.py)"
    found = nearest(name, TASKS)
    return f" (nearest: {', '.join(found)})" if found else ""


def _load_task(name: str, options: Options) -> Task:
    if options.shots and name not in CHOICE_TASKS:
        raise no_prompts(name, options.shots)
    if name == "bits_per_byte":
        return lambda subject: bits_per_byte(subject, options.stride)
    if name == "corruptions":
        return lambda subject: corruptions(subject, options.items)
    if name == "robustness":
        pairs = LoadedTask.read("blimp", options.tasks_dir, 0).items if options.tasks_dir else minimal_pairs()
        return lambda subject: robustness(subject, pairs, options.items)
    if name == "text_quality":
        return _text_quality(options.reference)
    if name == "extrapolation":
        return lambda subject: TaskResult(*bits_by_position(subject.model, _heldout_stream(subject)))
    if name == "calibration":
        return lambda subject: TaskResult(*next_id_calibration(subject.model, _heldout_stream(subject)))
    if name in VECTOR_TASKS:
        if options.hub:
            raise StlmError(f"{name}: not fetched from the hub; expected --tasks-dir DIR with DIR/{name}.jsonl")
        return _vector_task(VECTOR_TASKS[name](options.tasks_dir, options.items))
    if name == "minimal_pairs":
        loaded = LoadedTask(name, ChoiceTask(minimal_pair), minimal_pairs(), [], None)
    elif options.hub:
        if options.shots:
            raise StlmError(f"--shots: got {options.shots} with --hub, which fetches no shots; put {name}.jsonl and "
                            f"{name}.shots.jsonl into one folder, and pass it as --tasks-dir")  # fmt: skip
        loaded = LoadedTask.fetch(name)
    else:
        loaded = LoadedTask.read(name, options.tasks_dir, options.shots)
    loaded = loaded.sampled(options.items)

    def score(subject: Subject) -> TaskResult:
        items, values = loaded.score(subject.model, subject.shard)
        return TaskResult(groups_text(name, values), values, items)

    return score


def _vector_task(measure: Measure) -> Task:
    return lambda subject: TaskResult(*measure(subject.model))


def _text_quality(reference: str | None) -> Task:
    """Return the task that measures the text a model writes, compared with its training text."""
    try:
        import pydivsufsort  # noqa: F401
        import pyphen  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        install = how_to_install("pydivsufsort", "pyphen", "sacrebleu")
        raise StlmError(f"text_quality: {error}: {install}") from None
    reference_model = STLM.load(reference) if reference else None

    def measure(subject: Subject) -> TaskResult:
        assert subject.data is not None
        trained_on = subject.data.split("train").documents()
        documents = (subject.model.tokenizer.decode(ids) for ids in trained_on)
        return TaskResult(*measure_text(write_texts(subject.model), documents, reference_model))

    return measure


def _heldout_stream(subject: Subject) -> IdStream:
    """Return the split of the subject: validation or test."""
    assert subject.data is not None
    return subject.data.split(subject.split)


def _documents(subject: Subject) -> Iterator[str]:
    return (subject.model.tokenizer.decode(ids) for ids in _heldout_stream(subject).documents())


def robustness(subject: Subject, pairs: Sequence[Item], items: int | None = None) -> TaskResult:
    """Measure the cost of typos and other perturbations, on passages of the validation text and on evenly spaced
    `pairs`; at most `items` of each."""
    chosen = sample_items(pairs[:: max(1, len(pairs) // _ROBUST_PAIRS)], items)
    return TaskResult(
        *measure_robustness(subject.model, _documents(subject), chosen, items or NUM_PASSAGES, subject.shard)
    )


def corruptions(subject: Subject, items: int | None = None) -> TaskResult:
    """Measure how often the true continuation of validation text scores above its corruptions.

    `items`: the largest number of passages; None: all.
    """
    found = corruption_items(_documents(subject))
    chosen = sample_items(found, items)
    pairs, values = score_corruptions(subject.model, chosen, subject.shard)
    if len(chosen) < len(found):
        values["sampled_from"] = len(found)
    return TaskResult(groups_text("corruptions", values), values, pairs)


def bits_per_byte(subject: Subject, stride: int | None) -> TaskResult:
    """Measure the model's bits per byte on the subject's split and each of its sources, next to gzip, bz2 and xz."""
    model, data, documents_apart = subject.model, subject.data, subject.documents_apart
    assert data is not None
    context = model.config.context_length
    if stride is not None and not 1 <= stride <= context:
        raise StlmError(f"the stride: got {stride}, expected 1 to {context} (the model's context length) ids")
    stream = data.split(subject.split)
    score = score_split(
        model, stream, stride=stride, sources=data.sources(subject.split), documents_apart=documents_apart,
        shard=subject.shard,
    )  # fmt: skip
    compressors = compressed_bits_per_byte(stream, data.tokenizer)
    interval = score.interval()

    rows = [["model", f"{score.bits_per_byte:.4f}"]]
    rows += [[name, f"{value:.4f}"] for name, value in sorted(compressors.items(), key=lambda item: item[1])]
    text = table(rows, [f"{subject.split} text", "bits per byte"], "lr")
    text += (
        f"\n\n{number_of(score.bytes, 'byte')} in {number_of(stream.num_documents, 'document')}; "
        f"each of {number_of(score.ids, 'id')} is scored "
        f"once,\nin windows of {number_of(score.context_length, 'id')} that start every {number_of(score.stride, 'id')}"
        + ("; each id is predicted from its own document alone, as in training" if documents_apart else "")
        + f"\n95 % bootstrap interval over documents: {_range(interval)} bits per byte"
    )
    values: dict[str, Any] = {
        "bits_per_byte": score.bits_per_byte,
        "low": interval.low,
        "high": interval.high,
        "nats": score.nats,
        "ids": score.ids,
        "bytes": score.bytes,
        "documents": stream.num_documents,
        "context_length": score.context_length,
        "stride": score.stride,
        "documents_apart": documents_apart,
        "compressors": compressors,
        "sha256": text_fingerprint(stream, data.tokenizer),
    }
    if len(score.sources) > 1:
        part_text, values["sources"] = _source_table(score)
        text += f"\n\n{part_text}"
    return TaskResult(text, values, scored_documents(score))


def _source_table(score: SplitScore) -> tuple[str, dict[str, Any]]:
    rows, values, intervals = [], {}, score.source_intervals()
    for name, part in score.sources.items():
        interval = intervals.get(name, Estimate(part.bits_per_byte, None, None))
        rows.append([name, f"{part.bits_per_byte:.4f}", _range(interval), f"{part.bytes:,}"])
        bounds = {"low": interval.low, "high": interval.high}
        values[name] = {"bits_per_byte": part.bits_per_byte, **bounds, **part._asdict()}
    return table(rows, ["source", "bits per byte", "95 %", "bytes"], "lrrr"), values


def _range(interval: Estimate) -> str:
    if interval.low is None or interval.high is None:
        return "unknown (one document)"
    return f"{interval.low:.4f} to {interval.high:.4f}"
