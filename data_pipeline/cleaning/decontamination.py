"""Removal of documents that contain part of an evaluation text.

Like Brown et al. 2020 (arXiv 2005.14165, appendix C), it searches for runs of 13 words that an evaluation text and a
training document share, ignoring case and punctuation, and for runs down to 8 words if the evaluation text is shorter.
They cut the run and 200 characters around it; here the whole document is removed, and the list of removed documents
gives the shared words. `words` defines words, also in scripts without spaces, and the folding before comparison.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cleaning.words import WORD, pieces, words_of
from data_pipeline.errors import DataError
from data_pipeline.plurals import number_of
from data_pipeline.sources.encodings import check_text
from data_pipeline.sources.formats import compression_of, open_input
from data_pipeline.storage.atomic import atomic_file, save_array, sha256_file, write_text
from data_pipeline.storage.documents import Gathered
from data_pipeline.tokenizers.base import END_OF_STORED_DOCUMENT

LONGEST_RUN, SHORTEST_RUN = 13 * WORD, 8 * WORD
REMOVED_FILE = "removed.jsonl"

_BLANK_LINES = re.compile(r"\n\s*\n")


def describe(files: Sequence[str]) -> list[dict[str, Any]]:
    """Return the identification of the evaluation files, for the settings. Raises DataError if one cannot be read."""
    described = []
    for name in files:
        try:
            described.append({"path": str(Path(name).resolve()), "sha256": sha256_file(name)})
        except OSError as error:
            raise DataError(f"cannot read the evaluation file {name}: {error.strerror or error}") from error
    return described


def texts_of(name: str, encoding: str = "") -> Iterator[str]:
    """Yield the texts of an evaluation file, which may be compressed.

    In JSON, JSON Lines, CSV, TSV and Parquet, these are all string values; in other files, the paragraphs. `encoding`:
    of files that are not UTF-8; if empty, they are refused. Raises DataError if the file cannot be read.
    """
    compression = compression_of(name)
    suffix = Path(name.lower().removesuffix(compression)).suffix
    try:
        with open_input(name, compression) as file:
            data = file.read()
        if suffix == ".parquet":
            from pyarrow import parquet

            yield from _strings(parquet.read_table(io.BytesIO(data)).to_pydict())
            return
        text = _decoded(data, name, encoding).replace("\r\n", "\n")
        if suffix in (".json", ".jsonl", ".ndjson"):
            yield from _strings(_parsed(text, lines=suffix != ".json"))
        elif suffix in (".csv", ".tsv"):
            dialect = csv.excel_tab if suffix == ".tsv" else csv.excel
            quoting: Any = csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL
            yield from (cell for row in csv.reader(io.StringIO(text), dialect, quoting=quoting) for cell in row)
        else:
            yield from _BLANK_LINES.split(text)
    except DataError as error:
        raise DataError(f"evaluation file: {error}") from error
    except (ValueError, csv.Error) as error:  # includes those of pyarrow
        raise DataError(f"cannot read the evaluation file {name}: {error}; expected UTF-8 text or JSON") from error


def _decoded(data: bytes, name: str, encoding: str) -> str:
    if encoding:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return data.decode(encoding, "replace").removeprefix("\ufeff")
        if "\0" not in text:
            return text
        return data.decode(encoding, "replace")  # UTF-16 without a byte order mark
    check_text([data], name)
    return data.decode("utf-8-sig", "replace")


def _parsed(text: str, lines: bool) -> Any:
    """Parse JSON as one value, or as one per line; a .json file may be either."""
    if not lines:
        try:
            return json.loads(text)
        except ValueError as error:
            first = error
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError as error:
                raise (ValueError(f"line {number}: {error}") if lines or number > 1 else first) from None
    return values


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def write_runs(files: Sequence[str], path: Path, encoding: str = "") -> dict[str, int]:
    """Write the runs of words to search for: an array of (weight, hash, number of the file), sorted, without repeats.

    `encoding`: see `texts_of`. Return the number of texts, and of those too short to be searched for. Raises DataError
    if none is long enough.
    """
    counts = {"texts": 0, "too_short": 0}
    found: list[NDArray[Any]] = [np.empty(0, _RUN)]
    for number, name in enumerate(files):
        for text in texts_of(name, encoding):
            words = words_of(_stored(text))
            weight = int(words.weights.sum())
            counts["texts"] += 1
            counts["too_short"] += weight < SHORTEST_RUN
            length = min(weight, LONGEST_RUN)
            if length >= SHORTEST_RUN:
                hashes, _, _ = words.runs(length)
                runs = np.empty(len(hashes), _RUN)
                runs["weight"], runs["hash"], runs["file"] = length, hashes, number
                found.append(runs)
    runs = np.sort(np.concatenate(found), order=["weight", "hash", "file"])
    if not len(runs):
        raise DataError(
            f"nothing to look for in {', '.join(files)}: none of its {number_of(counts['texts'], 'text')} has "
            f"{SHORTEST_RUN // WORD} words"
        )
    first = np.append(True, (runs["hash"][1:] != runs["hash"][:-1]) | (runs["weight"][1:] != runs["weight"][:-1]))
    with atomic_file(path) as file:
        save_array(file, runs[first])
    return counts


_RUN = np.dtype([("weight", "u1"), ("hash", "<u8"), ("file", "<u4")])


def _stored(text: str) -> NDArray[np.uint8]:
    data = text.encode("utf-8", errors="replace") + bytes([END_OF_STORED_DOCUMENT])
    return np.frombuffer(data, np.uint8)


def find(gathered: Gathered, runs: Path) -> None:
    """Write which documents of a unit contain one of the runs, and the first run of each: see `found`."""
    path = gathered.file("contaminated.json")
    if path.exists():
        return
    matches: dict[int, dict[str, Any]] = {}
    index = gathered.index
    before = 0
    for stored, lengths in gathered.documents(0, len(index), np.ones(len(index), np.bool_)):
        for first, _, text in pieces(stored, lengths):
            for document, match in _matches(text, _looked_for(runs, runs.stat().st_mtime_ns)):
                matches.setdefault(before + first + document, match)
        before += len(lengths)
    write_text(path, json.dumps([{"document": document, **matches[document]} for document in sorted(matches)]))


def found(gathered: Gathered) -> list[dict[str, Any]]:
    """Return per document to leave out: `document`, its number in the unit; `ngram`, the words; `file`, the file's
    number.
    """
    return json.loads(gathered.file("contaminated.json").read_bytes())


def _matches(text: NDArray[np.uint8], looked_for: dict[int, NDArray[Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    words = words_of(text)
    for weight, runs in looked_for.items():
        hashes, firsts, lasts = words.runs(weight)
        places = np.searchsorted(runs["hash"], hashes)
        places[places == len(runs)] = 0
        for hit in np.flatnonzero(runs["hash"][places] == hashes).tolist():
            first = int(firsts[hit])
            words_hit = text[words.starts[first] : words.stops[lasts[hit]]]
            yield (
                int(words.documents[first]),
                {
                    "ngram": words_hit.tobytes().decode("utf-8", errors="replace"),
                    "file": int(runs["file"][places[hit]]),
                },
            )


@functools.lru_cache(maxsize=1)
def _looked_for(path: Path, mtime_ns: int) -> dict[int, NDArray[Any]]:
    """Return the runs by their weight, the longest first."""
    runs = np.load(path)
    return {weight: runs[runs["weight"] == weight] for weight in np.unique(runs["weight"])[::-1].tolist()}


def write_list(path: Path, entries: Iterator[dict[str, Any]]) -> str:
    """Write a line of JSON for each document that was left out; return the sha256 of the file."""
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for entry in entries:
            line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
            digest.update(line)
            file.write(line)
    return digest.hexdigest()
