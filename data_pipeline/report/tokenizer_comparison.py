"""Comparison of several tokenizers on the same documents, in one table, to choose a vocabulary.

A larger vocabulary makes texts shorter and the embedding larger. Each tokenizer is made as in a preparation, from the
same training documents, and measured on the validation documents. No files remain afterwards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.preparation.encoding import make_tokenizer
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import Preparation
from data_pipeline.preparation.workers import Team, Workers
from data_pipeline.storage.atomic import write_errors_as, writing
from data_pipeline.storage.documents import TRAIN, VALIDATION, Gathered
from data_pipeline.storage.manifest import WORK_DIR
from data_pipeline.tokenizers import parse_spec

_COMPRESSION_BYTES = 16 << 20  # of documents for validation, at most
_SPEED_BYTES = 4 << 20  # of documents for training: enough for a second or so

Documents = list[tuple[NDArray[Any], NDArray[np.int64]]]


@dataclass(frozen=True)
class Measured:
    """A tokenizer and its measurements."""

    spec: str
    vocab_size: int
    bytes_per_id: float  # on the documents for validation, end_of_text counted among the ids
    megabytes_per_second: float  # of UTF-8, 10^6 bytes, encoded by one core


def expand_specs(text: str) -> list[str]:
    """Expand a list of specs: "sentencepiece:1024,2048,byte" → ["sentencepiece:1024", "sentencepiece:2048", "byte"].

    A number alone takes the kind of the preceding spec. Raises DataError for an invalid spec.
    """
    specs: list[str] = []
    for part in text.split(","):
        part = part.strip()
        kind = specs[-1].partition(":")[0] if part.isdigit() and specs else ""
        spec = f"{kind}:{part}" if kind else part
        parse_spec(spec)
        if spec not in specs:
            specs.append(spec)
    return specs


@write_errors_as(DataError)
def compare_tokenizers(
    config: PrepareConfig, specs: Sequence[str], team: Team | None = None
) -> list[Measured | DataError]:
    """Measure tokenizers on the input of `config`; for one that cannot be made, return the error.

    The documents are stored next to the output folder of a preparation until the measurement is done.
    """
    preparation = Preparation(config)
    units = preparation.units()
    parent = config.directory.parent
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".comparing-", dir=parent)
    with folder as name, nullcontext(team) if team else Workers(config.workers) as team:
        work = Path(name, WORK_DIR)
        work.mkdir()
        gathered = preparation.read(units, work, team)
        preparation.split(gathered, work, team)
        for_compression = _documents(gathered, VALIDATION, _COMPRESSION_BYTES)
        for_speed = _documents(gathered, TRAIN, _SPEED_BYTES)
        measured: list[Measured | DataError] = []
        for spec in specs:
            try:
                measured.append(_measure(spec, gathered, for_compression, for_speed))
            except DataError as error:
                measured.append(error)
        return measured


def comparison_table(measured: Sequence[Measured | DataError], widths: Sequence[int]) -> str:
    """Return the results as text. `widths`: of the models for which the embedding's parameters are given."""
    columns = "".join(f"{f'width {width:,}':>14}" for width in widths)
    lines = [
        f"{'':<24}{'vocabulary':>12}{'bytes per id':>14}{'MB/s':>10}{columns}",
        f"{'':<24}{'':>12}{'(validation)':>14}{'':>10}{'(parameters of the embedding, V * width)':>{14 * len(widths)}}",
    ]
    for row in measured:
        if isinstance(row, Measured):
            sizes = "".join(f"{row.vocab_size * width:>14,}" for width in widths)
            numbers = f"{row.vocab_size:>12,}{row.bytes_per_id:>14.3f}{row.megabytes_per_second:>10.1f}"
            lines.append(f"{row.spec:<24}{numbers}{sizes}")
    return "\n".join([*lines, *(f"left out: {row}" for row in measured if isinstance(row, DataError))])


def _measure(spec: str, gathered: list[Gathered], for_compression: Documents, for_speed: Documents) -> Measured:
    tokenizer = make_tokenizer(spec, gathered)
    ids = sum(len(tokenizer.encode_documents(*block)[0]) for block in for_compression)
    start = time.process_time()  # CPU time: other processes may be running
    for block in for_speed:
        tokenizer.encode_documents(*block)[0].copy()  # for bytes, which are ids already, this is only reading
    seconds = time.process_time() - start
    rate = _text_bytes(for_speed) / max(seconds, 1e-9) / 1e6
    return Measured(spec, tokenizer.vocab_size, _text_bytes(for_compression) / ids, rate)


def _documents(gathered: list[Gathered], choice: int, limit: int) -> Documents:
    """Return the first documents of a choice, about `limit` bytes, in blocks for `encode_documents`."""
    found: Documents = []
    left = limit
    for unit in gathered:
        chosen = unit.choice == choice
        lengths = np.where(chosen, unit.index["length"], 0)
        last = int(np.searchsorted(np.cumsum(lengths), left, side="left")) + 1
        if left > 0:
            found += [block for block in unit.documents(0, min(last, len(chosen)), chosen) if len(block[1])]
            left -= int(lengths[:last].sum())
    return found


def _text_bytes(documents: Documents) -> int:
    return sum(int(lengths.sum()) - len(lengths) for _, lengths in documents)
