"""Strict YAML: text to a tree in which every value keeps its place.

Plain PyYAML reads `3e-4` as text, `no` as false, `12:30` as 750, `010` as 8, and lets a repeated key win silently.
Here a number is what Python would call a number (`3e-4`, `1_000`), only `true` and `false` are booleans, repeated keys
are refused with both lines, and there are no dates, aliases, merges or tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)\Z")
FLOAT = re.compile(
    r"[-+]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"
)

_DIGITS = list("-+0123456789")


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of this project and no aliases."""

    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012 - PyYAML's own class attribute, replaced not shared

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases are not used here", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


for _kind, _pattern, _first in (
    ("null", re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("int", INT, _DIGITS),
    ("float", FLOAT, [*_DIGITS, "."]),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, _first)


class Dumper(yaml.SafeDumper):
    """Dumper whose output Loader reads back equal. Text that any YAML reader could misread is quoted."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:int", INT, _DIGITS)
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, [*_DIGITS, "."])


@dataclass
class Node:
    """A value (dict of Nodes, list of Nodes, or scalar) and its place, which messages cite."""

    value: Any
    place: str
    override: bool = False


@dataclass
class Problem:
    """One line of a report."""

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


def read_tree(text: str, name: str, problems: list[Problem], *, override: bool = False) -> Node | None:
    """Read the tree of one YAML document; None (after adding a problem) where it cannot be read at all.

    `name` is the file's name, or the whole place for an override, which has no lines.
    """

    def place(mark: Any) -> str:
        return name if override or mark is None else f"{name}:{mark.line + 1}"

    try:
        root = yaml.compose(text, Loader)
        return Node(None, name, override) if root is None else _convert(root, place, problems, override)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.append(Problem(place(mark), f"not readable as YAML: {error.problem or error.context}"))
    except yaml.YAMLError as error:
        problems.append(Problem(name, f"not readable as YAML: {' '.join(str(error).split())}"))
    except RecursionError:
        problems.append(Problem(name, "not readable as YAML: nested too deeply"))
    return None


def tree_of(value: Any, place: str) -> Node:
    """Build the tree of plain Python values (as from a JSON file), all with the same place."""
    if isinstance(value, Mapping):
        return Node({str(key): tree_of(child, place) for key, child in value.items()}, place)
    if isinstance(value, list | tuple):
        return Node([tree_of(child, place) for child in value], place)
    return Node(value, place)


def plain(node: Node) -> Any:
    """Return the plain Python values of a tree: the inverse of `tree_of`."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def written(value: Any) -> str:
    """Format a plain value as in YAML: null, true, 'text'."""
    return repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def describe(value: Any) -> str:
    """Describe a value for messages, with its type."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value!r}"
    return f"{value!r}"


def _convert(node: yaml.Node, place: Any, problems: list[Problem], override: bool) -> Node:
    where = place(node.start_mark)
    if isinstance(node, yaml.CollectionNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        problems.append(Problem(where, f"got the tag {node.tag!r}, expected a plain section or list"))
    if isinstance(node, yaml.MappingNode):
        children: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            line = key_node.start_mark.line + 1
            if key is None:
                problems.append(Problem(place(key_node.start_mark), "got a section or list as a key, expected a name"))
            elif key in children:
                problems.append(
                    Problem(place(key_node.start_mark), f"{key}: repeated key; it is already set in line {lines[key]}")
                )
            else:
                child = _convert(value_node, place, problems, override)
                child.place = place(key_node.start_mark)  # the line of the key, where a reader looks first
                children[key], lines[key] = child, line
        return Node(children, where, override)
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(child, place, problems, override) for child in node.value], where, override)
    return Node(_scalar(node, where, problems), where, override)


def _scalar(node: yaml.Node, where: str, problems: list[Problem]) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    text = node.value
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        pass
    problems.append(Problem(where, f"got {text[:80]!r} with the tag {node.tag!r}, expected a plain value, no tag"))
    return None
