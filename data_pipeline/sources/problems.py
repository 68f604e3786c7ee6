"""Problems met while text is found and read: counted by name, with examples, and their words in reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data_pipeline.plurals import number_of

NAMED = 20  # number of inputs named per reason for leaving out; the others are only counted
# Counts made while text is read: singular and plural.
PROBLEMS = {
    "invalid_utf8_documents": ("document with invalid UTF-8", "documents with invalid UTF-8"),
    "replaced_characters": ("character replaced by U+FFFD", "characters replaced by U+FFFD"),
    "byte_order_marks": ("byte-order mark removed", "byte-order marks removed"),
    "crlf_line_ends": ("CRLF line end made LF", "CRLF line ends made LF"),
    "empty_documents": ("empty document left out", "empty documents left out"),
    "broken_lines": ("broken line left out", "broken lines left out"),
    "cells_like_rows": (
        "cell of several lines that look like rows: a quote may lack its partner",
        "cells of several lines that look like rows: a quote may lack its partner",
    ),
    "pages_beyond_limits": (
        "page left out, too deep or too large for a parser",
        "pages left out, too deep or too large for a parser",
    ),
    "unreadable_files": (
        "unreadable file left out, or the rest of it",
        "unreadable files left out, or the rest of them",
    ),
    "broken_documents": (
        "document with ids outside the vocabulary left out",
        "documents with ids outside the vocabulary left out",
    ),
    "files_of_other_formats": ("file of another format left out", "files of other formats left out"),
    "empty_files": ("empty file", "empty files"),
    "hidden_files": ("hidden file or folder left out", "hidden files and folders left out"),
    "linked_folders": (
        "link left out, to a folder that is already read",
        "links left out, to folders that are already read",
    ),
    "prepared_folders": (
        "folder of prepared data (with a manifest.json) left out",
        "folders of prepared data (with a manifest.json) left out",
    ),
    "reports": ("report (report.html) left out", "reports (report.html) left out"),
    "unreadable_folders": ("unreadable folder left out", "unreadable folders left out"),
}
_AS_TEXT = ("invalid_utf8_documents", "replaced_characters", "byte_order_marks", "crlf_line_ends", "cells_like_rows")


@dataclass
class Problems:
    """Problems of the input and their treatment, counted by name, with the first few places."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    division: Counter[str] = field(default_factory=Counter)  # how plain text was divided: see `plain_text.divided`
    left_out: dict[str, list[str]] = field(default_factory=dict)  # by reason, the first names of inputs left out
    score: float = math.nan  # of the last document read, if scores are requested

    def count(self, name: str, number: int = 1, example: str = "") -> None:
        if number:
            self.counts[name] += number
            if example and self.wants_examples:
                self.examples.append(example)

    def leave_out(self, reason: str, name: str) -> None:
        """Count an input that is left out entirely, or from some point on, and record its name."""
        self.counts[reason] += 1
        names = self.left_out.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(name)

    def add(self, other: Problems) -> None:
        """Add the counts and the left-out inputs of another object."""
        self.counts.update(other.counts)
        for reason, names in other.left_out.items():
            self.left_out[reason] = [*self.left_out.get(reason, []), *names][:NAMED]

    @property
    def wants_examples(self) -> bool:
        return len(self.examples) < 5


def lines_of_problems(counts: Mapping[str, int], left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """Return lines with the problems met while a source was read: the count of each kind, and the first names."""
    lines = []
    for name, number in sorted(counts.items()):
        names = left_out.get(name, ())
        lines.append(f"  {number_of(number, *PROBLEMS[name])}" + ":" * bool(names))
        lines += [f"    {one}" for one in names]
        if names and number > len(names):
            lines.append(f"    and {number - len(names):,} more")
    return lines


def left_out_by_reading(problems: Sequence[Problems]) -> str:
    """Describe what reading left out of the inputs, with an example of each kind; "" if nothing was left out."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for one in problems:
        counts.update(one.counts)
        examples |= {name: names[0] for name, names in one.left_out.items() if names and name not in examples}
        if one.examples:
            examples.setdefault("broken_lines", one.examples[0])
    parts = [
        number_of(number, *PROBLEMS[name]) + (f" ({examples[name]})" if name in examples else "")
        for name, number in sorted(counts.items())
        if number and name not in _AS_TEXT
    ]
    return "; ".join(parts)
