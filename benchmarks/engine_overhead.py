"""What the engine costs: one step of the quickstart's model and batch, plain torch against ZeRO 0-3 on one rank.

    python benchmarks/engine_overhead.py [--config quickstart] [--rounds 20] [--precision auto]

All variants live in one process and take turns, step by step, so that what else the machine does falls on all of them
alike. Each step is a whole one: forward, loss, backward, clipping, update, in the same precision on the same batch. The
plain loop is what one would write without DeepSpeed: autocast, clip_grad_norm_, fused AdamW. CPU ms is the processor
time of all threads, which suffers less from other work on the machine; "to plain" is the median of the ratios turn by
turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import load_run_config
from stlm.stlm import STLM
from stlm.training.engine import Engine, disconnect
from stlm.training.optimizers import build_optimizer
from stlm.training.precision import choose_precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", help="preset or file, with byte ids (default: quickstart)")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each variant that are timed (default: 20)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="(default: auto)")
    arguments = parser.parse_args()

    config = load_run_config(arguments.config)
    training, tokenizer = config.training, build_tokenizer("byte")
    precision = choose_precision(arguments.precision)
    batch, length = training.batch_size, config.model.context_length
    ids = torch.randint(0, 250, (batch, length), generator=torch.Generator().manual_seed(0))

    def new_model() -> tuple[STLM, torch.optim.Optimizer]:
        model = STLM.from_config(config.model, tokenizer, seed=config.seed)
        return model, build_optimizer(model, training)

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())

    def plain() -> Callable[[], float]:
        model, optimizer = new_model()

        def step() -> float:
            with torch.autocast("cpu", torch.bfloat16) if precision.name == "bf16" else nullcontext():
                logits = model(ids).logits
            loss = loss_of(logits)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            return float(norm)

        return step

    def zero(stage: int) -> Callable[[], float]:
        model, optimizer = new_model()
        engine = Engine(model, optimizer, training, precision, {"zero_optimization": {"stage": stage}})

        def step() -> float:
            with engine.accumulate():
                engine.backward(loss_of(engine.forward(ids).logits), last=True)
            return engine.step(training.learning_rate)

        return step

    variants = {"plain torch": plain(), **{f"ZeRO {stage}": zero(stage) for stage in range(4)}}
    names = list(variants)
    for step in variants.values():  # warm up
        step()
        step()
    wall: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same one
            started, worked = time.perf_counter(), time.process_time()
            variants[name]()
            wall[name].append(time.perf_counter() - started)
            busy[name].append(time.process_time() - worked)
    disconnect()

    print(f"{arguments.config}: {batch} x {length} ids, {precision.name} ({precision.reason})")
    print(f"{torch.get_num_threads()} threads, median of {arguments.rounds} steps")
    print(f"{'':12}{'wall ms':>10}{'to plain':>10}{'CPU ms':>10}{'to plain':>10}")
    for name in names:
        columns = ""
        for times in (wall, busy):
            ratio = statistics.median(a / b for a, b in zip(times[name], times["plain torch"], strict=True))
            columns += f"{statistics.median(times[name]) * 1e3:10.1f}{ratio:10.3f}"
        print(f"{name:12}{columns}")


if __name__ == "__main__":
    main()
