#!/usr/bin/env python
"""Which model is better, and is that more than chance?

python scripts/compare.py runs/one runs/two
python scripts/compare.py runs/one runs/two --tasks bits_per_byte,blimp --tasks-dir DIR --output comparison.html
python scripts/compare.py one.json two.json      # of evaluate.py --output one.json --items one.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _command import run

MEASURES = ("accuracy", "accuracy_per_byte", "truth_probability")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare models by paired tests on the same items: scores with intervals, differences with "
        "p-values that are corrected for the number of tests, and plots (docs/evals.md).",
    )
    parser.add_argument("models", metavar="RUN|FILE.json", nargs="+", help="runs, checkpoints, results with items")
    parser.add_argument(
        "--tasks", default="bits_per_byte,minimal_pairs", metavar="NAME,…",
        help="what runs and checkpoints are asked (default: bits_per_byte,minimal_pairs)",
    )  # fmt: skip
    parser.add_argument("--tasks-dir", metavar="DIR", help="folder of NAME.jsonl[.gz|.xz|.zst], the items of tasks")
    parser.add_argument("--data", metavar="DIR", help="prepared data (default: those of each run)")
    parser.add_argument(
        "--measure", choices=MEASURES, default=MEASURES[0], help="of tasks of choices (default: accuracy)"
    )
    parser.add_argument("--output", metavar="FILE.html|FILE.png", help="also write tables and plots")
    args = parser.parse_args()

    from stlm.errors import StlmError
    from stlm.evals.comparison import compare, comparison_text, read_samples
    from stlm.evals.comparison_plots import read_curve, write_plots

    if len(args.models) < 2 or len(set(args.models)) < len(args.models):
        raise StlmError(f"got {' '.join(args.models)}, expected two or more models, each once")
    if args.output and not args.output.endswith((".html", ".png")):
        raise StlmError(f"--output: got {args.output!r}, expected a name that ends in .html or .png")
    samples = {}
    for name in args.models:
        path = Path(name)
        samples[name] = read_samples(path, args.measure) if path.suffix == ".json" else asked(name, args)
    comparison = compare(samples)
    print(comparison_text(comparison))
    if args.output:
        curves = {name: read_curve(Path(name)) for name in args.models}
        write_plots(Path(args.output), comparison, {name: curve for name, curve in curves.items() if curve})
    return 0


def asked(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Score a model on the tasks, now."""
    from stlm.evals import NEED_DATA, Options, Subject, load_tasks
    from stlm.evals.comparison import Sample

    tasks = load_tasks(args.tasks, Options(args.tasks_dir))
    subject = Subject.open(name, args.data, with_data=not NEED_DATA.isdisjoint(tasks))
    found = {}
    for task, score in tasks.items():
        result = score(subject)
        sample = Sample.of(result.values, (item.values() for item in result.items), args.measure)
        if sample is not None:
            found[task] = sample
    return found


if __name__ == "__main__":
    run(main)
