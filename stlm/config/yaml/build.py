"""Conversion between trees and frozen dataclasses, which checks keys, types and limits."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from stlm.config.yaml.fields import Component, Conflict, FreeSection
from stlm.config.yaml.tree import Node, Problem, describe, plain, tree_of, written
from stlm.errors import ConfigError

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to plain dicts and scalars, every field, `kind` first; `from_dict` reads it back equal."""
    mapping: dict[str, Any] = {"kind": config.kind} if isinstance(config, Component) else {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple):
            mapping[field.name] = [to_dict(item) for item in value]
        elif isinstance(value, FreeSection):
            mapping[field.name] = value.plain()
        elif dataclasses.is_dataclass(value):
            section = to_dict(value)
            mapping[field.name] = section["kind"] if getattr(value, "by_name", False) and len(section) == 1 else section
        else:
            mapping[field.name] = value
    return mapping


def spell_out(cls: Any, node: Node) -> None:
    """Replace names of components that stand alone by sections with that `kind`, in the tree of a config."""
    if not isinstance(node.value, dict):
        return
    hints = typing.get_type_hints(cls)
    for key, child in node.value.items():
        hint = hints.get(key)
        if isinstance(hint, type) and issubclass(hint, Component):
            if hint.by_name and isinstance(child.value, str):
                child.value = {"kind": Node(child.value, child.place, child.override)}
        elif dataclasses.is_dataclass(hint):
            spell_out(hint, child)


def value_at(config: Any, key: str) -> Any:
    """Return the plain value under a dotted key of a config; None where it has no such key."""
    value: Any = to_dict(config)
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def from_dict(cls: type[Config], mapping: Mapping[str, Any], source: str = "config") -> Config:
    """Build the config of class `cls` from `mapping`, as `to_dict` wrote it; `source` is the file that messages name.

    Raises ConfigError with all problems at once.
    """
    problems: list[Problem] = []
    config = build(cls, tree_of(mapping, str(source)), problems, saved=True)
    raise_problems(problems)
    return config


def raise_problems(problems: list[Problem]) -> None:
    """Raise one ConfigError with all problems, in their order; nothing where there are none."""
    if len(problems) == 1:
        raise ConfigError(str(problems[0]))
    if problems:
        raise ConfigError("\n".join([f"{len(problems)} problems in the configuration:", *(f"  {p}" for p in problems)]))


def build(cls: type[Config], root: Node, problems: list[Problem], saved: bool = False) -> Config:
    """Build the config that the tree describes, with defaults elsewhere. Use it only if no problem was added.

    `saved`: the tree is that of a run or model, in which settings without effect are accepted, except in overrides.
    """
    spell_out(cls, root)
    builder = _Builder(cls, problems, saved)
    config = builder.section(cls, root, "")
    for conflict in config.check() if hasattr(config, "check") else ():
        builder.report(conflict, root)
    return config


def nearest(name: str, valid: Iterable[str]) -> list[str]:
    """Return the valid names most similar to a misspelt one, best first."""
    return difflib.get_close_matches(name.lower(), list(valid), n=3, cutoff=0.6)


class _Builder:
    """Traversal of a tree together with a class, which collects problems and the place of each key."""

    def __init__(self, root: Any, problems: list[Problem], saved: bool):
        self.root = root
        self.saved = saved
        self.problems = problems
        self.places: dict[str, Node] = {}
        self.doubtful: set[str] = set()  # keys whose value is wrong: conflicts with them are not reported

    def section(self, cls: Any, node: Node, path: str) -> Any:
        """Build a dataclass from a mapping; `path` is its dotted key, empty at the root."""
        if node.value is None:
            return cls()  # an empty file or section sets nothing
        if not isinstance(node.value, dict):
            self._refuse(node, path, f"{path or 'the file'}: got {describe(node.value)}, expected a section of keys")
            return cls()
        fields = {field.name: field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        values = {}
        for key, child in node.value.items():
            dotted = f"{path}.{key}" if path else key
            self.places[dotted] = child
            if key == "kind" and issubclass(cls, Component):
                continue  # it chose this class
            if key not in fields:
                self._refuse_unknown(child, key, dotted, cls)
                continue
            hint = hints[key]
            if isinstance(hint, type) and issubclass(hint, Component):
                member = self._member(hint, fields[key].default, child, dotted)
                if member is not None:
                    values[key] = self.section(member, child, dotted)
            elif hint is FreeSection:
                values[key] = self._free_section(child, dotted)
            elif dataclasses.is_dataclass(hint):
                values[key] = self.section(hint, child, dotted)
            elif typing.get_origin(hint) is tuple:
                values[key] = self._list(typing.get_args(hint)[0], child, dotted)
            else:
                expected, value = _scalar(hint, fields[key].metadata, child.value)
                if expected:
                    self._refuse(child, dotted, f"{dotted}: got {describe(child.value)}, expected {expected}")
                    if fields[key].default is dataclasses.MISSING:
                        values[key] = child.value  # there is nothing better, and the config will not be used
                else:
                    values[key] = value
        config = cls(**values)
        self._refuse_idle(config, node, path)
        return config

    def _refuse_idle(self, config: Any, node: Node, path: str) -> None:
        """Refuse settings that need another setting of their section, which is off. A default value is accepted where
        the other is explicitly off, as complete configs have it, and overrides that restore one."""
        prefix = f"{path}." if path else ""
        for field in dataclasses.fields(config):
            needs, works = field.metadata.get("needs", (None, None))
            if needs is None or field.name not in node.value or getattr(config, needs):
                continue
            if self.saved and not node.value[field.name].override:
                continue
            value, dotted, other = getattr(config, field.name), prefix + field.name, prefix + needs
            if {dotted, other} & self.doubtful or (value == field.default and needs in node.value):
                continue
            off = describe(getattr(config, needs))
            self._refuse(
                node.value[field.name],
                dotted,
                f"{dotted}: got {written(value)}, which has no effect while {other} is {off}; leave it out, or set "
                f"{other}={works} as well",
            )

    def _list(self, cls: Any, node: Node, path: str) -> tuple[Any, ...]:
        """Build a list of sections; the `path` of its third item is `path[2]`."""
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        if not isinstance(node.value, list):
            example = ", ".join(f"{field.name}: …" for field in dataclasses.fields(cls))
            self._refuse(node, path, f"{path}: got {describe(node.value)}, expected a list such as [{{{example}}}]")
            return ()
        items = []
        for number, child in enumerate(node.value):
            dotted = f"{path}[{number}]"
            missing = [name for name in required if not isinstance(child.value, dict) or name not in child.value]
            if missing:
                got = "a section without it" if isinstance(child.value, dict) else describe(child.value)
                self._refuse(child, path, f"{dotted}.{missing[0]}: got {got}, expected a section that has this key")
            else:
                items.append(self.section(cls, child, dotted))
        return tuple(items)

    def _free_section(self, node: Node, path: str) -> FreeSection:
        """Build a section with free keys. An override of a key wins, in whichever form the two are written."""
        if node.value is None:
            return FreeSection()
        if not isinstance(node.value, dict):
            self._refuse(node, path, f"{path}: got {describe(node.value)}, expected a section of keys")
            return FreeSection()
        found: dict[str, Node] = {}
        for dotted, child in _leaves(node):
            other = found.get(dotted)
            if other and other.override == child.override:
                self._refuse(child, path, f"{path}.{dotted}: repeated key; it is already set at {other.place}")
            elif not other or child.override:
                found[dotted] = child
                self.places[f"{path}.{dotted}"] = child
        return FreeSection.of({dotted: plain(child) for dotted, child in found.items()})

    def report(self, conflict: Conflict, root: Node) -> None:
        """Add a conflict at the place that caused it; an override takes precedence over the file."""
        keys = (conflict.key, *conflict.related)
        if any(key == doubt or key.startswith(doubt + ".") for key in keys for doubt in self.doubtful):
            return
        given = [self.places[key] for key in keys if key in self.places]
        chosen = [node for node in given if node.override] or given or [root]
        if conflict.idle and self.saved and not chosen[0].override:
            return
        self.problems.append(Problem(chosen[0].place, f"{conflict.key}: {conflict.message}"))

    def _member(self, family: type[Component], default: Any, node: Node, path: str) -> Any:
        """Return the class that `kind` chooses, or the default's class where `kind` is absent; None after a problem."""
        if not isinstance(node.value, dict):
            example = f"name such as {default.kind}" if family.by_name else f"section such as {{kind: {default.kind}}}"
            self._refuse(node, path, f"{path}: got {describe(node.value)}, expected a {example}")
            return None
        kind = node.value.get("kind")
        if kind is None:
            return type(default)
        if isinstance(kind.value, str) and kind.value in family.kinds:
            return family.kinds[kind.value]
        expected = f"one of {', '.join(family.kinds)}" + _hint(kind.value, family.kinds)
        self._refuse(kind, path, f"{path}.kind: got {describe(kind.value)}, expected {expected}")
        return None

    def _refuse(self, node: Node, key: str, message: str) -> None:
        self.problems.append(Problem(node.place, message))
        self.doubtful.add(key)

    def _refuse_unknown(self, node: Node, key: str, dotted: str, cls: Any) -> None:
        """Refuse an unknown key, and name the kinds that have it, else the same name below, similar names here, or the
        same name elsewhere."""
        names = [field.name for field in dataclasses.fields(cls)]
        section = dotted.removesuffix(key)
        if issubclass(cls, Component):
            owners = [kind for kind, member in cls.kinds.items() if key in member.__dataclass_fields__]
            if owners:
                replace = f"--set '{section.removesuffix('.')}={{kind: {cls.kind}}}'"
                message = f"kind {cls.kind!r} has no such key, only {' and '.join(map(repr, owners))}"
                self._refuse(node, dotted, f"{dotted}: {message}; to replace the whole component: {replace}")
                return
            names = ["kind", *names]
        found = [path for path in dict.fromkeys(_all_keys(cls, section)) if path.rpartition(".")[2] == key]
        found = found or [section + name for name in nearest(key, names)]
        if "seconds" in key or "time" in key:  # the keys of this section that are given in seconds
            found += [
                path for path in dict.fromkeys(_all_keys(cls, section)) if path.endswith("time_s") and path not in found
            ]
        found = found or list(dict.fromkeys(path for path in _all_keys(self.root) if path.rpartition(".")[2] == key))
        hint = f"nearest: {', '.join(found)}" if found else f"expected one of {', '.join(names) or 'none'}"
        self._refuse(node, dotted, f"{dotted}: unknown key; {hint}")
        self.doubtful.update(found)


def _leaves(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Yield the values of nested sections, by dotted key."""
    for key, child in node.value.items():
        if isinstance(child.value, dict):
            yield from _leaves(child, f"{path}{key}.")
        else:
            yield path + key, child


def _all_keys(cls: Any, path: str = "") -> Iterator[str]:
    """Yield every dotted key that a config of this class may have."""
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        dotted = path + field.name
        if isinstance(hint, type) and issubclass(hint, Component):
            for member in hint.kinds.values():
                yield from _all_keys(member, dotted + ".")
        elif dataclasses.is_dataclass(hint) and hint is not FreeSection:
            yield from _all_keys(hint, dotted + ".")
        yield dotted


def _scalar(hint: Any, metadata: Mapping[str, Any], value: Any) -> tuple[str | None, Any]:
    """Return (None, value) where it fits its type and limits, else (what was expected, None)."""
    options = typing.get_args(hint) or (hint,)
    optional = type(None) in options
    if value is None and optional:
        return None, None
    or_null = " or null" if optional else ""
    if bool in options and str in options:  # such as auto, true or false
        if isinstance(value, bool) or value in metadata["choices"]:
            return None, value
        names = (*metadata["choices"], "true", "false")
        return f"one of {', '.join(names)}{or_null}" + _hint(value, names), None
    (kind,) = (option for option in options if option is not type(None))

    if kind is bool:
        return (None, value) if isinstance(value, bool) else (f"true or false{or_null}", None)
    if kind is str:
        choices = metadata.get("choices")
        if not isinstance(value, str):
            return f"{'one of ' + ', '.join(choices) if choices else 'text'}{or_null}", None
        if choices and value not in choices:
            return f"one of {', '.join(choices)}" + _hint(value, choices), None
        return None, value

    number = isinstance(value, int | float) and not isinstance(value, bool)
    wanted = ("an integer" if kind is int else "a number") + _limits(metadata) + or_null
    if not number:
        return wanted, None
    if kind is int and isinstance(value, float):
        return wanted + (f", written {int(value)}" if value.is_integer() else ""), None
    try:
        value = kind(value)
    except OverflowError:
        return wanted, None
    within = (  # false for nan, and for inf: nothing is below it
        value >= metadata.get("minimum", -math.inf)
        and value <= metadata.get("maximum", math.inf)
        and value > metadata.get("above", -math.inf)
        and value < metadata.get("below", math.inf)
    )
    return (None, value) if within else (wanted, None)


def _limits(metadata: Mapping[str, Any]) -> str:
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    limits = [f"{words[name]} {metadata[name]}" for name in words if name in metadata]
    return " " + " and ".join(limits) if limits else ""


def _hint(name: Any, valid: Iterable[str]) -> str:
    found = nearest(name, valid) if isinstance(name, str) else []
    return f"; nearest: {', '.join(found)}" if found else ""
