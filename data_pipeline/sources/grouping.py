"""Many files named one by one, as a shell does with an unquoted pattern, are one source, as the pattern itself is.

Every source has its own pieces of work, entries in the manifest, and lines in the report; thousands of them would take
most of the time and space. Files that a user names by hand are fewer, and stay sources of their own.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.plurals import number_of
from data_pipeline.sources.formats import format_of_named
from data_pipeline.sources.indexed import indexed_prefix

_MANY = 16  # files in a row


class Group(str):
    """Text files as one input; as a string, what it is called."""

    paths: tuple[str, ...]

    def __new__(cls, paths: Sequence[str]) -> Group:
        beginning = os.path.commonprefix(list(paths))  # noqa: RUF071 - of characters
        ending = os.path.commonprefix([path[len(beginning) :][::-1] for path in paths])[::-1]  # noqa: RUF071
        others = number_of(len(paths) - 1, "other file")
        name = f"{beginning}*{ending}" if beginning or ending else f"{paths[0]} and {others}"
        group = super().__new__(cls, name)
        group.paths = tuple(sorted(paths))  # in the order that a pattern has, whatever the shell's language is
        return group


def grouped(names: Sequence[str]) -> tuple[str, ...]:
    """The inputs, with every run of more than 16 text files in place of these as a Group."""
    return tuple(itertools.chain.from_iterable(_groups(names)))


def _groups(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for is_file, run in itertools.groupby(names, _is_text_file):
        files = list(run)
        yield [Group(files)] if is_file and len(files) > _MANY else files


def _is_text_file(name: str) -> bool:
    path = Path(name)
    return os.path.isfile(name) and format_of_named(path) is not None and indexed_prefix(path) is None
