"""The time that training waits for a checkpoint.

    python benchmarks/checkpointing.py [--config 50m-byte-patch] [--stages 0 2 3] [--rounds 3]

For each ZeRO stage, on one rank: the time of a step; of copying the state, while training waits; of writing it, during
the next steps; and the slow-down of those steps. "Beside" is the resulting cost of a checkpoint as a share of 100
steps; "waiting" is its cost if training waited for the disk, as with a plain torch.save.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from data_pipeline.loading.loaders import open_data
from stlm.config import load_run_config
from stlm.evals.report import table
from stlm.stlm import STLM
from stlm.training.deepspeed.state_transfer import full_state
from stlm.training.distributed.connection import Distributed
from stlm.training.loaders import build_loaders
from stlm.training.optim.optimizers import build_optimizer
from stlm.training.trainer import Trainer

STEPS_BETWEEN = 100  # steps between checkpoints, for the shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="50m-byte-patch", help="preset or file (default: 50m-byte-patch)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per step (default: 1)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3], help="ZeRO stages (default: 0 2 3)")
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints of each stage (default: 3)")
    options = parser.parse_args()
    distributed = Distributed.join()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measured(options, stage, Path(folder), distributed) for stage in options.stages]
    distributed.leave()
    heads = ["ZeRO", "step s", "copy s", "write s", "steps beside", "beside", "waiting", "torch.save"]
    print(table(rows, heads, "lrrrrrrr"))


def measured(options: argparse.Namespace, stage: int, folder: Path, distributed: Distributed) -> list[str]:
    """Measure one ZeRO stage, and return its row of the table."""
    run = f"seed=1 training.max_steps=1000000 training.batch_size={options.batch_size} training.micro_batch_size=null"
    config = load_run_config(options.config, [*run.split(), "training.save_every_steps=1"])
    tokenizer = config.data.tokenizer
    data_dir = folder / "data"
    command = [sys.executable, ROOT / "scripts/preprocess.py", "--tokenizer", tokenizer, "--output", data_dir]
    command += ["--input", ROOT / "docs"]  # any text: its contents do not affect times
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    data = open_data(load_run_config(options.config, [f"data.dir={data_dir}"]).data)
    model = STLM.from_config(config.model, data.tokenizer)
    trainer = Trainer(
        config, model, build_optimizer(model, config.training), *build_loaders(config, data),
        run_dir=folder / f"zero{stage}", deepspeed_config={"zero_optimization": {"stage": stage}},
        distributed=distributed,
    )  # fmt: skip

    def step() -> float:
        started = time.perf_counter()
        trainer.train_step((trainer.step + 1) * trainer.grad_accum_steps - 1)
        return time.perf_counter() - started

    for _ in range(2):
        step()
    alone, copies, writes, beside = [], [], [], []
    for _ in range(options.rounds):
        alone += [step() for _ in range(4)]
        started = time.perf_counter()
        trainer.save_checkpoint(trainer.step)
        copies.append(time.perf_counter() - started)
        while trainer._saver.writer.busy:
            beside.append(step())
        writes.append(time.perf_counter() - started - copies[-1])
    usual, copy, write = (statistics.median(values) for values in (alone, copies, writes))
    extra = sum(beside) / options.rounds - len(beside) / options.rounds * usual
    started = time.perf_counter()
    torch.save(full_state(trainer.engine)._asdict(), folder / "peer.pt")
    peer = time.perf_counter() - started
    trainer.close()

    def share(seconds: float) -> str:
        return f"{seconds / (STEPS_BETWEEN * usual):.2%}"

    seconds = [f"{value:.2f}" for value in (usual, copy, write)]
    return [str(stage), *seconds, f"{extra:+.2f} s", share(copy + max(extra, 0)), share(copy + write), share(peer)]


if __name__ == "__main__":
    main()
