"""Evaluate a trained model.

python scripts/evaluate.py runs/quickstart
python scripts/evaluate.py runs/quickstart --tasks blimp,arc_easy --tasks-dir DIR
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Score a trained model: bits per byte of the validation text of its data (lower is better), beside "
        "what gzip, bz2 and xz reach on the same bytes, and tasks in which it chooses between texts (docs/evals.md).",
    )
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="run (its newest checkpoint), checkpoint or model")
    parser.add_argument(
        "--tasks", default="bits_per_byte", metavar="NAME,…", help="what to measure (default: bits_per_byte)"
    )
    items_from = parser.add_mutually_exclusive_group()
    items_from.add_argument("--tasks-dir", metavar="DIR", help="folder of NAME.jsonl[.gz|.xz|.zst], the items of tasks")
    items_from.add_argument("--hub", action="store_true", help="fetch the items of tasks from the Hugging Face hub")
    parser.add_argument("--shots", type=int, default=0, metavar="N", help="examples in front, from NAME.shots.jsonl")
    parser.add_argument("--all-checkpoints", action="store_true", help="each one of a run: the curve of its training")
    parser.add_argument("--data", metavar="DIR", help="prepared data (default: those of the run)")
    parser.add_argument(
        "--split", choices=("validation", "test"), help="text of the data that is read: for validation, or that which "
        "preprocess.py --test set apart (default: validation)",
    )  # fmt: skip
    parser.add_argument("--reference", metavar="RUN", help="text_quality: another model, which judges the text")
    parser.add_argument(
        "--stride", type=int, metavar="IDS", help="ids from one window to the next (default: half of the context)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products; bf16 is faster where a "
        "machine has it, and turns the choice between near ties (default: fp32)",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE.json|FILE.md", help="also write the results here, with full digits")
    parser.add_argument("--items", metavar="FILE.jsonl", help="also write what each choice of each item got")
    args = parser.parse_args(argv)

    if args.output and not args.output.endswith((".json", ".md")):
        parser.error(f"--output: got {args.output!r}, expected FILE.json or FILE.md")
    for option, name in (("--output", args.output), ("--items", args.items)):
        if name and Path(name).is_dir():
            parser.error(f"{option}: {name} is a folder, expected a file, which may be new")

    # Imported late, so that --help and usage errors are fast.
    from data_pipeline.storage.atomic import write_text
    from stlm.evals import (
        DATA_TASKS,
        Options,
        Subject,
        complete_checkpoints,
        curve_text,
        load_tasks,
        markdown,
        overview_text,
    )

    tasks = load_tasks(
        args.tasks, Options(args.tasks_dir, args.shots, args.stride, args.precision, args.hub, args.reference)
    )
    with_data = not tasks.keys().isdisjoint(DATA_TASKS)
    for option in ("split", "data"):
        if getattr(args, option) and not with_data:
            parser.error(f"--{option}: {', '.join(tasks)} read no prepared data; leave it out")
    judged: list[dict[str, Any]] = []
    pages, items = [], []
    for path in complete_checkpoints(args.model) if args.all_checkpoints else [args.model]:
        subject = Subject.open(path, args.data, with_data, args.split or "validation")
        print(f"\n{subject}" if judged else subject)
        results = {}
        for name, task in tasks.items():
            result = task(subject)
            results[name] = result.values
            of_model = {"task": name, "step": subject.progress.get("step")}
            items += [json.dumps({**of_model, **one.values()}) + "\n" for one in result.items]
            if result.text:
                print(f"\n{result.text}")
        if overview := overview_text(results):
            print(f"\n{overview}")
        judged.append({**subject.values(), "results": results})
        pages.append(markdown(subject.values(), results))
    if args.all_checkpoints:
        print(f"\n{curve_text(judged)}")
    if args.output and args.output.endswith(".md"):
        write_text(args.output, "\n".join(pages))
    elif args.output:
        found: dict[str, Any] = {"checkpoints": judged} if args.all_checkpoints else judged[0]
        if args.items:
            found["items_file"] = os.path.relpath(args.items, Path(args.output).parent)
        write_text(args.output, json.dumps(found, indent=2) + "\n")
    if args.items:
        write_text(args.items, "".join(items))
    return 0
