"""Building blocks of config dataclasses: settings with limits, and components chosen by `kind`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

ON_REQUEST = "on request"  # pretrain.py --allow-change


def setting(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    may_change: bool | str = False,
    needs: tuple[str, Any] | None = None,
) -> Any:
    """Return a dataclass field with a help line, its unit (None: it has none) and limits.

    `minimum` and `maximum` are inclusive, `above` and `below` exclusive. `may_change`: True if the setting may differ
    when a run is resumed, ON_REQUEST if only with --allow-change; otherwise it must stay. `needs` names a setting of
    the same section without which (null, false or 0) this one has no effect, and a value of it that works; a setting
    without effect is refused.
    """
    others = {"unit": unit, "minimum": minimum, "maximum": maximum, "above": above, "below": below,
              "choices": choices, "needs": needs}  # fmt: skip
    given = {name: value for name, value in others.items() if value is not None}
    return dataclasses.field(default=default, metadata={"help": help, "may_change": may_change, **given})


class Conflict(NamedTuple):
    """Settings that contradict each other.

    `key` is the dotted key to change, `message` says got and expected with a value that works, and `related` are the
    other keys involved; all keys are relative to the config that is checked. `idle`: the setting merely has no effect,
    so configs that an earlier version accepted and saved are not refused for it.
    """

    key: str
    message: str
    related: tuple[str, ...] = ()
    idle: bool = False

    def under(self, section: str) -> Conflict:
        """Return this conflict with its keys relative to the config one level up."""
        related = tuple(f"{section}.{key}" for key in self.related)
        return self._replace(key=f"{section}.{self.key}", related=related)


@dataclasses.dataclass(frozen=True)
class FreeSection:
    """A section whose keys are free, such as names of modules: dotted keys, in the order written, and their values.

    A dotted key and sections within sections are the same: {attention.output: all}, {attention: {output: all}}.
    """

    entries: tuple[tuple[str, Any], ...] = ()  # values are scalars, or tuples of values

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> FreeSection:
        """Build a section from dotted keys and values as YAML gives them."""
        return cls(tuple((key, _frozen(value)) for key, value in section.items()))

    def plain(self) -> dict[str, Any]:
        """Return the mapping from which `of` builds an equal section."""
        return {key: _thawed(value) for key, value in self.entries}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


class Component:
    """Base of the parts that a config chooses by the key `kind`.

    Each direct subclass is a family (embedders, cores, heads) with a table `kinds` of its own; `@register("name")`
    above a frozen dataclass adds a member to its family.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Component]]]
    by_name: ClassVar[bool] = False  # a family whose kind may be written alone: `key: KIND` for `key: {kind: KIND}`

    def __init_subclass__(cls) -> None:
        if Component in cls.__bases__:
            cls.kinds = {}

    def check(self, model: Any) -> Iterator[Conflict]:
        """Yield the conflicts with the rest of the ModelConfig, keys relative to it; none by default."""
        yield from ()


Member = TypeVar("Member", bound=type[Component])


def register(kind: str) -> Callable[[Member], Member]:
    """Register the decorated dataclass under `kind` in its family."""

    def add(member: Member) -> Member:
        assert kind not in member.kinds, f"two components of the same family are called {kind!r}"
        member.kind = kind
        member.kinds[kind] = member
        return member

    return add
