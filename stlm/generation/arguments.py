"""Checks of the arguments of `STLM.generate` and similar methods: texts and numbers."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from stlm.errors import ConfigError


def check_integer(name: str, value: Any, least: int | None = None) -> None:
    """Raise ConfigError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and value < least):
        limit = "" if least is None else f" of at least {least}"
        raise ConfigError(f"{name}: got {value!r}, expected an integer{limit}")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise ConfigError unless `value` is a number from `low` to `high`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):  # also False for NaN
        raise ConfigError(f"{name}: got {value!r}, expected a number from {low:g} to {high:g}")


def check_boolean(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: got {value!r}, expected True or False")


def check_biases(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is pairs of an id and a number from -100 to 100."""
    pairs = isinstance(value, tuple | list) and all(isinstance(one, tuple | list) and len(one) == 2 for one in value)
    if not pairs:
        raise ConfigError(f"{name}: got {value!r}, expected pairs of id and number: ((65, 5.0),)")
    for id, bias in value:
        check_integer(name, id, 0)
        check_number(f"{name} of id {id}", bias, -100, 100)


def check_text(name: str, value: Any) -> str:
    """Return `value` if it is a string; raise ConfigError otherwise."""
    if not isinstance(value, str):
        raise ConfigError(f"{name}: got {type(value).__name__}, expected one text (str)")
    return value


def check_texts(name: str, value: Any, instead: str) -> list[str]:
    """Return a list of strings; raise ConfigError if `value` is one string, or if an entry is not a string."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ConfigError(f"{name}: got one {type(value).__name__}, expected a list of texts; {instead}")
    return [check_text(f"{name}[{number}]", text) for number, text in enumerate(value)]


def stop_strings(stop: Any) -> list[str]:
    """Return the stop strings as a list; `stop` may be one string. Raises ConfigError for empty or invalid strings."""
    stops = check_texts("stop", [stop] if isinstance(stop, str) else stop, "a stop string is a str")
    if "" in stops:
        raise ConfigError("stop: got '', expected a text that is not empty; leave stop out for none")
    for text in stops:
        if any("\ud800" <= character <= "\udfff" for character in text):  # a byte that is not UTF-8, escaped
            raise ConfigError(f"stop: got {text!r}, which contains a lone surrogate; expected valid Unicode")
    return stops
