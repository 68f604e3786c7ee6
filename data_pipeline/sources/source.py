"""The sources of text: files, folders, data sets of the Hugging Face hub, and the default corpus.

Every source divides itself into units: jobs of bounded size, always the same for the same input, that any process can
read. The documents of all units in sequence are the documents of the corpus.
"""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import DataError
from data_pipeline.sources.default_corpus import corpus
from data_pipeline.sources.files import Files
from data_pipeline.sources.folders import Group, files_below, matches_of
from data_pipeline.sources.formats import COMPRESSED, NOT_TEXT, format_of
from data_pipeline.sources.hub import HubDataset, is_saved_dataset
from data_pipeline.sources.indexed import IndexedFiles, indexed_prefix
from data_pipeline.sources.plain_text import AUTO, Rule, choose
from data_pipeline.sources.problems import Problems
from data_pipeline.sources.stdin import STDIN, Stdin, is_pipe
from data_pipeline.sources.text_files import Reading, clean

_HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?(?::\w[\w.-]*)?$")


class Unit(Protocol):
    """A part of a source that one job reads."""

    @property
    def source(self) -> int:
        """The number of its source."""
        ...

    @property
    def size(self) -> int:
        """The approximate bytes of its input."""
        ...

    def read(self, problems: Problems) -> Iterator[bytes]:
        """Yield its documents as clean UTF-8."""
        ...


class Source(Protocol):
    """One input."""

    name: str
    kind: str
    problems: Problems  # met during the search for files

    def describe(self) -> dict[str, Any]:
        """Return a quick identification of the input. state: see `files.state_of`, if it has files."""
        ...

    def contents(self) -> list[tuple[str, int]]:
        """Return the files, with sizes, whose bytes identify the input; none if `describe` suffices."""
        ...

    def kind_of(self, path: str) -> str:
        """Return the kind of such a file by its name."""
        ...

    def units(self, source: int) -> Sequence[Unit]: ...


@dataclass(frozen=True)
class SourceOptions:
    """Options for finding and reading the inputs."""

    text_key: str
    on_error: str
    hub_split: str
    hub_streaming: bool
    input_tokenizer: str | None
    keep_ids: bool  # of indexed files
    stdin_format: str  # "txt", "jsonl.gz"
    spool: Path  # folder for the stored standard input
    score_key: str | None = None
    conversations: bool = False
    documents: str = AUTO  # division of plain text into documents: see `plain_text`
    encoding: str = ""  # of all files
    quoting: str = "auto"  # of tables: one of text_files.QUOTING
    taken_over: tuple[str, ...] = ()  # names of options that nobody typed, and that need not apply


def open_sources(
    inputs: Sequence[str], options: SourceOptions, validation: Sequence[str] = (), test: Sequence[str] = ()
) -> list[Source]:
    """Return the sources that the user named, those of validation and test last; the default corpus if there are no
    inputs.

    Raises DataError if one is not readable.
    """
    named = [*inputs, *validation, *test]
    if named.count(STDIN) > 1:
        raise DataError("the standard input can be read once only: give --input - once")
    splits = [options.hub_split] * len(inputs) + ["validation"] * len(validation) + ["test"] * len(test)
    found = [_find(name, replace(options, hub_split=split)) for name, split in zip(named, splits, strict=True)]
    indexed = [source for source in found if isinstance(source, IndexedFiles)]
    if options.input_tokenizer is not None and not indexed:
        raise DataError("--input-tokenizer says how to read MMIDIDX files (.bin with .idx), but there are none")
    if options.keep_ids and len(indexed) < len(found):
        raise DataError("ids are kept as they are only if all inputs are MMIDIDX files (.bin with .idx)")
    if options.conversations:
        _refuse_other_than_lines(found)
    rule = Rule.parse(options.documents)
    files = [source for source in found if isinstance(source, Files)]
    text = [file for source in files for file in source.text]
    kinds = {kind for source in files for kind in source.kinds}
    if rule.kind != AUTO and "text" not in kinds and "documents" not in options.taken_over:
        raise DataError(f"--documents {rule.typed} says how plain text is divided, but there is none in the input")
    if options.encoding and not kinds - {"parquet"}:
        raise DataError("--encoding says how files of text are read, but there are none in the input: leave it out")
    if options.quoting != "auto" and "csv" not in kinds and "quoting" not in options.taken_over:
        raise DataError(
            "--quoting says how tables are read (.csv, .tsv), but there are none in the input: leave it out"
        )
    others = len(found) - len(files) + sum(source.number_of_files for source in files) - len(text)

    @functools.cache  # text is examined once, and not at all if the data is already prepared
    def reading() -> Reading:
        division = choose(rule, text, others, split=not validation, encoding=options.encoding)
        return Reading(
            options.text_key,
            options.on_error,
            options.score_key,
            options.conversations,
            division=division,
            encoding=options.encoding,
            quoting=options.quoting,
        )

    for source in files:
        source.reading = reading
        source.rule = rule
    return [*found] if inputs else [DefaultCorpus(), *found]


def _refuse_other_than_lines(found: Sequence[Source]) -> None:
    for source in found:
        kinds = source.kinds - {"jsonl", "json"} if isinstance(source, Files) else {source.kind}
        if kinds:
            raise DataError(
                f"conversations are read from JSON Lines (.jsonl) and .json, but {source.name} holds "
                f"{', '.join(sorted(kinds))}; write one conversation a line"
            )


def _find(name: str, options: SourceOptions) -> Files | HubDataset | IndexedFiles:
    if isinstance(name, Group):
        return Files(name, [Path(path) for path in name.paths], options.on_error)
    path = Path(name)
    if not name:
        raise DataError("an input without a name: expected a file, a folder, or the id of a Hugging Face data set")
    if name == STDIN:
        return Stdin(options.stdin_format, options.spool)
    if is_pipe(path):
        return Stdin(options.stdin_format, options.spool, name)
    if is_saved_dataset(path):
        return HubDataset(name, options.hub_split, options.text_key, saved=True)
    if os.path.isdir(path):
        problems = Problems()
        return Files(name, files_below(path, options.on_error, problems), options.on_error, problems)
    if prefix := indexed_prefix(path):
        return IndexedFiles(name, [prefix], options.input_tokenizer, options.keep_ids, options.on_error)
    if _may_exist(path):
        return Files(name, [path], options.on_error)
    if glob.has_magic(name):
        return _matching(name, options)
    looks_like_a_file = format_of(path) or path.suffix.lower() in (*NOT_TEXT, *COMPRESSED, ".bin", ".idx")
    if looks_like_a_file or not _HUB_ID.match(name):
        raise DataError(
            f"input {name!r} does not exist: expected a file, a folder, or the id of a Hugging Face data set"
        )
    return HubDataset(name, options.hub_split, options.text_key, streaming=options.hub_streaming)


def _may_exist(path: Path) -> bool:
    """Return whether such a file exists, or may exist in an inaccessible folder; reading it then reports the error."""
    try:
        path.stat()
    except PermissionError:
        return not glob.has_magic(str(path))
    except (OSError, ValueError):
        return False
    return True


def _matching(pattern: str, options: SourceOptions) -> Files | IndexedFiles:
    """Return the matches of a pattern in name order: text files, including those in folders; or only indexed files."""
    problems = Problems()
    matches = matches_of(pattern, options.on_error, problems)
    if not matches:
        left_out = "".join(f"; left out: {name}" for names in problems.left_out.values() for name in names[:3])
        raise DataError(
            f"input {pattern!r} matches no file; patterns know *, ?, [...], and ** for any folders{left_out}"
        )
    prefixes = [indexed_prefix(match) for match in matches]
    if all(prefixes):
        unique = list(dict.fromkeys(prefix for prefix in prefixes if prefix))
        return IndexedFiles(pattern, unique, options.input_tokenizer, options.keep_ids, options.on_error)
    files: dict[Path, None] = {}
    for match in matches:
        below = files_below(match, options.on_error, problems) if os.path.isdir(match) else [match]
        files |= dict.fromkeys(below)
    return Files(pattern, list(files), options.on_error, problems)


class DefaultCorpus:
    """English prose from the installed packages: see `corpus`."""

    name = "default corpus"
    kind = "default corpus"
    problems = Problems()

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "version": corpus.CORPUS_VERSION, "packages": corpus.installed_versions()}

    def contents(self) -> list[tuple[str, int]]:
        return []

    def kind_of(self, path: str) -> str:
        raise AssertionError("it has no files")

    def units(self, source: int) -> Sequence[Unit]:
        return [CorpusUnit(source, size, package, files) for package, files, size in corpus.corpus_units()]


@dataclass(frozen=True)
class CorpusUnit:
    """Some files of an installed package."""

    source: int
    size: int
    package: str
    files: tuple[str, ...]

    def read(self, problems: Problems) -> Iterator[bytes]:
        for document in corpus.read_unit(self.package, self.files):
            yield clean(document, problems)
