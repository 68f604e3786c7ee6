"""Types of arguments, and arguments that several commands share. Without torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable

PRECISION = "weight precision; lower is faster and changes the output slightly (default: fp32)"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument `model`."""
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="run (its newest checkpoint), checkpoint or model")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--set KEY=VALUE …`, which may be repeated."""
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
        help="override settings of the config, for example training.max_steps=200",
    )  # fmt: skip


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Accept the option that launchers add; ranks are read from the environment."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def refuse(
    parser: argparse.ArgumentParser, args: argparse.Namespace, options: Iterable[str], other: str, why: str
) -> None:
    """Exit with a usage error if any of `options` is given: they have no effect with `other`."""
    given = [name for name in options if getattr(args, name) is not None and getattr(args, name) is not False]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        parser.error(f"{names}: no effect with {other}, {why}; leave one of them out")


def typed(command: str) -> str:
    """Return another command as the user would type it: `stlm NAME` or `python scripts/NAME.py`."""
    return f"stlm {command}" if sys.argv[0].startswith("stlm ") else f"python scripts/{command}.py"


def at_least(minimum: int) -> Callable[[str], int]:
    """Return an argument type: integers of at least `minimum`."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {minimum}")
        return int(text)

    return integer


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    """Return an argument type: numbers from `minimum` to `maximum`."""

    def real(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from {minimum:g} to {maximum:g}")
        return value

    return real


def above_zero(text: str) -> float:
    """Argument type: finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


def some_text(text: str) -> str:
    """Argument type: text that is not empty, in valid UTF-8."""
    if not text:
        raise argparse.ArgumentTypeError("got '', expected a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected valid UTF-8")
    return text


def names(text: str) -> tuple[str, ...]:
    """Argument type: names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
