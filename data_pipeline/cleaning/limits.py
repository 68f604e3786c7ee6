"""The limits of cleaning rules as settings: each step has a dataclass of them; users write STEP.NAME=VALUE."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from data_pipeline.errors import DataError

COUNT, NUMBER, SHARE, WORDS = "a whole number, 0 or more", "a number, 0 or more", "a share, 0 to 1", "words: the,of,and"

L = TypeVar("L", bound="Limits")


def limit(default: Any, kind: str, rule: str) -> Any:
    """Return a field of Limits. kind: COUNT, NUMBER, SHARE or WORDS. rule: a sentence for a document that breaks it."""
    return dataclasses.field(default=default, metadata={"kind": kind, "rule": rule})


@dataclass(frozen=True)
class Limits:
    """The limits of a step."""

    def rule(self, name: str) -> str:
        """Return the rule of a limit as a sentence with its value, such as "fewer than 50 words"."""
        rules = {field.name: field.metadata["rule"] for field in fields(self)}
        shown = {field.name: _shown(getattr(self, field.name), field.metadata["kind"]) for field in fields(self)}
        return str(rules[name]).format(**shown)

    @property
    def changed(self) -> dict[str, Any]:
        """The limits that differ from their defaults."""
        pairs = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: list(v) if isinstance(v, tuple) else v for field, v in pairs if v != field.default}


def _shown(value: Any, kind: str) -> str:
    if kind == WORDS:
        return ", ".join(value)
    return f"{100 * value:g}%" if kind == SHARE else f"{value:,}" if kind == COUNT else f"{value:g}"


def parse_limits(assignments: Sequence[str], steps: dict[str, L]) -> dict[str, L]:
    """Return the limits of some steps after assignments such as "gopher.min_words=20". Raises DataError for invalid
    ones.
    """
    known = {f"{step}.{field.name}": field for step, limits in steps.items() for field in fields(limits)}
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals:
            raise DataError(f"expected STEP.NAME=VALUE, such as gopher.min_words=20, got {assignment!r}")
        if name not in known:
            near = get_close_matches(name, known, 1, 0)
            raise DataError(f"unknown cleaning limit {name!r}; nearest: {near[0]}; the limits are: {', '.join(known)}")
        if name in changes:
            raise DataError(f"the cleaning limit {name} is set twice")
        changes[name] = _value(name, text.strip(), known[name].metadata["kind"])
    for step, limits in steps.items():
        own = {name.partition(".")[2]: value for name, value in changes.items() if name.startswith(f"{step}.")}
        steps = steps | {step: dataclasses.replace(limits, **own)}
        _check_order(step, steps[step])
    return steps


def _value(name: str, text: str, kind: str) -> Any:
    expected = DataError(f"the cleaning limit {name} must be {kind}; got {text!r}")
    if kind == WORDS:
        return tuple(dict.fromkeys(word.strip().lower() for word in text.split(",") if word.strip()))
    try:
        value = int(text) if kind == COUNT else float(text)
    except ValueError:
        raise expected from None
    if not math.isfinite(value) or value < 0 or (kind == SHARE and value > 1):
        raise expected
    return value


def _check_order(step: str, limits: Limits) -> None:
    """Raise DataError if a minimum is above its maximum, so that no document could stay."""
    values = {field.name: getattr(limits, field.name) for field in fields(limits)}
    for name, least in values.items():
        most = values.get(f"max_{name.removeprefix('min_')}") if name.startswith("min_") else None
        if most is not None and least > most:
            raise DataError(f"{step}.{name}={least} is above {step}.max_{name.removeprefix('min_')}={most}")
