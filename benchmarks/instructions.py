#!/usr/bin/env python
"""Share of new questions that a model fine-tuned by scripts/instruct.sh answers correctly.

    python benchmarks/instructions.py [RUN_OR_CHECKPOINT] [--number 50]

The questions are of the kinds of data_pipeline/sources/default_corpus/instructions.py, drawn with another seed;
training questions are skipped. An answer, generated at temperature 0, is correct if it equals the expected one exactly.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.sources.conversations import END_OF_TURN, prompt_of
from data_pipeline.sources.default_corpus.instructions import instructions
from stlm.stlm import STLM

ASKED_IN_TRAINING = 20_000  # scripts/make_instructions.py


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="runs/instruct", help="(default: runs/instruct)")
    parser.add_argument("--number", type=int, default=50, help="questions (default: 50)")
    options = parser.parse_args()
    model = STLM.load(options.model)
    known = {conversation["messages"][0]["content"] for conversation in instructions(ASKED_IN_TRAINING)}
    new = (one["messages"] for one in instructions(ASKED_IN_TRAINING, seed=1))
    num_right = 0
    for question, answer in islice((pair for pair in new if pair[0]["content"] not in known), options.number):
        text = model.generate(prompt_of([question]), max_new_ids=80, temperature=0.0)
        got, ended, _ = text.partition(END_OF_TURN)
        right = bool(ended) and got == answer["content"]
        num_right += right
        print(f"{'right' if right else '     '}  {question['content']}  →  {got}", flush=True)
    print(f"\n{num_right} of {options.number} right")


if __name__ == "__main__":
    main()
