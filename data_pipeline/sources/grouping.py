"""Grouping of many files named one by one, such as by an unquoted shell pattern, into one source.

Every source has its own units, entries in the manifest, and lines in the report; thousands of them would take most of
the time and space. A few files, named by hand, stay separate sources.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.plurals import number_of
from data_pipeline.sources.formats import format_of_named
from data_pipeline.sources.indexed import indexed_prefix

_MANY = 16  # consecutive files


class Group(str):
    """Text files as one input; as a string, its name."""

    paths: tuple[str, ...]

    def __new__(cls, paths: Sequence[str]) -> Group:
        beginning = os.path.commonprefix(list(paths))  # noqa: RUF071 - of characters
        ending = os.path.commonprefix([path[len(beginning) :][::-1] for path in paths])[::-1]  # noqa: RUF071
        others = number_of(len(paths) - 1, "other file")
        name = f"{beginning}*{ending}" if beginning or ending else f"{paths[0]} and {others}"
        group = super().__new__(cls, name)
        group.paths = tuple(sorted(paths))  # in the order of a pattern, regardless of the shell's locale
        return group


def grouped(names: Sequence[str]) -> tuple[str, ...]:
    """Return the inputs with every run of more than 16 text files replaced by a Group."""
    return tuple(itertools.chain.from_iterable(_groups(names)))


def _groups(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for is_file, run in itertools.groupby(names, _is_text_file):
        files = list(run)
        yield [Group(files)] if is_file and len(files) > _MANY else files


def _is_text_file(name: str) -> bool:
    path = Path(name)
    return os.path.isfile(name) and format_of_named(path) is not None and indexed_prefix(path) is None
