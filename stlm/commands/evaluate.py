"""Evaluate a trained model.

python scripts/evaluate.py runs/quickstart
python scripts/evaluate.py runs/quickstart --tasks blimp,arc_easy --tasks-dir DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from stlm.commands.options import add_model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments; None: those of the process. Returns the exit code, if any."""
    parser = argparse.ArgumentParser(
        description="Evaluate a trained model: bits per byte of the validation text of its data (lower is better), "
        "compared with gzip, bz2 and xz on the same bytes, and tasks in which it chooses between texts "
        "(docs/evals.md).",
    )
    add_model(parser)
    parser.add_argument(
        "--tasks", default="bits_per_byte", metavar="NAME,…", help="tasks to run (default: bits_per_byte)"
    )
    items_from = parser.add_mutually_exclusive_group()
    items_from.add_argument("--tasks-dir", metavar="DIR", help="folder with the items, NAME.jsonl[.gz|.xz|.zst]")
    items_from.add_argument("--hub", action="store_true", help="fetch the items from the Hugging Face hub")
    parser.add_argument(
        "--shots", type=int, default=0, metavar="N",
        help="solved examples at the beginning of each prompt, from NAME.shots.jsonl (default: 0)",
    )  # fmt: skip
    parser.add_argument("--all-checkpoints", action="store_true", help="evaluate each checkpoint of a run")
    parser.add_argument("--data", metavar="DIR", help="prepared data (default: that of the run)")
    parser.add_argument(
        "--split", choices=("validation", "test"),
        help="split of the data to read; preprocess.py --test makes the test split (default: validation)",
    )  # fmt: skip
    parser.add_argument("--reference", metavar="RUN", help="text_quality: model that scores the generated text")
    parser.add_argument(
        "--stride", type=int, metavar="IDS", help="ids from one window to the next (default: half of the context)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32",
        help="precision of matrix products; bf16 is faster where the hardware has it, and may decide near ties "
        "otherwise (default: fp32)",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE.json|FILE.md", help="also write the results here, with all digits")
    parser.add_argument("--items", metavar="FILE.jsonl", help="also write the scores of each choice of each item here")
    args = parser.parse_args(argv)
    if args.output and not args.output.endswith((".json", ".md")):
        parser.error(f"--output: got {args.output!r}, expected FILE.json or FILE.md")
    for option, name in (("--output", args.output), ("--items", args.items)):
        if name and Path(name).is_dir():
            parser.error(f"{option}: {name} is a folder, expected a file, which may be new")

    # Imported late, so that --help and usage errors are fast.
    from stlm.evals import DATA_TASKS, Options, complete_checkpoints, curve_text, load_tasks
    from stlm.evals.evaluation import evaluate, write_results

    options = Options(args.tasks_dir, args.shots, args.stride, args.precision, args.hub, args.reference)
    tasks = load_tasks(args.tasks, options)
    for option in ("split", "data"):
        if getattr(args, option) and tasks.keys().isdisjoint(DATA_TASKS):
            parser.error(f"--{option}: {', '.join(tasks)} read no prepared data; leave it out")
    models = complete_checkpoints(args.model) if args.all_checkpoints else [args.model]
    found = evaluate(models, tasks, print, data=args.data, split=args.split or "validation")
    if args.all_checkpoints:
        print(f"\n{curve_text(found.models)}")
    write_results(found, args.output, args.items, several=args.all_checkpoints)
    return 0
