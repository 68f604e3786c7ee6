"""Prepare text for training: shards of ids with a manifest, which scripts/pretrain.py reads.

Without options, the default corpus is prepared in data/default-byte. Several tokenizers, such as
sentencepiece:1024,2048,4096, are compared in a table instead. For prepared data:

    preprocess.py verify DIR    check every byte against its hash
    preprocess.py report DIR    write DIR/report.html again
    preprocess.py plan DIR      plan windows of whole documents, or from easy to hard
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from data_pipeline.config import CURRICULA, PACKINGS
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.loading.verify import verify
from data_pipeline.loading.window_plans import plan_dir, write_plan
from data_pipeline.plurals import number_of
from data_pipeline.preparation.appending import append_config
from data_pipeline.preparation.dry_run import dry_run
from data_pipeline.preparation.mpi import MPIRanks, joined
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.workers import Workers
from data_pipeline.report.page import write_report
from data_pipeline.report.preparing import append_and_report, prepare_and_report
from data_pipeline.report.tokenizer_comparison import compare_tokenizers, comparison_table, expand_specs
from data_pipeline.sources.text_files import ON_ERROR, QUOTING
from data_pipeline.tokenizers import find_tokenizer
from stlm.commands.options import names

SEVERAL: dict[str, Any] = {"action": "extend", "nargs": "+", "default": None}
# Each option by its field of PrepareConfig, which has its help and its default.
OPTIONS: dict[str, dict[str, Any]] = {
    "inputs": SEVERAL | {"option": "--input", "metavar": "PATH|HF_ID"},
    "tokenizer": {"metavar": "SPEC"},
    "tokenizer_from": {"metavar": "DIR"},
    "output": {"metavar": "DIR"},
    "limit": {"metavar": "N|SIZE"},
    "workers": {"metavar": "N", "type": int},
    "on_error": {"choices": ON_ERROR},
    "documents": {"metavar": "RULE"},
    "encoding": {"metavar": "NAME"},
    "quoting": {"choices": QUOTING},
    "text_key": {"metavar": "KEY"},
    "score_key": {"metavar": "KEY"},
    "conversations": {"action": "store_true"},
    "validation_fraction": {"metavar": "FRACTION", "type": float},
    "validation": SEVERAL | {"metavar": "PATH|HF_ID"},
    "test": SEVERAL | {"metavar": "PATH|HF_ID"},
    "hub_split": {"option": "--split", "metavar": "NAME"},
    "hub_streaming": {"action": "store_true"},
    "stdin_format": {"metavar": "SUFFIX"},
    "input_tokenizer": {"metavar": "SPEC"},
    "deduplicate": {"option": "--keep-duplicates", "action": "store_false", "help": "keep exact duplicates"},
    "clean": {"metavar": "STEP,STEP,…", "type": names},
    "languages": {"metavar": "NAME,NAME,…", "type": names},
    "cleaning_limits": SEVERAL | {"metavar": "STEP.NAME=VALUE"},
    "keep_removed": {"metavar": "FILE.jsonl"},
    "decontaminate": SEVERAL | {"metavar": "FILE"},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments; None: those of the process. Returns the exit code, if any."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with joined() as ranks:
        if ranks is not None and ranks.rank > 0:
            ranks.serve()
        elif arguments and arguments[0] in SUBCOMMANDS:
            SUBCOMMANDS[arguments[0]](arguments[1:], ranks)
        else:
            prepare(arguments, ranks)


def prepare(arguments: list[str], ranks: MPIRanks | None) -> None:
    """Prepare text, append to prepared data, or print what would be prepared."""
    parser = build_parser()
    options = vars(parser.parse_args(arguments))
    appends, dry, widths = (options.pop(name) for name in ("append", "dry_run", "widths"))
    for name, option in OPTIONS.items():
        if option.get("nargs"):
            options[name] = tuple(options[name] or ())
    if appends and widths:
        parser.error("--widths: no effect with --append, which keeps the tokenizer of the folder; leave it out")
    specs = [options["tokenizer"]]
    if appends:
        config = append_config(options, given_options(parser, arguments, options))
    else:
        if options["tokenizer_from"]:
            options["tokenizer"] = find_tokenizer(options["tokenizer_from"]).spec
        specs = expand_specs(options["tokenizer"])
        config = PrepareConfig(**(options | {"tokenizer": specs[0]}))
    if len(specs) == 1 and widths:
        parser.error("--widths: needs several tokenizers, for example --tokenizer sentencepiece:1024,2048")
    for name, value in (("dry-run", dry), ("output", config.output), ("keep-removed", config.keep_removed)):
        if len(specs) > 1 and value:
            parser.error(f"--{name}: no effect on a comparison of tokenizers, which writes nothing; name one tokenizer")
    if ranks is not None:
        ranks.use_workers(config.workers)
    if dry:
        print(dry_run(config))
    elif appends:
        append_and_report(config, ranks, print)
    elif len(specs) > 1:
        print(comparison_table(compare_tokenizers(config, specs, team=ranks), widths or [256, 512]))
    else:
        prepare_and_report(config, ranks, print)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tokenizers = parser.add_mutually_exclusive_group()
    for field in dataclasses.fields(PrepareConfig):
        if not field.metadata:
            continue
        option = dict(OPTIONS[field.name])
        name = option.pop("option", f"--{field.name.replace('_', '-')}")
        shown = "" if field.default in (None, (), False, True) else f" (default: {field.default})"
        defaults = {"dest": field.name, "default": field.default, "help": field.metadata["help"] + shown}
        (tokenizers if field.name.startswith("tokenizer") else parser).add_argument(name, **(defaults | option))
    parser.add_argument(
        "--widths", metavar="W,W,…", type=widths_of,
        help="with several tokenizers: model widths for which the table gives the parameters of the embedding "
        "(default: 256,512)",
    )  # fmt: skip
    parser.add_argument(
        "--append", action="store_true",
        help="add the inputs to the finished data in --output, with its tokenizer, cleaning and validation rule",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be read, how, and the estimated time; write nothing"
    )
    return parser


def given_options(parser: argparse.ArgumentParser, arguments: list[str], options: dict[str, Any]) -> set[str]:
    """Return the names of the options that the user set, whatever their value."""
    unset = object()
    marked = argparse.Namespace(**{name: unset for name, value in options.items() if not isinstance(value, tuple)})
    given = {name for name, value in vars(parser.parse_args(arguments, marked)).items() if value is not unset}
    return given - {name for name, value in options.items() if value == ()}


def widths_of(text: str) -> list[int]:
    """Argument type: positive integers separated by commas."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected integers such as 256,512")
    return [int(part) for part in text.split(",")]


def subparser(name: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a subcommand that takes a folder of prepared data."""
    parser = argparse.ArgumentParser(prog=f"{Path(sys.argv[0]).name} {name}", description=description)
    parser.add_argument("dir", metavar="DIR", help="folder of prepared data")
    return parser


def verify_data(arguments: list[str], ranks: MPIRanks | None) -> None:
    parser = subparser("verify", "Check the sha256 of every shard, plan and tokenizer file.")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    args = parser.parse_args(arguments)
    if ranks is not None:
        ranks.use_workers(args.workers)
    with nullcontext(ranks) if ranks else Workers(args.workers) as team:
        shards = verify(args.dir, team)
    print(f"{args.dir}: {number_of(shards, 'shard')}, every byte as written")


def report_data(arguments: list[str], ranks: MPIRanks | None) -> None:
    print(write_report(subparser("report", "Write DIR/report.html again.").parse_args(arguments).dir))


def plan_windows(arguments: list[str], ranks: MPIRanks | None) -> None:
    parser = subparser("plan", "Plan the training windows of prepared data, and print the fraction of padding.")
    parser.add_argument(
        "--packing", choices=PACKINGS, default="best_fit", help="contents of a window (default: best_fit)"
    )
    parser.add_argument(
        "--context-length", type=int, default=512, metavar="IDS", help="model.context_length of the run (default: 512)"
    )
    parser.add_argument("--curriculum", choices=CURRICULA, help="order of the first epoch (default: none)")
    args = parser.parse_args(arguments)
    data = PreparedData.open(args.dir)
    made = write_plan(data, args.packing, args.context_length, args.curriculum)
    windows = number_of(made.windows, "window")
    print(f"{args.packing}: {windows} of {made.context_length} ids, {made.wasted_share:.2%} wasted")
    if made.files:
        print(f"the plan is in {plan_dir(data.dir, made.packing, made.context_length, made.curriculum)}")
    else:
        print("this packing needs no plan")


SUBCOMMANDS = {"verify": verify_data, "report": report_data, "plan": plan_windows}
