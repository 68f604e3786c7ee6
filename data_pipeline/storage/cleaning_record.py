"""The effects of cleaning, counted by rule, with examples: one record per unit, summed for the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 3  # of each rule
_EXCERPT = 300  # characters


def excerpt(text: bytes | str, characters: int = _EXCERPT) -> str:
    """Return the beginning of a text, for display; an ellipsis marks a cut."""
    if isinstance(text, bytes):
        text = text[: 4 * characters + 4].decode("utf-8", errors="ignore")
    return text if len(text) <= characters else text[:characters].rstrip() + " …"


@dataclass
class Record:
    """The number and bytes of documents left out, by rule, and the changes to those that stay."""

    documents: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    edits: Counter[str] = field(default_factory=Counter)

    def remove(self, rule: str, document: bytes, **details: Any) -> None:
        """Count a document that `rule` leaves out; the first few of a rule become examples."""
        self.documents[rule] += 1
        self.sizes[rule] += len(document)
        if len(kept := self.examples.setdefault(rule, [])) < EXAMPLES:
            kept.append({"text": excerpt(document), **details})

    def add(self, other: Record) -> None:
        self.documents += other.documents
        self.sizes += other.sizes
        self.edits += other.edits
        for rule, examples in other.examples.items():
            self.examples[rule] = (self.examples.get(rule, []) + examples)[:EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        removed = {
            rule: {"documents": number, "bytes": self.sizes[rule], "examples": self.examples.get(rule, [])}
            for rule, number in self.documents.items()
        }
        return {"removed": removed, "edits": dict(self.edits)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        removed = values["removed"]
        return cls(
            Counter({rule: one["documents"] for rule, one in removed.items()}),
            Counter({rule: one["bytes"] for rule, one in removed.items()}),
            {rule: one["examples"] for rule, one in removed.items()},
            Counter(values["edits"]),
        )
