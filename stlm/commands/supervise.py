"""Restart a training command after a failure; it resumes from its last checkpoint.

    python scripts/supervise.py -- deepspeed scripts/pretrain.py --ds_config ds_configs/zero2.json --run runs/long
    python scripts/supervise.py --ranks 4 --min-ranks 2 -- deepspeed --num_accelerators {ranks} scripts/pretrain.py …

The supervisor stops when the command exits with 0 (done), 2 (user error) or a code named by --final, or when the
supervisor itself receives SIGINT, SIGTERM, SIGHUP or SIGUSR1, which it forwards. It exits with the command's exit code.
Before each restart it ends the processes that the last start left running. Name the run with --run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stlm.commands.options import at_least
from stlm.training.supervisor import supervise


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--max-restarts", type=at_least(0), default=3, metavar="N", help="restarts after the first start (default: 3)"
    )
    parser.add_argument(
        "--ranks", type=at_least(1), metavar="N", help="number that replaces {ranks} in the command at the first start"
    )
    parser.add_argument(
        "--min-ranks", type=at_least(1), metavar="N",
        help="halve the ranks at each restart, down to N (default: the same ranks at each)",
    )  # fmt: skip
    parser.add_argument(
        "--final", type=int, action="append", default=[], metavar="CODE",
        help="also stop at this exit code, for example 3 where something else stops the ranks; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="S",
        help="seconds between asking left processes to end and killing them (default: 30)",
    )  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="command to run")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error(
            "got no command, expected one after --, for example: -- python scripts/pretrain.py --run runs/long"
        )
    if any("{ranks}" in word for word in command) != (args.ranks is not None):
        parser.error("--ranks N needs {ranks} in the command, and the reverse: deepspeed --num_accelerators {ranks} …")
    min_ranks = args.min_ranks or args.ranks or 1
    if min_ranks > (args.ranks or min_ranks):
        parser.error(f"--min-ranks: got {min_ranks}, expected 1 to {args.ranks}")
    return supervise(
        command, log, max_restarts=args.max_restarts, ranks=args.ranks or 1, min_ranks=min_ranks,
        grace_s=args.grace, final=args.final,
    )  # fmt: skip


def log(text: str) -> None:
    """Print a line to stderr, marked as the supervisor's."""
    print(f"supervise: {text}", file=sys.stderr, flush=True)
