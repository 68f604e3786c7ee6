"""What `scripts/evaluate.py --tasks` can do, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from data_pipeline.loading import Data
from stlm.errors import StlmError
from stlm.evals.bits_per_byte import score_split
from stlm.evals.compression import compressed_bits_per_byte
from stlm.evals.table import table
from stlm.stlm import STLM


class TaskResult(NamedTuple):
    """What a task found, for people and for machines."""

    text: str
    values: dict[str, Any]  # goes into JSON


def bits_per_byte(model: STLM, data: Data, stride: int | None, documents_apart: bool = False) -> TaskResult:
    """The model's bits per byte on the validation split and each source of it, beside those of gzip, bz2 and xz."""
    context = model.config.context_length
    if stride is not None and not 1 <= stride <= context:
        raise StlmError(f"the stride: got {stride}, expected 1 to {context} (the model's context length) ids")
    stream = data.split("validation")
    score = score_split(
        model, stream, stride=stride, sources=data.sources("validation"), documents_apart=documents_apart
    )
    compressors = compressed_bits_per_byte(stream, data.tokenizer)

    rows = [["model", f"{score.bits_per_byte:.4f}"]]
    rows += [[name, f"{value:.4f}"] for name, value in sorted(compressors.items(), key=lambda item: item[1])]
    text = table(rows, ["validation text", "bits per byte"], "lr")
    text += (
        f"\n\n{score.bytes:,} bytes in {stream.num_documents:,} documents; every one of {score.ids:,} ids is scored "
        f"once\nin windows of {score.context_length} ids, one every {score.stride}"
        + (", each predicted from its own document alone, as in training" if documents_apart else "")
    )
    values: dict[str, Any] = {
        "bits_per_byte": score.bits_per_byte,
        "nats": score.nats,
        "ids": score.ids,
        "bytes": score.bytes,
        "documents": stream.num_documents,
        "context_length": score.context_length,
        "stride": score.stride,
        "documents_apart": documents_apart,
        "compressors": compressors,
    }
    if len(score.sources) > 1:
        parts = [[name, f"{part.bits_per_byte:.4f}", f"{part.bytes:,}"] for name, part in score.sources.items()]
        text += "\n\n" + table(parts, ["source", "bits per byte", "bytes"], "lrr")
        values["sources"] = {
            name: {"bits_per_byte": part.bits_per_byte, **part._asdict()} for name, part in score.sources.items()
        }
    return TaskResult(text, values)


Task = Callable[[STLM, Data, int | None, bool], TaskResult]

TASKS: dict[str, Task] = {"bits_per_byte": bits_per_byte}


def select_tasks(names: str) -> dict[str, Task]:
    """The tasks of a list such as "bits_per_byte,…". StlmError where one is unknown."""
    unknown = [name for name in names.split(",") if name not in TASKS]
    if unknown:
        raise StlmError(f"--tasks: got {', '.join(map(repr, unknown))}, expected one or more of {', '.join(TASKS)}")
    return {name: TASKS[name] for name in names.split(",")}
