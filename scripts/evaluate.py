#!/usr/bin/env python
"""How good a trained model is.

python scripts/evaluate.py runs/quickstart
"""

from __future__ import annotations

import argparse
import json

from _command import run


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Score a trained model on the validation text of its data: bits per byte, beside what gzip, bz2 "
        "and xz reach on the same bytes. Lower is better.",
    )
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="run (its newest checkpoint), checkpoint or model")
    parser.add_argument(
        "--tasks", default="bits_per_byte", metavar="NAME,…", help="what to measure (default: bits_per_byte)"
    )
    parser.add_argument("--data", metavar="DIR", help="prepared data (default: those of the run)")
    parser.add_argument(
        "--stride", type=int, metavar="IDS", help="ids from one window to the next (default: half of the context)"
    )
    parser.add_argument("--output", metavar="FILE.json", help="also write the results here, with full digits")
    args = parser.parse_args()

    # Only now, so that --help and misspelt options answer at once.
    from data_pipeline.atomic import write_text
    from stlm.evals import Subject, select_tasks

    tasks = select_tasks(args.tasks)
    subject = Subject.open(args.model, args.data)
    print(subject)
    results = {}
    for name, task in tasks.items():
        result = task(subject.model, subject.data, args.stride, subject.documents_apart)
        results[name] = result.values
        print(f"\n{result.text}")
    if args.output:
        write_text(args.output, json.dumps({**subject.values(), "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
