"""Speed and memory of ZeRO and of a second rank: whole steps of a preset with its real batch, against plain torch.

    python benchmarks/scaling.py [--config 10m-byte-patch] [--rounds 2] [--precision auto] [--compile]

Each variant runs in one or two processes of its own. Variants alternate, one step each, so that other load of the
machine affects all alike. One rank has all cores, two ranks share them, and both make the same step: forward, loss,
backward of every micro-batch, clipping, update. "to plain" is the median of the ratios within a round; CPU s is the
processor time of all threads and ranks, which depends less on other load. MB is the peak of one rank's memory,
libraries included.

Below the table is the prediction of `cost_model.py` for two ranks, from the one-rank step, the volume of a stage and
the measured speed of communication between these two ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cost_model import volume
from benchmarks.workers import Figures, Worker, serve
from stlm.config import load_run_config
from stlm.training.distributed.ranks import BatchSplit, free_port

if TYPE_CHECKING:
    from stlm.training.distributed.connection import Distributed


class Variant(NamedTuple):
    ranks: int
    stage: int | None  # None: a plain loop, without DeepSpeed
    setting: str | None = None

    @property
    def name(self) -> str:
        kind = "plain torch" if self.stage is None else f"ZeRO {self.stage}"
        return kind + (f", {self.setting.removeprefix('training.').removesuffix('=true')}" if self.setting else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="10m-byte-patch", help="preset or file with byte ids (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="steps of each variant that are timed (%(default)s)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, help="rows of a step (default: those of the config)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages (all)")
    parser.add_argument("--compile", action="store_true", help="also a compiled model, which takes a minute to begin")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments, Variant(*json.loads(arguments.worker)))
        return

    variants = [Variant(1, None), *(Variant(1, stage) for stage in arguments.stages)]
    variants.append(Variant(1, 0, "training.activation_checkpointing=true"))
    if arguments.compile:
        variants.append(Variant(1, 0, "training.compile=true"))
    variants += [Variant(2, stage) for stage in arguments.stages]
    groups = {variant: Group(variant) for variant in variants}
    first = {variant: group.step() for variant, group in groups.items()}  # warm up: allocate memory, compile
    order, answers = list(groups), {variant: [] for variant in groups}
    for turn in range(arguments.rounds):
        for variant in order[turn % len(order) :] + order[: turn % len(order)]:
            answers[variant].append(groups[variant].step())
    links = [group.link_seconds() for variant, group in groups.items() if variant.ranks == 2]
    for group in groups.values():
        group.close()
    report(arguments, first, answers, statistics.median(links))


class Group:
    """The processes of one variant's ranks, which wait for commands."""

    def __init__(self, variant: Variant) -> None:
        environment = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // variant.ranks))}
        environment |= {"WORLD_SIZE": str(variant.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.workers = [
            Worker(json.dumps(variant), environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(variant.ranks)
        ]
        for worker in self.workers:
            worker.wait_until_ready()

    def step(self) -> Figures:
        """Run one step, and return seconds of the slowest rank, CPU seconds of all, peak MB of the largest."""
        told = self._ask("step")
        return {
            "seconds": max(each["seconds"] for each in told),
            "cpu": sum(each["cpu"] for each in told),
            "mb": max(each["mb"] for each in told),
        }

    def link_seconds(self) -> float:
        """Return the seconds of an all-reduce of the whole gradient."""
        return max(each["seconds"] for each in self._ask("link"))

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def _ask(self, what: str) -> list[Figures]:
        for worker in self.workers:
            worker.ask(what)
        return [worker.answer() for worker in self.workers]


def worker(arguments: argparse.Namespace, variant: Variant) -> None:
    """Run one rank, which answers every line of its input."""
    import torch

    from stlm.training.distributed.connection import Distributed

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    distributed = Distributed.join()
    step, num_parameters = build(arguments, variant, distributed)
    gradient = torch.zeros(num_parameters)
    actions: dict[str, Callable[[], Any]] = {"step": step, "link": lambda: torch.distributed.all_reduce(gradient)}
    serve(actions)
    distributed.leave()
    sys.stdout.flush()
    os._exit(0)


def build(
    arguments: argparse.Namespace, variant: Variant, distributed: Distributed
) -> tuple[Callable[[], object], int]:
    """Return a function that runs one step, and the number of parameters."""
    import torch
    import torch.nn.functional as F

    from data_pipeline.tokenizers import build_tokenizer
    from stlm.stlm import STLM
    from stlm.training.deepspeed.engine import Engine
    from stlm.training.deepspeed.precision import choose_precision
    from stlm.training.optim.optimizers import build_optimizer

    config = run_config(arguments, variant)
    training, precision = config.training, choose_precision(arguments.precision)
    split, rank = BatchSplit.of(training, variant.ranks), distributed.rank
    shape = training.batch_size, config.model.context_length
    ids = torch.randint(0, 250, shape, generator=torch.Generator().manual_seed(0))
    micro_batches = ids[rank * split.rows : (rank + 1) * split.rows].split(split.micro_batch_size)
    model = STLM.from_config(config.model, build_tokenizer("byte"), seed=config.seed)
    optimizer = build_optimizer(model, training)

    def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="sum") / (shape[0] * shape[1])

    def plain() -> None:
        for ids in micro_batches:
            with torch.autocast("cpu", torch.bfloat16) if precision.name == "bf16" else nullcontext():
                logits = model(ids).logits
            loss_of(logits, ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    if variant.stage is None:
        return plain, model.num_parameters()
    engine = Engine(model, optimizer, training, precision, {"zero_optimization": {"stage": variant.stage}}, distributed)

    def under_the_engine() -> None:
        with engine.accumulate():
            for ids in micro_batches:
                engine.backward(loss_of(engine.forward(ids).logits, ids), last=ids is micro_batches[-1])
        engine.step(training.learning_rate)

    return under_the_engine, model.num_parameters()


def run_config(arguments: argparse.Namespace, variant: Variant) -> Any:
    settings = [variant.setting] if variant.setting else []
    if arguments.batch_size:
        settings.append(f"training.batch_size={arguments.batch_size}")
    return load_run_config(arguments.config, settings)


def report(
    arguments: argparse.Namespace,
    first: dict[Variant, dict[str, float]],
    answers: dict[Variant, list[dict[str, float]]],
    link_seconds: float,
) -> None:
    plain = Variant(1, None)
    config = run_config(arguments, plain)
    rows, length, micro = config.training.batch_size, config.model.context_length, config.training.micro_batch_size
    print(f"{arguments.config}: {rows} x {length} ids a step, {micro} rows in each forward, {arguments.precision}")
    print(f"{len(os.sched_getaffinity(0))} cores, shared by the ranks; median of {arguments.rounds} steps")
    print(f"{'ranks':6}{'':36}{'seconds':>9}{'to plain':>10}{'kB/s':>8}{'CPU s':>8}{'to plain':>10}{'MB a rank':>11}")

    def middle(variant: Variant, key: str) -> float:
        return statistics.median(answer[key] for answer in answers[variant])

    def ratio(variant: Variant, key: str, other: Variant = plain) -> float:
        return statistics.median(a[key] / b[key] for a, b in zip(answers[variant], answers[other], strict=True))

    for variant in answers:
        seconds = middle(variant, "seconds")
        print(
            f"{variant.ranks:<6}{variant.name:36}{seconds:9.2f}{ratio(variant, 'seconds'):10.3f}"
            f"{rows * length / seconds / 1e3:8.1f}{middle(variant, 'cpu'):8.2f}{ratio(variant, 'cpu'):10.3f}"
            f"{answers[variant][-1]['mb']:11.0f}"
        )
    for variant, answer in first.items():
        if variant.setting == "training.compile=true":
            print(f"the first step of {variant.name} took {answer['seconds']:.0f} s, which is its compilation")

    print(
        f"\nThese two ranks add up a gradient in {link_seconds * 1e3:.0f} ms, a volume of {volume(0, 2):g}. Expected:"
    )
    print(f"{'':12}{'volume':>8}{'expected':>10}{'measured':>10}   seconds of a step on two ranks")
    for stage in arguments.stages:
        accumulation = BatchSplit.of(config.training, 2).accumulation
        parts = volume(stage, 2, accumulation)
        expected = middle(Variant(1, stage), "seconds") + link_seconds * parts / volume(0, 2)
        print(f"ZeRO {stage:<7}{parts:8.2f}{expected:10.2f}{middle(Variant(2, stage), 'seconds'):10.2f}")
    print("\nOne rank on all cores to two ranks that share them, the same stage, in bytes per second:")
    for stage in arguments.stages:
        print(f"ZeRO {stage}  {1 / ratio(Variant(2, stage), 'seconds', Variant(1, stage)):.2f}x")


if __name__ == "__main__":
    main()
