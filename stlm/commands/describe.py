"""Describe a model: its parts, parameters, work and memory, before or after training.

python scripts/describe.py quickstart
python scripts/describe.py quickstart --set model.core.num_layers=8 --ranks 4
python scripts/describe.py runs/quickstart
python scripts/describe.py runs/quickstart --step 100 --rows 0-1
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.plurals import number_of

PRECISIONS = ("fp32", "bf16")
BYTES_PER_ID = 4.0  # assumed for an untrained subword vocabulary; one of 4,096 reaches it (docs/data.md)
SHOWN = 200  # characters shown of a row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Parameters, work and memory of a model; of a run also its state, or the text of a step.",
    )
    parser.add_argument("source", metavar="PRESET|FILE|RUN", help="preset, YAML file or run directory")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="override settings of the config"
    )
    parser.add_argument(
        "--ranks", type=positive, metavar="N", help="ranks that share a step (default: those of the run, or else 2)"
    )
    parser.add_argument(
        "--bytes-per-id", type=above_zero, metavar="X",
        help=f"mean bytes of an id (default: 1 for bytes, that of the run's data, or else {BYTES_PER_ID:g})",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object, with full digits")
    parser.add_argument("--step", type=positive, metavar="S", help="show the text that step S is trained on, and end")
    parser.add_argument("--rows", metavar="A-B", help="with --step: only these rows of the batch")
    args = parser.parse_args(argv)
    if args.rows is not None and args.step is None:
        parser.error(f"--rows: got {args.rows} without --step, of which it chooses rows; --step 1 would work")
    beside = {"--ranks": args.ranks, "--bytes-per-id": args.bytes_per_id, "--json": args.json}
    if args.step is not None and (idle := [option for option, value in beside.items() if value]):
        parser.error(f"{idle[0]}: has no effect with --step, which shows text alone; leave one of them out")

    from stlm.config import load_run_config  # late, so that --help and usage errors are fast

    config = load_run_config(args.source, args.set)
    if args.step is not None:
        print(text_of_step(config, args.step, args.rows, progress_of(Path(args.source))))
        return 0
    args.ranks = args.ranks or ranks_of(Path(args.source)) or 2
    facts = {**state(Path(args.source)), **costs(config, args)}
    print(json.dumps(facts, indent=2) if args.json else readable(args.source, facts))
    return 0


# ---------------------------------------------------------------------- facts


def costs(config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return all facts that follow from the config, and from the tokenizer where there is one."""
    from stlm.model import account, optimizer_bytes, recompute_layers
    from stlm.stlm import STLM
    from stlm.training.distributed.ranks import BatchSplit

    tokenizer, mean = tokenizer_of(config, Path(args.source))
    bytes_per_id = args.bytes_per_id or mean or BYTES_PER_ID
    rows = BatchSplit.of(config.training, args.ranks).micro_batch_size

    def make() -> STLM:
        model = STLM(config.model, tokenizer)
        if config.training.activation_checkpointing:
            recompute_layers(model)
        return model

    measure = account(make, tokenizer.vocab_size, config.model.context_length, rows)
    states = {stage: optimizer_bytes(measure, stage, args.ranks) for stage in range(4)}
    kinds = [config.model.embedder.kind, config.model.core.kind, config.model.head.kind]
    return {
        "kinds": kinds,
        "width": config.model.width,
        "context_length": config.model.context_length,
        "tokenizer": config.data.tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_id": bytes_per_id,
        "bytes_per_id_assumed": not mean,
        "ranks": args.ranks,
        "batch_size": config.training.batch_size,
        "max_steps": config.training.max_steps,
        **dataclasses.asdict(measure),
        "forward_flops_per_byte": measure.forward_flops / bytes_per_id,
        "backward_flops_per_byte": measure.backward_flops / bytes_per_id,
        "cache_bytes_per_byte": measure.cache_bytes / config.model.context_length / bytes_per_id,
        "training_bytes": states,
    }


class Assumed:
    """A placeholder for the tokenizer of data that is not prepared yet: every id is four bytes."""

    start_id = 1

    def __init__(self, vocab_size: int) -> None:
        import numpy as np

        self.vocab_size = vocab_size
        self.bytes_per_id = np.full(vocab_size, round(BYTES_PER_ID), dtype=np.int32)

    def decode_bytes(self, ids: Any) -> bytes:
        return b"".join(id.to_bytes(round(BYTES_PER_ID), "big") for id in ids)


def tokenizer_of(config: Any, source: Path) -> tuple[Any, float | None]:
    """Return the tokenizer of the run or prepared data, or a placeholder, and mean bytes per id if known."""
    from data_pipeline.loading.prepared_data import PreparedData
    from data_pipeline.preparation.pipeline import default_data_dir
    from data_pipeline.tokenizers import build_tokenizer, load_tokenizer, parse_spec
    from stlm.checkpoints import newest_checkpoint

    kind, vocab_size = parse_spec(config.data.tokenizer)
    if kind == "byte":
        return build_tokenizer("byte"), 1.0
    folders = [part.dir for part in config.data.mixture] or [config.data.dir or default_data_dir(config.data.tokenizer)]
    prepared = [PreparedData.open(folder) for folder in folders if Path(folder).is_dir()]
    fitting = [data for data in prepared if data.tokenizer.spec == config.data.tokenizer]
    total = {unit: sum(data.manifest.total("train", unit) for data in fitting) for unit in ("bytes", "ids")}
    mean = total["bytes"] / total["ids"] if total["ids"] else None
    checkpoint = newest_checkpoint(source)
    if checkpoint is not None:
        return load_tokenizer(checkpoint / "model" / "tokenizer"), mean
    if fitting:
        return fitting[0].tokenizer, mean
    return (build_tokenizer(config.data.tokenizer) if kind == "hf" else Assumed(vocab_size)), mean


def state(source: Path) -> dict[str, Any]:
    """Return a run's progress; empty if the source is not a run. Raises CheckpointError where it has no checkpoint."""
    from stlm.checkpoints import checkpoints_of, newest_checkpoint, step_of
    from stlm.config import preset_names
    from stlm.errors import CheckpointError
    from stlm.training.run.checkpoint import read_progress

    if str(source) in preset_names() or not source.is_dir():
        return {}
    newest = newest_checkpoint(source)
    if newest is None:
        raise CheckpointError(
            f"{source}: got a run without a complete checkpoint, expected checkpoints/step_…/COMPLETE; "
            f"its config can be described: python scripts/describe.py {source / 'config.yaml'}"
        )
    progress = read_progress(newest)
    text, _, _ = (source / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")  # drop an incomplete line
    records = [json.loads(line) for line in text.splitlines()]
    return {
        "run": {
            "step": progress["step"],
            "bytes_seen": progress["bytes_seen"],
            "checkpoints": [step_of(path) for path in reversed(checkpoints_of(source))],
            "last": {record["split"]: record for record in records},
        }
    }


# ---------------------------------------------------------------------- the text of a step


def ranks_of(source: Path) -> int | None:
    """Return the number of ranks of a run's last start; None where it is not a run or not recorded."""
    path = source / "environment.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["starts"][-1]["ranks"]) if path.is_file() else None
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def progress_of(source: Path) -> dict[str, Any]:
    """Return the state of a run's newest checkpoint; empty where there is none."""
    from stlm.checkpoints import newest_checkpoint
    from stlm.training.run.checkpoint import read_progress

    newest = newest_checkpoint(source)
    return {} if newest is None else read_progress(newest)


def text_of_step(config: Any, step: int, rows: str | None, progress: dict[str, Any]) -> str:
    """Return the shortened text of each row of a step. The order of the data is a function of seed, step and batch
    sizes; `progress` holds the earlier batch sizes."""
    from data_pipeline.loading.loaders import open_data
    from stlm.errors import StlmError
    from stlm.training.loaders import batch_sizes_of, build_loaders

    last_step = config.training.max_steps
    if step > last_step:
        raise StlmError(f"--step: got {step}, expected a step of the run, 1 to {last_step}; {last_step} would work")
    data = open_data(config.data)
    loader = build_loaders(config, data).train
    loader.batch_sizes = batch_sizes_of(progress, config.training.batch_size)
    size = loader.batch_size(step)
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", rows or f"0-{size - 1}")
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < size:
        raise StlmError(f"--rows: got {rows!r}, expected rows of a step within 0-{size - 1}; 0-{size - 1} would work")
    batch = loader.rows(step, first, last + 1)
    lines = []
    for number, ids, counted in zip(range(first, last + 1), batch.ids, batch.loss_mask, strict=True):
        text = data.tokenizer.decode(ids[counted].numpy())
        shown = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
        lines.append(f"{number:>{len(str(size))}}  {number_of(int(counted.sum()), 'id')}  {shown!r}")
    return "\n".join(lines)


# ---------------------------------------------------------------------- for people


def readable(source: str, facts: dict[str, Any]) -> str:
    from stlm.evals.report import table

    assumed = " (assumed)" if facts["bytes_per_id_assumed"] else ""
    bytes_each = f"{facts['bytes_per_id']:.4g}"
    header = (
        f"{source}: {' → '.join(facts['kinds'])}, width {facts['width']}; {facts['context_length']:,} ids of the "
        f"tokenizer {facts['tokenizer']}, {bytes_each} {'byte' if bytes_each == '1' else 'bytes'} each{assumed}"
    )
    newest = facts.get("run", {}).get("last", {}).get("train", {})
    watched = (
        [table(*phases_table(newest), align="lrr"), machine(newest)] if "phases" in newest.get("timing", {}) else []
    )
    if "gradient_norm_of" in newest:
        watched.append(table(*gradient_table(newest), align="lrr"))
    parts = [table(*parts_table(facts), align="lrrrr"), work(facts), table(*memory_table(facts))]
    return "\n\n".join([header, *run_lines(facts), *watched, *parts])


def run_lines(facts: dict[str, Any]) -> list[str]:
    """Return lines about the run's progress."""
    if "run" not in facts:
        return []
    state = facts["run"]
    lines = [
        f"step {state['step']:,} of {facts['max_steps']:,}, {state['bytes_seen']:,} bytes read; checkpoints of steps "
        + ", ".join(f"{step:,}" for step in state["checkpoints"])
    ]
    for split, record in state["last"].items():
        if split == "recovery":
            lines.append(
                f"steps without an update: {record['skipped']:,}; returns to a checkpoint: {record['rollbacks']:,}"
            )
            continue
        if "bits_per_byte" in record:
            lines.append(f"{split}: {record['bits_per_byte']:.4f} bits per byte at step {record['step']:,}")
    return ["\n".join(lines)]


def phases_table(record: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Return a table of the time of a step by phase, from the newest record."""
    timing = record["timing"]
    whole = timing["seconds_per_step"]
    rows = [[name, f"{1e3 * taken:,.2f}", f"{taken / whole:.1%}"] for name, taken in timing["phases"].items()]
    rows.append(["a step", f"{1e3 * whole:,.2f}", "100.0%"])
    return rows, [f"up to step {record['step']:,}", "ms", "share"]


def machine(record: dict[str, Any]) -> str:
    """Return lines about the machine's throughput, utilization and memory."""
    timing = record["timing"]
    lines = [f"{timing['bytes_per_second'] / 1e3:,.1f} kB/s"]
    if "mfu" in timing:
        lines[0] += f"; {timing['flops_per_second'] / 1e9:,.1f} GFLOP/s, {timing['mfu']:.1%} of the measured peak (MFU)"
    if "slowest_rank" in timing:
        rank = timing["slowest_rank"]
        busy = f"{1e3 * rank['seconds_per_step']:,.2f} ms a step without communication"
        lines.append(f"the others wait for rank {rank['rank']}: {busy}")
    gpu = f"; of a GPU {mega(timing['cuda_memory_bytes'])} MB" if "cuda_memory_bytes" in timing else ""
    lines.append(f"largest memory of a rank so far: {mega(timing['memory_bytes'])} MB{gpu}")
    if "joules_per_step" in timing:
        per_megabyte = f", {timing['joules_per_megabyte']:,.0f} J/MB" if "joules_per_megabyte" in timing else ""
        lines.append(f"energy: {timing['joules_per_step']:,.1f} J a step{per_megabyte}")
    return "\n".join(lines)


def gradient_table(record: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Return a table of gradient norms by part of the model, with their share of the squared norm."""
    whole = record["gradient_norm"] ** 2 or 1.0
    rows = [[part, f"{norm:.4f}", f"{norm**2 / whole:.1%}"] for part, norm in record["gradient_norm_of"].items()]
    rows.append(["all", f"{record['gradient_norm']:.4f}", "100.0%"])
    return rows, ["gradient before clipping", "norm", "share"]


def parts_table(facts: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    def row(name: str, unique: int, effective: int, flops: float) -> list[str]:
        share = f"{unique / facts['parameters']:.1%}"
        return [name, f"{unique:,}", share, f"{effective:,}", f"{flops / facts['bytes_per_id'] / 1e6:.3f}"]

    rows = [row(p["name"], p["parameters"], p["effective"], p["forward_flops"]) for p in facts["parts"]]
    rows.append(row("all", facts["parameters"], facts["effective"], facts["forward_flops"]))
    return rows, ["part", "parameters", "share", "effective", "MFLOP per byte"]


def work(facts: dict[str, Any]) -> str:
    forward, backward = facts["forward_flops_per_byte"], facts["backward_flops_per_byte"]
    step = (forward + backward) * facts["batch_size"] * facts["context_length"] * facts["bytes_per_id"]
    return "\n".join(
        [
            "effective: each tensor as often as a pass uses it; MFLOP: of a forward pass over a full context",
            f"the embedding's vectors are {facts['embedding'] / facts['parameters']:.1%} of the parameters",
            f"training: {forward / 1e6:.3f} forward + {backward / 1e6:.3f} backward MFLOP per byte; "
            f"{step / 1e12:.3g} TFLOP a step, {step * facts['max_steps'] / 1e15:.3g} PFLOP in all",
            f"decoding: {facts['cache_bytes_per_byte']:,.0f} bytes of keys and values per byte of text, "
            f"{mega(facts['cache_bytes'])} MB behind a full context (fp32)",
        ]
    )


def memory_table(facts: dict[str, Any]) -> tuple[list[list[str]], list[str], str]:
    """Return a table of one rank's memory in MB by ZeRO stage."""
    rows = []
    for stage, parts in facts["training_bytes"].items():
        total = sum(parts.values())
        with_activations = [mega(total + facts["activation_bytes"][precision]) for precision in PRECISIONS]
        rows.append([f"ZeRO {stage}", *(mega(part) for part in parts.values()), mega(total), *with_activations])
    activations = [mega(facts["activation_bytes"][precision]) for precision in PRECISIONS]
    rows.append([f"activations of {number_of(facts['rows'], 'row')}", "", "", "", "", "", *activations])
    names = list(facts["training_bytes"][0])
    with_activations = [f"+ {name} activations" for name in PRECISIONS]
    of = "one rank" if facts["ranks"] == 1 else f"each of {number_of(facts['ranks'], 'rank')}"
    header = [f"MB of {of}", *names, "sum", *with_activations]
    return rows, header, "l" + "r" * 7


def mega(bytes: float) -> str:
    return f"{bytes / 1e6:,.1f}"


def positive(text: str) -> int:
    """Argparse type for integers of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 1")
    return int(text)


def above_zero(text: str) -> float:
    """Argparse type for numbers above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return number
