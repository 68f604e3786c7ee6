"""Describe a model: its parts, parameters, FLOPs and memory, before or after training.

python scripts/describe.py quickstart
python scripts/describe.py quickstart --set model.core.num_layers=8 --ranks 4
python scripts/describe.py runs/quickstart
python scripts/describe.py runs/quickstart --step 100 --rows 0-1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from stlm.commands.options import above_zero, add_overrides, at_least, refuse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments; None: those of the process. Returns the exit code, if any."""
    from stlm.config import list_presets, load_run_config

    parser = argparse.ArgumentParser(
        description="Show parameters, FLOPs and memory of a model; of a run also its progress, or the text of a step.",
        epilog=f"presets:\n{list_presets()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="PRESET|FILE|RUN", help="preset, YAML file or run directory")
    add_overrides(parser)
    parser.add_argument(
        "--ranks", type=at_least(1), metavar="N", help="ranks that share a step (default: those of the run, or 2)"
    )
    parser.add_argument(
        "--bytes-per-id", type=above_zero, metavar="X",
        help="mean bytes of an id, for figures per byte (default: 1 for bytes, else that of the run's data, or 4)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all digits")
    parser.add_argument("--step", type=at_least(1), metavar="S", help="print only the text that step S is trained on")
    parser.add_argument("--rows", metavar="A-B", help="with --step: only these rows of the batch (default: all)")
    args = parser.parse_args(argv)
    if args.rows is not None and args.step is None:
        parser.error(f"--rows: got {args.rows} without --step S; --step 1 would work")
    if args.step is not None:
        refuse(parser, args, ("ranks", "bytes_per_id", "json"), "--step", "which prints only text")

    source = Path(args.source)
    config = load_run_config(args.source, args.set)
    from stlm.description.cost import costs
    from stlm.description.progress import progress_of, ranks_of, run_state
    from stlm.description.step_text import text_of_step
    from stlm.description.tables import readable

    if args.step is not None:
        print(text_of_step(config, args.step, args.rows, progress_of(source)))
        return 0
    facts = run_state(source) | costs(config, source, args.ranks or ranks_of(source) or 2, args.bytes_per_id)
    print(json.dumps(facts, indent=2) if args.json else readable(args.source, facts))
    return 0
