"""Compare models with significance tests; a single model gets its scores and curves.

python scripts/compare.py runs/one runs/two
python scripts/compare.py runs/one runs/two --tasks bits_per_byte,blimp --tasks-dir DIR --output comparison.html
python scripts/compare.py --group bytes=runs/bytes-1,runs/bytes-2 --group subwords='runs/subwords-*' --figures DIR
python scripts/compare.py one.json two.json      # of evaluate.py --output one.json --items one.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

MEASURES = ("accuracy", "accuracy_per_byte", "truth_probability")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments; None: those of the process. Returns the exit code, if any."""
    parser = argparse.ArgumentParser(
        description="Compare models by paired tests on the same items: scores with intervals, differences with "
        "p-values corrected for the number of tests, and figures. Runs that differ only in seed form a group; groups "
        "are compared by mean and standard deviation (docs/evals.md).",
    )
    parser.add_argument("models", metavar="RUN|FILE.json", nargs="*", help="runs, checkpoints, or results with items")
    parser.add_argument(
        "--group", action="append", default=[], metavar="NAME=RUN,RUN",
        help="runs that form a group, by path or quoted pattern; may be repeated (default: runs whose settings differ "
        "only in seed)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", default="bits_per_byte,minimal_pairs", metavar="NAME,…",
        help="tasks to run on runs and checkpoints (default: bits_per_byte,minimal_pairs)",
    )  # fmt: skip
    parser.add_argument("--tasks-dir", metavar="DIR", help="folder with the items, NAME.jsonl[.gz|.xz|.zst]")
    parser.add_argument("--data", metavar="DIR", help="prepared data (default: that of each run)")
    parser.add_argument(
        "--measure", choices=MEASURES, default=MEASURES[0], help="measure of multiple-choice tasks (default: accuracy)"
    )
    parser.add_argument("--output", metavar="FILE.html", help="also write a page with tables and figures")
    parser.add_argument("--figures", metavar="DIR", help="also write each figure to this folder, as SVG and PDF")
    args = parser.parse_args(argv)

    from stlm.errors import StlmError
    from stlm.evals import Options, load_tasks
    from stlm.evals.comparison.paired import compare, comparison_text, evaluate_samples, read_samples
    from stlm.evals.comparison.plots import write_figures, write_page
    from stlm.evals.comparison.seed_groups import groups_of, run_of

    if args.output and not args.output.endswith(".html"):
        raise StlmError(f"--output: got {args.output!r}, expected FILE.html; figures: --figures DIR")
    if args.figures and Path(args.figures).is_file():
        raise StlmError(f"--figures: {args.figures} is a file, expected a folder, which may be new")
    groups = groups_of(args.models, args.group)
    models = [model for members in groups.values() for model in members]
    if not models or len(set(args.models)) < len(args.models):
        raise StlmError(f"got {' '.join(args.models) or 'no model'}, expected one or more models, each once")
    read = {name for name in models if Path(name).suffix == ".json"}
    tasks = {} if read == set(models) else load_tasks(args.tasks, Options(args.tasks_dir))
    samples = {
        name: read_samples(Path(name), args.measure)
        if name in read
        else evaluate_samples(name, tasks, args.data, args.measure)
        for name in models
    }
    comparison = compare(samples, groups)
    print(comparison_text(comparison))
    runs = {name: folder for name in models if (folder := run_of(name)) is not None}
    if args.output:
        write_page(Path(args.output), comparison, runs)
        print(f"\npage     {args.output}")
    if args.figures:
        files = write_figures(Path(args.figures), comparison, runs)
        print(f"\nfigures  {', '.join(sorted({path.stem for path in files}))} in {args.figures}, as SVG and PDF")
    return 0
