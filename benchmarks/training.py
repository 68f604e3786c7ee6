#!/usr/bin/env python
"""Speed of training, compared with nanoGPT and transformers at the same shape: whole steps of 8 x 512 ids.

    python -m benchmarks training [--precision bf16] [--rounds 5] [--only NAME ...]

Each contender is a separate process with all cores; they alternate, one step each. The shape is a GPT-2 of 12.4
million parameters (benchmarks/studies/speed/gpt-12m.yaml); below it are two presets, with batches of as many ids. A
step is forward, loss, backward, clipping and update. "to nanoGPT" is the median of the ratios within a round, in ids
per second; "of peak" is the share of the rate of large matrix products, at 6 FLOPs per parameter and id and
attention's causal half. The first step includes compilation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results import append_result
from benchmarks.workers import Figures, Worker, alternate, serve

GPT = "benchmarks/studies/speed/gpt-12m.yaml"
IDS, VOCABULARY, CONTEXT, LAYERS, HEADS, WIDTH = 4096, 4096, 512, 6, 6, 384

# Contenders by name: None: a peer, else config and settings of this engine.
CONTENDERS: dict[str, tuple[str, ...] | None] = {
    "nanoGPT": None,
    "nanoGPT, compiled": None,
    "transformers": None,
    "stlm": (GPT, "training.compile=false"),
    "stlm, compiled": (GPT, "training.compile=true"),
    "10m-token": ("10m-token", "training.compile=false"),
    "10m-token, muon": ("10m-token", "training.compile=false", "training.optimizer=muon"),
    "10m-token, compiled": ("10m-token", "training.compile=true"),
    "10m-byte-patch": ("10m-byte-patch", "training.compile=false"),
    "10m-byte-patch, muon": ("10m-byte-patch", "training.compile=false", "training.optimizer=muon"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help="contenders (default: all)")
    parser.add_argument("--quick", action="store_true", help="two rounds, nothing compiled")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve({"step": peer(arguments) if CONTENDERS[arguments.worker] is None else engine(arguments)})
        sys.stdout.flush()
        os._exit(0)
    names = arguments.only or [name for name in CONTENDERS if not (arguments.quick and "compiled" in name)]
    if names[0] != "nanoGPT":
        names = ["nanoGPT", *names]
    workers, first = [], {}
    for name in names:  # one after the other, so that compilers have all cores
        workers.append(Worker(name))
        workers[-1].wait_until_ready()
        first[name] = workers[-1].do()
        workers[-1].do()
    answers = alternate(workers, 2 if arguments.quick else arguments.rounds)
    for worker in workers:
        worker.close()
    report(arguments.precision, first, answers)


def peer(arguments: argparse.Namespace) -> Callable[[], object]:
    """Return the step of nanoGPT or transformers."""
    import torch

    from benchmarks.nanogpt import NanoGPT, training_step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(0, VOCABULARY, (IDS // CONTEXT, CONTEXT + 1), device=device)
    if arguments.worker == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
                            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        model = GPT2LMHeadModel(config).to(device)
        return training_step(model, lambda: model(ids[:, :-1], labels=ids[:, :-1]).loss, arguments.precision, device)
    gpt = NanoGPT(VOCABULARY, CONTEXT, LAYERS, HEADS, WIDTH).to(device)
    forward = torch.compile(gpt) if "compiled" in arguments.worker else gpt
    return training_step(gpt, lambda: forward(ids[:, :-1], ids[:, 1:]), arguments.precision, device)


def engine(arguments: argparse.Namespace) -> Callable[[], object]:
    """Return the step of this project's engine at ZeRO stage 0."""
    import numpy as np

    from data_pipeline.loading.windows import Windows
    from data_pipeline.tokenizers import build_tokenizer
    from stlm.config import load_run_config
    from stlm.objectives import build_objective
    from stlm.stlm import STLM
    from stlm.training.deepspeed.engine import Engine
    from stlm.training.deepspeed.precision import choose_precision
    from stlm.training.distributed.connection import Distributed
    from stlm.training.metrics.throughput import Throughput
    from stlm.training.optim.optimizers import build_optimizer
    from stlm.training.step import TrainingStep

    source, *settings = CONTENDERS[arguments.worker] or ()
    file = str(ROOT / source) if source.endswith(".yaml") else source
    context = load_run_config(file).model.context_length
    batch = f"training.batch_size={IDS // context}", "training.micro_batch_size=null"
    config = load_run_config(file, [*settings, *batch])
    ids = np.random.default_rng(0).integers(32, 127, (IDS // context, context))  # printable, as bytes

    class Rows:
        """A loader that gives the same rows in every step."""

        def rows(self, step: int, first: int, last: int) -> Windows:
            return Windows(ids[first:last], np.ones((last - first, context), dtype=bool))

    distributed = Distributed.join()
    tokenizer: Any = build_tokenizer("byte") if config.data.tokenizer == "byte" else Pairs()
    model = STLM.from_config(config.model, tokenizer)
    optimizer = build_optimizer(model, config.training)
    stage0 = {"zero_optimization": {"stage": 0}}
    run = Engine(model, optimizer, config.training, choose_precision(arguments.precision), stage0, distributed)
    throughput = Throughput(run.device, arguments.precision, True, distributed)
    rows: Any = Rows()
    step = TrainingStep(config, model, run, build_objective(config.training), rows, throughput)
    numbers = count(1)

    def one() -> None:
        with throughput.step():
            step(next(numbers), 0.5)

    return one


class Pairs:
    """The properties of a tokenizer that training needs: each id stands for two bytes."""

    start_id = end_of_text_id = 0
    vocab_size = VOCABULARY

    @property
    def bytes_per_id(self) -> Any:
        import numpy as np

        return np.full(VOCABULARY, 2)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(id.to_bytes(2, "big") for id in ids)


def report(precision: str, first: dict[str, Figures], answers: dict[str, list[Figures]]) -> None:
    """Print the table, and append its figures to results/benchmarks.jsonl."""
    import torch

    from stlm.training.metrics.mfu import measure_peak

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = measure_peak(device, precision).flops
    flops = IDS * (6 * 12.4e6 + 6 * LAYERS * CONTEXT * WIDTH)  # of the GPT shape
    print(f"{precision}, {torch.get_num_threads()} threads, peak {peak / 1e9:.0f} GFLOP/s, steps of {IDS} ids")
    print(f"{'':26}{'ids/s':>9}{'to nanoGPT':>12}{'of peak':>9}{'CPU s':>8}{'first step s':>14}{'MB':>8}")
    rows = []
    for name, steps in answers.items():
        seconds = statistics.median(step["seconds"] for step in steps)
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(answers["nanoGPT"], steps, strict=True))
        of_peak = "" if name.startswith("10m") else f"{flops / seconds / peak:.0%}"
        cpu = statistics.median(step["cpu"] for step in steps)
        print(f"{name:26}{IDS / seconds:9.0f}{ratio:12.2f}{of_peak:>9}{cpu:8.2f}{first[name]['seconds']:14.1f}"
              f"{steps[-1]['mb']:8.0f}")  # fmt: skip
        rows.append({"name": name, "ids_per_second": IDS / seconds, "to_nanogpt": ratio, "cpu_s": cpu,
                     "first_step_s": first[name]["seconds"], "mb": steps[-1]["mb"]})  # fmt: skip
    append_result("training", {"precision": precision, "peak_flops": peak, "rows": rows})


if __name__ == "__main__":
    main()
