"""A preview of a preparation: its inputs, how they are read, and the estimated time, from a trial of each source.

Nothing is written to the output. One process reads, cleans and encodes the first megabytes of each source in a
temporary folder. The total time is estimated from their speed, the sizes of the inputs, and the number of processes.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.plurals import number_of
from data_pipeline.preparation.gathering import gather
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import Preparation
from data_pipeline.preparation.workers import processes_for
from data_pipeline.sources.files import Files
from data_pipeline.sources.limit import Limit
from data_pipeline.sources.plain_text import describe
from data_pipeline.sources.problems import Problems, lines_of_problems
from data_pipeline.sources.source import Source, Unit
from data_pipeline.storage.documents import CHOICES, Gathered
from data_pipeline.storage.manifest import WORK_DIR, is_being_prepared
from data_pipeline.tokenizers import build_tokenizer, find_tokenizer, parse_spec

_TRIED = Limit(bytes=2 << 20)  # of each source
_SOURCES = 20  # of many, only the first are tried and listed
# Bytes per second that a tokenizer not yet trained will encode, and the time to train it: docs/data.md.
_UNTRAINED = {"sentencepiece": 25e6, "sentencepiece-bpe": 4.6e6}
_TRAINING_S = 30.0
_USUAL = 50e6  # bytes per second, if nothing could be tried
_COMPRESSION = 3.0  # bytes of text per byte of a compressed file


@dataclass(frozen=True)
class _Trial:
    """The result of reading the beginning of a source."""

    documents: int
    size: int  # bytes of text
    seconds: float  # of reading, cleaning and encoding
    share: float | None  # bytes of text per byte of input; None if the trial read only part of its unit
    sentences: list[str]
    problems: Problems  # met in reading


def dry_run(config: PrepareConfig) -> str:
    """Return the preview as text. Raises DataError for whatever would stop the preparation at once."""
    preparation = Preparation(config)
    sources, roles = preparation.sources, preparation.roles
    left = Limit.parse(config.limit) if config.limit is not None else Limit()
    lines = [f"nothing is written; {_state(preparation)}", ""]
    sizes, rates = [], []  # bytes of text of all sources; seconds per byte of those tried
    for number, source in enumerate(sources):
        units = source.units(number)
        trial = _try(config, units) if number < _SOURCES else None
        share = trial.share if trial is not None and trial.share is not None else _expansion(source)
        size = sum(unit.size for unit in units) * share
        mean = trial.size / trial.documents if trial is not None and trial.documents else max(size, 1)
        if roles[number] is None:
            if left.bytes is not None:
                size = min(size, max(left.bytes, 0))
            if left.documents is not None:
                size = min(size, max(left.documents, 0) * mean)
            left = left.without(round(size / mean), round(size))
        sizes.append(size)
        if trial is None:
            continue
        rates.append(trial.seconds / trial.size if trial.size else 1 / _USUAL)
        split = next((f"for {name}: " for name, role in CHOICES.items() if role == roles[number]), "")
        lines.append(f"{split}{source.name}: {_what(source, size, len(units))}")
        problems = Problems()
        problems.add(source.problems)
        problems.add(trial.problems)
        lines += [f"  {sentence}" for sentence in trial.sentences]
        lines += lines_of_problems(problems.counts, problems.left_out)
        lines += [f"    {example}" for example in trial.problems.examples]
        if trial.documents:
            about = number_of(round(max(size / mean, 1)), "document")
            lines.append(f"  about {about}, of {mean:,.0f} bytes on average")
    if len(sources) > _SOURCES:
        lines.append(f"and {number_of(len(sources) - _SOURCES, 'more source')}")
    rates += [sum(rates) / len(rates)] * (len(sizes) - len(rates))
    seconds = sum(size * rate for size, rate in zip(sizes, rates, strict=True))
    lines += ["", *_settings(config), _time(config, sum(sizes), seconds)]
    return "\n".join(lines)


def _settings(config: PrepareConfig) -> list[str]:
    trained = " (to be trained on a part of the text)" if _is_trained(config) else ""
    by_hash = f"{config.validation_fraction:.3g} of the text, by hash"
    return [
        f"tokenizer: {config.tokenizer}{trained}",
        *([f"cleaning: {', '.join(config.cleaning.steps)}"] if config.cleaning.steps else []),
        f"held back for validation: {'the files of --validation' if config.validation else by_hash}",
        *([f"no more than {config.limit} is read (--limit)"] if config.limit is not None else []),
    ]


def _time(config: PrepareConfig, size: float, seconds: float) -> str:
    workers = processes_for(config.workers, int(size))
    if _is_trained(config):
        seconds += size / _UNTRAINED[parse_spec(config.tokenizer)[0]]
    seconds = seconds / workers + _TRAINING_S * _is_trained(config)
    return f"about {_bytes(size)} of text in {_duration(seconds)}, with {number_of(workers, 'process', 'processes')}"


def _is_trained(config: PrepareConfig) -> bool:
    return config.tokenizer_from is None and parse_spec(config.tokenizer)[0] in _UNTRAINED


def _state(preparation: Preparation) -> str:
    config, directory = preparation.config, preparation.output
    try:
        if preparation.existing() is not None:
            return f"{directory} is already prepared"
    except DataError as error:
        return str(error)
    if is_being_prepared(directory):
        return f"{directory} is being prepared by another process"
    if (directory / WORK_DIR).exists():
        return f"{directory} holds an interrupted preparation"
    added = config.tokenizer_from is not None and directory.parent == Path(config.tokenizer_from)
    return f"it would be added to {directory.parent}" if added else f"the output would be {directory}"


def _what(source: Source, size: float, units: int) -> str:
    parts = [f"about {_bytes(size)} of text", number_of(units, "piece of work", "pieces of work")]
    if isinstance(source, Files):
        parts.insert(0, f"{number_of(len(source.contents()), 'file')} ({', '.join(sorted(source.kinds))})")
    else:
        parts.insert(0, source.kind)
    return ", ".join(parts)


def _expansion(source: Source) -> float:
    """Return the bytes of text per byte of input."""
    files = source.contents()
    compressed = sum(size for path, size in files if source.kind_of(path).endswith((".gz", ".xz", ".zst", ".bz2")))
    return 1 + (_COMPRESSION - 1) * compressed / max(sum(size for _, size in files), 1)


def _try(config: PrepareConfig, units: Sequence[Unit]) -> _Trial:
    tokenizer = None
    if config.tokenizer_from is not None:
        tokenizer = find_tokenizer(config.tokenizer_from)
    elif not _is_trained(config):
        tokenizer = build_tokenizer(config.tokenizer)
    if not units:
        return _Trial(0, 0, 0.0, None, ["nothing in it can be read"], Problems())
    with tempfile.TemporaryDirectory() as folder:
        place = Gathered(Path(folder, "unit"))
        start = time.process_time()
        gather(units[0], place, config.cleaning, limit=_TRIED)
        chosen = np.ones(len(place.index), np.bool_)
        for stored, lengths in place.documents(0, len(chosen), chosen):
            if tokenizer is not None and not config.conversations and not config.keep_ids:
                tokenizer.encode_documents(stored, lengths)
        seconds = time.process_time() - start
        counts = place.counts
        reading = getattr(units[0], "reading", None)
        division = getattr(reading, "division", None)
        sentences = describe(division, Counter(counts["division"])) if division and counts["division"] else []
    where = "in the part that was tried: " if counts["full"] or len(units) > 1 else ""
    share = None if counts["full"] or not units[0].size else counts["bytes"] / units[0].size
    return _Trial(
        counts["documents"],
        counts["bytes"],
        seconds,
        share,
        [f"{where}{sentence}" for sentence in sentences],
        Problems(Counter(counts["problems"]), examples=counts["examples"], left_out=counts["left_out"]),
    )


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
