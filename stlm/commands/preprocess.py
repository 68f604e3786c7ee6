"""Text to prepared data: shards of ids with a manifest, which scripts/pretrain.py reads.

With nothing else typed, the embedded default corpus is prepared in data/default-byte. With --tokenizer
sentencepiece:1024,2048,4096 vocabularies are compared instead. `preprocess.py verify DIR` checks every byte of prepared
data; `preprocess.py report DIR` describes it on a page again; `preprocess.py plan DIR` plans windows of whole
documents, or from easy to hard.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from data_pipeline.config import CURRICULA, PACKINGS
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.loading.verify import verify
from data_pipeline.loading.window_plans import plan_dir, write_plan
from data_pipeline.plurals import number_of
from data_pipeline.preparation.appending import append, append_config
from data_pipeline.preparation.dry_run import dry_run
from data_pipeline.preparation.mpi import MPIRanks, joined
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import Preparation
from data_pipeline.preparation.workers import Workers
from data_pipeline.report.page import REPORT_FILE, write_report
from data_pipeline.report.plots import PlotsMissing
from data_pipeline.report.summary import summary
from data_pipeline.report.tokenizer_comparison import compare_tokenizers, comparison_table, expand_specs
from data_pipeline.sources.text_files import ON_ERROR, QUOTING
from data_pipeline.storage.manifest import MANIFEST_FILE
from data_pipeline.tokenizers import find_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    with joined() as ranks:
        if ranks is not None and ranks.rank > 0:
            ranks.serve()
        elif arguments[:1] == ["verify"]:
            verify_data(arguments[1:], ranks)
        elif arguments[:1] == ["report"]:
            report(arguments[1:])
        elif arguments[:1] == ["plan"]:
            plan(arguments[1:])
        else:
            config, specs, widths, adding, trying = parse(arguments)
            if trying:
                print(dry_run(config))
            elif adding:
                append_data(config, ranks)
            elif len(specs) > 1:
                print_comparison(config, specs, widths, ranks)
            else:
                prepare_data(config, ranks)


def prepare_data(config: PrepareConfig, ranks: MPIRanks | None) -> None:
    start = time.monotonic()
    if ranks is not None:
        ranks.use_workers(config.workers)
    preparation = Preparation(config)
    new = preparation.existing() is None
    if not new:
        print(f"{config.directory} is already prepared; nothing to do\n")
    print(summary(preparation.run(ranks), config.directory))
    if config.keep_removed is not None:
        print(f"what was left out: {config.keep_removed}")
    update_report(config.directory, new)
    print(f"done in {time.monotonic() - start:.1f} s")


def append_data(config: PrepareConfig, ranks: MPIRanks | None) -> None:
    start = time.monotonic()
    if ranks is not None:
        ranks.use_workers(config.workers)
    manifest, new = append(config, team=ranks)
    directory = config.directory.parent
    if not new:
        print(f"{directory} already holds this text; nothing to do\n")
    print(summary(manifest, directory))
    update_report(directory, new)
    print(f"done in {time.monotonic() - start:.1f} s")


def update_report(directory: Path, new: bool) -> None:
    """Write the report of new data, or of data whose command was killed between manifest and report."""
    there, manifest = directory / REPORT_FILE, directory / MANIFEST_FILE
    if not new and there.exists() and there.stat().st_mtime_ns >= manifest.stat().st_mtime_ns:
        return
    try:
        print(f"report: {write_report(directory)}")
    except PlotsMissing as error:
        print(f"no report: {error}; then python scripts/preprocess.py report {directory}")


def print_comparison(config: PrepareConfig, specs: list[str], widths: list[int], ranks: MPIRanks | None) -> None:
    if ranks is not None:
        ranks.use_workers(config.workers)
    print(comparison_table(compare_tokenizers(config, specs, team=ranks), widths))


def parse(arguments: list[str]) -> tuple[PrepareConfig, list[str], list[int], bool, bool]:
    """Parse the command line.

    Returns the config, the tokenizers (several for a comparison), the widths for the comparison's table, whether text
    is added to existing data, and whether this is a dry run.
    """
    defaults = {field.name: (field.metadata["help"], field.default) for field in dataclasses.fields(PrepareConfig)}

    def explain(name: str) -> dict[str, Any]:
        help, default = defaults[name]
        return {
            "help": help if default in (None, (), False, True) else f"{help} (default: {default})",
            "default": default,
        }

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", dest="inputs", action="extend", nargs="+", metavar="PATH|HF_ID", help=defaults["inputs"][0]
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="SPEC", **explain("tokenizer"))
    which.add_argument("--tokenizer-from", metavar="DIR", **explain("tokenizer_from"))
    parser.add_argument(
        "--widths",
        metavar="W,W,…",
        help="with several tokenizers, SPEC,SPEC or KIND:N,N: they are compared in a table, and nothing is written; "
        "widths of models for which it gives the parameters of the embedding (default: 256,512)",
    )
    parser.add_argument("--output", metavar="DIR", **explain("output"))
    parser.add_argument(
        "--append",
        action="store_true",
        help="add the inputs to the finished data in --output: tokenizer, cleaning and the rule of validation stay",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be read, how, and how long it takes; write nothing"
    )
    parser.add_argument("--limit", metavar="N|SIZE", **explain("limit"))
    parser.add_argument("--workers", type=int, metavar="N", **explain("workers"))
    parser.add_argument("--on-error", choices=ON_ERROR, **explain("on_error"))
    parser.add_argument("--documents", metavar="RULE", **explain("documents"))
    parser.add_argument("--encoding", metavar="NAME", **explain("encoding"))
    parser.add_argument("--quoting", choices=QUOTING, **explain("quoting"))
    parser.add_argument("--text-key", metavar="KEY", **explain("text_key"))
    parser.add_argument("--score-key", metavar="KEY", **explain("score_key"))
    parser.add_argument("--conversations", action="store_true", **explain("conversations"))
    parser.add_argument("--validation-fraction", type=float, metavar="SHARE", **explain("validation_fraction"))
    parser.add_argument(
        "--validation", action="extend", nargs="+", metavar="PATH|HF_ID", help=defaults["validation"][0]
    )
    parser.add_argument("--test", action="extend", nargs="+", metavar="PATH|HF_ID", help=defaults["test"][0])
    parser.add_argument("--split", dest="hub_split", metavar="NAME", **explain("hub_split"))
    parser.add_argument("--hub-streaming", action="store_true", **explain("hub_streaming"))
    parser.add_argument("--stdin-format", metavar="SUFFIX", **explain("stdin_format"))
    parser.add_argument("--input-tokenizer", metavar="SPEC", **explain("input_tokenizer"))
    parser.add_argument(
        "--keep-duplicates",
        dest="deduplicate",
        action="store_false",
        help="do not leave out exact duplicates of documents",
    )
    parser.add_argument("--clean", metavar="STEP,STEP,…", type=_names, **explain("clean"))
    parser.add_argument("--languages", metavar="NAME,NAME,…", type=_names, **explain("languages"))
    parser.add_argument(
        "--cleaning-limits",
        action="extend",
        nargs="+",
        metavar="STEP.NAME=VALUE",
        help=defaults["cleaning_limits"][0],
    )
    parser.add_argument("--keep-removed", metavar="FILE.jsonl", **explain("keep_removed"))
    parser.add_argument(
        "--decontaminate", action="extend", nargs="+", metavar="FILE", help=defaults["decontaminate"][0]
    )
    options = vars(parser.parse_args(arguments))
    adding, trying = options.pop("append"), options.pop("dry_run")
    for name in ("inputs", "validation", "test", "decontaminate", "cleaning_limits"):
        options[name] = tuple(options[name] or ())
    if adding:
        unset = object()
        marked = argparse.Namespace(**{name: unset for name, value in options.items() if not isinstance(value, tuple)})
        given = {name for name, value in vars(parser.parse_args(arguments, marked)).items() if value is not unset}
        given -= {name for name, value in options.items() if value == ()}
        if options.pop("widths"):
            parser.error("--widths is for several tokenizers, and --append keeps that of the folder")
        return append_config(options, given), [options["tokenizer"]], [], True, trying
    if options["tokenizer_from"]:
        options["tokenizer"] = find_tokenizer(options["tokenizer_from"]).spec
    specs = expand_specs(options["tokenizer"])
    widths = options.pop("widths")
    if len(specs) > 1 and trying:
        parser.error("--dry-run looks at one preparation: name one tokenizer")
    if len(specs) == 1 and widths:
        parser.error("--widths is for several tokenizers: --tokenizer sentencepiece:1024,2048")
    if len(specs) > 1 and options["output"]:
        parser.error("to compare tokenizers writes nothing: leave --output out, or name one tokenizer")
    if len(specs) > 1 and options["keep_removed"]:
        parser.error("to compare tokenizers writes nothing: leave --keep-removed out, or name one tokenizer")
    try:
        numbers = [int(width) for width in (widths or "256,512").split(",")]
    except ValueError:
        parser.error(f"--widths: expected whole numbers such as 256,512, got {widths!r}")
    return PrepareConfig(**(options | {"tokenizer": specs[0]})), specs, numbers, False, trying


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def verify_data(arguments: list[str], ranks: MPIRanks | None) -> None:
    parser = argparse.ArgumentParser(
        prog="preprocess.py verify", description="Check the sha256 of every shard and plan, and the tokenizer."
    )
    parser.add_argument("dir", metavar="DIR", help="folder of prepared data")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; none: one per core")
    options = parser.parse_args(arguments)
    if ranks is not None:
        ranks.use_workers(options.workers)
    with nullcontext(ranks) if ranks else Workers(options.workers) as team:
        shards = verify(options.dir, team)
    print(f"{options.dir}: {number_of(shards, 'shard')}, every byte as written")


def report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="preprocess.py report", description="Write DIR/report.html again.")
    parser.add_argument("dir", metavar="DIR", help="folder of prepared data")
    print(write_report(parser.parse_args(arguments).dir))


def plan(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="preprocess.py plan",
        description="Plan the training windows of prepared data, and say what share of their positions is wasted: "
        "predicts nothing.",
    )
    parser.add_argument("dir", metavar="DIR", help="folder of prepared data")
    parser.add_argument(
        "--packing", choices=PACKINGS, default="best_fit", help="what a window holds (default: best_fit)"
    )
    parser.add_argument(
        "--context-length", type=int, default=512, metavar="IDS", help="model.context_length of the run (default: 512)"
    )
    parser.add_argument("--curriculum", choices=CURRICULA, help="order of the first epoch (default: none)")
    options = parser.parse_args(arguments)
    data = PreparedData.open(options.dir)
    made = write_plan(data, options.packing, options.context_length, options.curriculum)
    windows = number_of(made.windows, "window")
    print(f"{options.packing}: {windows} of {made.context_length} ids, {made.wasted_share:.2%} wasted")
    if made.files:
        print(f"the plan is in {plan_dir(data.dir, made.packing, made.context_length, made.curriculum)}")
    else:
        print("this packing needs no plan")
