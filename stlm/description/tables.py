"""Descriptions as text: tables and lines."""

from __future__ import annotations

from typing import Any

from data_pipeline.plurals import number_of
from stlm.evals.report import table

PRECISIONS = ("fp32", "bf16")


def readable(source: str, facts: dict[str, Any]) -> str:
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
            f"{mega(facts['cache_bytes'])} MB after a full context (fp32)",
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
