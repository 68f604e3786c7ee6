"""Registries, which map a config's `kind` to a class, and `Vocabulary`, with which the class is built."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from stlm.errors import ConfigError

Component = TypeVar("Component", bound=nn.Module)


class Registry(Generic[Component]):
    """Classes by kind. `register` is a decorator; `registry[kind]` raises ConfigError that names the nearest kinds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._classes: dict[str, type[Component]] = {}

    def register(self, kind: str) -> Callable[[type[Component]], type[Component]]:
        def add(cls: type[Component]) -> type[Component]:
            assert kind not in self._classes, f"{self.name} {kind!r} is registered twice"
            self._classes[kind] = cls
            return cls

        return add

    def __getitem__(self, kind: str) -> type[Component]:
        if kind not in self._classes:
            near = difflib.get_close_matches(kind, self._classes, n=3, cutoff=0.4) or sorted(self._classes)
            raise ConfigError(f"model.{self.name}.kind: got {kind!r}, which is unknown; nearest: {', '.join(near)}")
        return self._classes[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))


@dataclass(frozen=True)
class Vocabulary:
    """The text of each id, in bytes. It follows from the tokenizer, so neither config nor checkpoint holds it."""

    spellings: tuple[bytes, ...]  # of id 0, 1, …; special ids stand for no text and have b""

    @property
    def size(self) -> int:
        """The number of ids."""
        return len(self.spellings)
