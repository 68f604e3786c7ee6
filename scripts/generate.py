#!/usr/bin/env python
"""Text from a trained model.

python scripts/generate.py runs/quickstart --prompt "The module"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from _command import run


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Continue a prompt. Without --prompt, every line that is typed or piped in is one.",
    )
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="run (its newest checkpoint), checkpoint or model")
    parser.add_argument("--prompt", metavar="TEXT", help="what the text begins with; may be empty")
    parser.add_argument(
        "--max-ids", type=at_least(0), default=256, metavar="N", help="longest continuation in ids (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        type=number(0.0, 100.0),
        default=0.8,
        metavar="T",
        help="1: as the model says, lower: likelier ids, 0: always the likeliest (default: 0.8)",
    )
    parser.add_argument("--top-k", type=at_least(1), metavar="K", help="draw from the K likeliest ids only")
    parser.add_argument(
        "--top-p",
        type=number(0.0, 1.0),
        metavar="P",
        help="draw from the fewest ids that hold this share of the probability",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="the same seed draws the same text (default: 0)"
    )
    faster = parser.add_mutually_exclusive_group()
    faster.add_argument(
        "--exit-threshold",
        type=number(1e-9, 1.0),
        metavar="P",
        help="of a model with exits: draw each id from the first exit that gives some id this probability",
    )
    faster.add_argument(
        "--speculative",
        choices=("self",),
        help="self, of a model with exits: draft ids with the first layers, verify them with the rest: the text stays "
        "what it is at temperature 0, and as likely as it is otherwise",
    )
    parser.add_argument(
        "--drafts",
        type=at_least(1),
        default=4,
        metavar="N",
        help="ids drafted at a time, with --speculative (default: 4)",
    )
    args = parser.parse_args()

    import torch  # only now: --help and misspelt options answer at once

    from stlm.generation import Effort
    from stlm.stlm import STLM

    model = STLM.load(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: what comes is valid UTF-8
    for number_of_prompt, prompt in enumerate(prompts(args.prompt)):
        effort = Effort()
        pieces = model.generate_stream(
            prompt,
            max_new_ids=args.max_ids,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed + number_of_prompt,
            exit_threshold=args.exit_threshold,
            speculative=args.speculative,
            num_drafts=args.drafts,
            effort=effort,
        )
        show(prompt, pieces)
        if effort.ids:
            print(effort, file=sys.stderr)
    return 0


def prompts(given: str | None) -> Iterator[str]:
    """The one given on the command line, else lines as they are typed or piped in."""
    if given is not None:
        yield given
    elif sys.stdin.isatty():
        print("Type the beginning of a text and press Enter; Ctrl-D ends.", file=sys.stderr)
        while True:
            try:
                yield input("› ")
            except EOFError:
                print(file=sys.stderr)
                return
    else:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        for line in sys.stdin:
            yield line.rstrip("\r\n")


def show(prompt: str, pieces: Iterator[str]) -> None:
    """The prompt and what follows it, as it comes, on lines of its own."""
    first = next(pieces, "")  # if the model cannot read the prompt, this says so, and nothing is shown
    print(prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def at_least(minimum: int):
    """An argparse type: integers from `minimum` on."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {minimum}")
        return int(text)

    return integer


def number(minimum: float, maximum: float):
    """An argparse type: numbers from `minimum` to `maximum`."""

    def real(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from {minimum:g} to {maximum:g}")
        return value

    return real


if __name__ == "__main__":
    run(main)
