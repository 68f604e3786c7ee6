"""Train probes on a model's representations.

python scripts/probe.py runs/mine --tasks cola,sst2,rte --tasks-dir DIR
python scripts/probe.py runs/mine --tasks cola --tasks-dir DIR --method finetune --max-train-examples 2000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from stlm.commands.options import add_model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train a probe for each GLUE task on the representations of a model, which is not changed, and "
        "score it on unseen examples, compared with the majority label (docs/evals_reference.md).",
    )
    add_model(parser)
    parser.add_argument(
        "--tasks", required=True, metavar="NAME,…",
        help="tasks: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli",
    )  # fmt: skip
    items_from = parser.add_mutually_exclusive_group(required=True)
    items_from.add_argument("--tasks-dir", metavar="DIR", help="folder with glue_NAME.{train,dev}.jsonl[.gz|.xz|.zst]")
    items_from.add_argument("--hub", action="store_true", help="fetch the examples from the Hugging Face hub")
    parser.add_argument(
        "--method", choices=("linear", "finetune", "lora"), default="linear",
        help="linear: a linear map of frozen vectors; finetune: all weights of a copy of the model; lora: low-rank "
        "corrections of them (default: linear)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs with different seeds (default: 3)")
    parser.add_argument(
        "--max-train-examples", type=int, metavar="N", help="train on N examples, drawn by each seed (default: all)"
    )
    parser.add_argument("--output", metavar="FILE.json|FILE.md", help="also write the results here, with all digits")
    args = parser.parse_args(argv)

    # Imported late, so that --help and usage errors are fast.
    from data_pipeline.storage.atomic import write_text
    from stlm.errors import StlmError
    from stlm.evals import METHODS, ProbeOptions, Subject, load_glue, probe, probe_markdown, probe_text
    from stlm.evals.probing.report import NOTES

    if args.output and Path(args.output).is_dir():
        raise StlmError(f"--output: {args.output} is a folder, expected a file that ends in .json or .md")
    options = ProbeOptions(args.seeds, args.max_train_examples)
    tasks = load_glue(args.tasks, args.tasks_dir, args.hub)
    subject = Subject.open(args.model, with_data=False)
    print(subject)
    method = METHODS[args.method](subject.model)
    head = {**subject.values(), "method": args.method, "seeds": args.seeds}
    results = {}
    for task in tasks:
        results[task.name] = probe(task, method, options)
        print(f"\n{probe_text({task.name: results[task.name]})}", flush=True)
        if args.output:  # keep the results so far if the rest is interrupted
            as_json = json.dumps({**head, "results": results}, indent=2) + "\n"
            write_text(args.output, probe_markdown(head, results) if args.output.endswith(".md") else as_json)
    print(f"\n{NOTES}")
    return 0
