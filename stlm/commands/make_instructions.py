"""Write questions about the default corpus, with answers, as JSON Lines for preprocess.py --conversations.

python scripts/make_instructions.py --output data/instructions.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data_pipeline.plurals import number_of
from data_pipeline.sources.default_corpus.instructions import TASKS, as_lines, instructions
from data_pipeline.storage.atomic import write_text
from stlm.commands.options import at_least


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments; None: those of the process. Returns the exit code, if any."""
    parser = argparse.ArgumentParser(
        description="Write questions of several kinds over sentences of the default corpus: "
        f"{', '.join(task.name for task in TASKS)}. Each has one correct answer."
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON Lines file to write")
    parser.add_argument(
        "--number", type=at_least(1), default=20_000, metavar="N", help="conversations (default: 20000)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed writes the same file (default: 0)"
    )
    args = parser.parse_args(argv)
    write_text(args.output, as_lines(instructions(args.number, args.seed)))
    print(f"wrote {args.output}: {number_of(args.number, 'conversation')}")
    return 0
