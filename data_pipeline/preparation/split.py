"""The split of the gathered documents: which of them stay, and which of those are held back for validation.

Exact duplicates are removed first. The rest passes the steps that compare documents with others, and is split last, so
that similar documents never end up on both sides. Documents that the user holds back in separate files all stay;
documents that equal or resemble one of them are removed from the training text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cleaning import decontamination
from data_pipeline.cleaning.documents import NEAR_DUPLICATES, Cleaning
from data_pipeline.cleaning.exact_duplicates import copies_of, drop_duplicates
from data_pipeline.cleaning.near_duplicates import THRESHOLD, Signatures, near_duplicates, sign
from data_pipeline.cleaning.removed import Stage, write_removed
from data_pipeline.cleaning.words import WORD
from data_pipeline.errors import TooFew
from data_pipeline.plurals import number_of
from data_pipeline.preparation.holdout import HeldBack, choose_all, choose_by_hash
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.workers import Team, run_all
from data_pipeline.storage.cleaning_record import EXAMPLES, Record, excerpt
from data_pipeline.storage.documents import TRAIN, VALIDATION, Gathered, starts_of

EXACT_DUPLICATES, DECONTAMINATION = "exact duplicates", "decontamination"
HELD_BACK, ALREADY_THERE = "copies of documents that are held back", "copies of documents that are there already"


@dataclass(frozen=True)
class LeftOut:
    """The documents that all steps together left out."""

    record: Record
    decontamination: dict[str, Any]  # texts searched for, and the list of removed documents; empty if not requested

    @property
    def duplicates(self) -> dict[str, int]:
        """The number and bytes of documents equal to an earlier one."""
        return {
            "documents": self.record.documents[EXACT_DUPLICATES],
            "bytes": self.record.sizes[EXACT_DUPLICATES],
        }


def split_documents(
    gathered: Sequence[Gathered],
    source_names: Sequence[str],
    roles: Sequence[int | None],
    config: PrepareConfig,
    output: Path,
    team: Team,
    finished: Sequence[tuple[Gathered, int]] = (),
    before: HeldBack | None = None,
) -> LeftOut:
    """Choose for every document: TRAIN, VALIDATION, TEST or DROPPED.

    source_names, roles: by source, its name, and the split that the user holds it back for; None: none. output: folder
    of removed.jsonl, which lists the documents that hold an evaluation text. finished, before: the documents to which
    these are added, each unit with its choice, and those held back among them. Raises TooFew, a DataError, if fewer
    than two documents are left.
    """
    cleaning, evaluation_files = config.cleaning, config.decontaminate
    removed_list = None if config.keep_removed is None else Path(config.keep_removed)
    record = Record()
    for unit in gathered:
        record.add(unit.cleaned)
    held = [unit for unit in gathered if roles[unit.source] is not None]
    units = [unit for unit in gathered if roles[unit.source] is None]
    names = [source_names[unit.source] for unit in units]
    kept = np.ones(starts_of(units)[-1], np.bool_)
    stages: list[Stage] = []

    def leave_out(rule: str, gone: NDArray[np.bool_]) -> None:
        kept[gone] = False
        _count(record, rule, units, gone)
        stages.append(Stage(rule, gone))

    if held:
        leave_out(HELD_BACK, copies_of(held, units))
    if finished:
        compared = [unit for unit, choice in finished if config.deduplicate or choice != TRAIN]
        leave_out(ALREADY_THERE, copies_of(compared, units))
        held = [unit for unit, _ in finished] + held
    if config.deduplicate:
        left = kept.copy()
        drop_duplicates(units, left)
        leave_out(EXACT_DUPLICATES, kept & ~left)
    sizes = [int(unit.index["length"].sum()) for unit in units]
    decontaminated: dict[str, Any] = {}
    if evaluation_files:
        left = kept.copy()
        runs = units[0].prefix.with_name("runs.npy")
        counts = decontamination.write_runs(evaluation_files, runs, config.source_options.encoding)
        run_all("decontaminating", decontamination.find, [(unit, runs) for unit in units], sizes, team)
        entries = _contaminated(units, names, evaluation_files, kept, record)
        path = output / decontamination.REMOVED_FILE
        sha256 = decontamination.write_list(path, entries)
        decontaminated = {**counts, "list": path.name, "list_sha256": sha256}
        stages.append(Stage(DECONTAMINATION, left & ~kept, _finder_of_matches(units, evaluation_files)))
    if NEAR_DUPLICATES in cleaning.steps:
        together = [*held, *units]  # of similar documents the first stays
        number = int(starts_of(held)[-1])
        sizes = [int(unit.index["length"].sum()) for unit in together]
        run_all("comparing", sign, [(unit,) for unit in together], sizes, team)
        stays = near_duplicates(together, np.concatenate([np.ones(number, np.bool_), kept]))
        gone = stays != np.arange(len(stays))
        gone[:number] = False
        gone[number:] &= kept
        kept &= ~gone[number:]
        _count(record, NEAR_DUPLICATES, together, gone, stays)
        stages.append(Stage(NEAR_DUPLICATES, gone[number:], partial(_twin, together, stays, number)))
    if removed_list is not None:
        write_removed(removed_list, units, names, stages)
    for unit in gathered:
        if (role := roles[unit.source]) is not None:
            choose_all([unit], np.ones(len(unit.index), np.bool_), role)
    least = 0 if finished else 1 if VALIDATION in roles else 2
    if kept.sum() < least and any(record.documents.values()):
        where = f"; {removed_list} lists what was left out" if removed_list else ""
        raise TooFew(_nothing_left(record, int(kept.sum()), least, cleaning) + where)
    if VALIDATION not in roles and (before or not finished):
        choose_by_hash(units, config.validation_fraction, kept, before)
    elif not kept.any() and not finished:
        raise TooFew("no document of the input is left to train on")
    else:
        choose_all(units, kept, TRAIN)
    return LeftOut(record, decontaminated)


def _nothing_left(record: Record, kept: int, least: int, cleaning: Cleaning) -> str:
    """Return a message for data with too little left: each rule, its limit, and the number of documents it left out."""
    total = kept + sum(record.documents.values())
    what = (
        "no document of the input is left to train on"
        if least == 1
        else f"the input holds {number_of(kept, 'different document')} of text; expected at least two"
    )
    rules = [
        f"{number:,} by {rule}{_remedy(rule, cleaning)}" for rule, number in record.documents.most_common() if number
    ]
    return (
        f"{what}: of {number_of(total, 'document')} these were left out: {', '.join(rules)}; change the limit of "
        "a rule, or leave its step out"
    )


def _remedy(rule: str, cleaning: Cleaning) -> str:
    """Return the limit of a rule and the option that changes it, in brackets."""
    step, _, sentence = rule.partition(": ")
    if rule == EXACT_DUPLICATES:
        return " (--keep-duplicates keeps them)"
    if rule == NEAR_DUPLICATES:
        return f" (a similarity of {THRESHOLD} or more to one that was kept; --clean)"
    if rule == DECONTAMINATION:
        longest, shortest = decontamination.LONGEST_RUN // WORD, decontamination.SHORTEST_RUN // WORD
        run = number_of(longest, "word")
        return f" ({run} in a row of an evaluation text, or all of one that has {shortest}; --decontaminate)"
    if step == "language":
        kept, least = ", ".join(cleaning.languages), cleaning.language.min_probability
        return f" (kept: {kept}, --languages; the limit is language.min_probability={least:g}; --cleaning-limits)"
    limits = cleaning.limits.get(step)
    names = [field.name for field in fields(limits)] if limits else []
    found = [f"{step}.{name}={getattr(limits, name)}" for name in names if limits and limits.rule(name) == sentence]
    return f" (the limit is {found[0]}; --cleaning-limits changes it)" if found else ""


def _finder_of_matches(units: list[Gathered], files: Sequence[str]) -> Callable[[int], dict[str, Any]]:
    """Return a function of the number of a document over all units, which returns the words that the document shares
    with an evaluation file, and the file.
    """
    starts = starts_of(units)

    @functools.lru_cache(maxsize=1)
    def matches(owner: int) -> dict[int, dict[str, Any]]:
        return {match["document"]: match for match in decontamination.found(units[owner])}

    def find(number: int) -> dict[str, Any]:
        owner = int(np.searchsorted(starts, number, side="right")) - 1
        match = matches(owner)[number - int(starts[owner])]
        return {"ngram": match["ngram"], "evaluation_file": files[match["file"]]}

    return find


def _twin(units: list[Gathered], stays: NDArray[np.int64], held: int, number: int) -> dict[str, Any]:
    """Describe the document kept in place of an input document. units, stays: with the `held` documents that come
    first.
    """
    twin = int(stays[held + number])
    similarity = Signatures(units).similarity(np.array([held + number]), np.array([twin]))
    return {"similarity": round(float(similarity[0]), 3), "stays": excerpt(_document(units, starts_of(units), twin))}


def _contaminated(
    units: list[Gathered], names: Sequence[str], files: Sequence[str], kept: NDArray[np.bool_], record: Record
) -> Iterator[dict[str, Any]]:
    """Remove matching documents from `kept`, record them, and yield a line of the list for each."""
    before: dict[str, int] = {}  # documents of the same source in earlier units
    for unit, name, start in zip(units, names, starts_of(units)[:-1].tolist(), strict=True):
        matches = [match for match in decontamination.found(unit) if kept[start + match["document"]]]
        documents = unit.pick(match["document"] for match in matches)
        for match, document in zip(matches, documents, strict=True):
            place = match["document"]
            kept[start + place] = False
            details = {"ngram": match["ngram"], "evaluation_file": files[match["file"]]}
            record.remove(DECONTAMINATION, document, **details)
            number = before.get(name, 0) + place
            yield {"source": name, "document": number, "bytes": len(document), **details, "text": excerpt(document)}
        before[name] = before.get(name, 0) + len(unit.index)


def _count(
    record: Record,
    rule: str,
    units: list[Gathered],
    gone: NDArray[np.bool_],
    stays: NDArray[np.int64] | None = None,
) -> None:
    """Record the documents that one rule leaves out. stays: for every document, the one kept in its place."""
    if not gone.any():
        return
    starts = starts_of(units)
    record.documents[rule] += int(gone.sum())
    for unit, start, stop in zip(units, starts[:-1], starts[1:], strict=True):
        record.sizes[rule] += int((unit.index["length"][gone[start:stop]] - 1).sum())
    examples = []
    for number in np.flatnonzero(gone)[:EXAMPLES].tolist():
        example: dict[str, Any] = {"text": excerpt(_document(units, starts, number))}
        if stays is not None:
            twin = int(stays[number])
            pair = np.array([number]), np.array([twin])
            example["similarity"] = round(float(Signatures(units).similarity(*pair)[0]), 3)
            example["stays"] = excerpt(_document(units, starts, twin))
        examples.append(example)
    record.examples[rule] = examples


def _document(units: list[Gathered], starts: NDArray[np.int64], number: int) -> bytes:
    owner = int(np.searchsorted(starts, number, side="right")) - 1
    return next(units[owner].pick([number - int(starts[owner])]))
