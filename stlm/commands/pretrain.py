"""Train a model, or resume a run.

    python scripts/pretrain.py --config mine.yaml
    deepspeed --num_accelerators 2 scripts/pretrain.py --ds_config ds_configs/zero2.json

Without options, the preset quickstart is trained on the default corpus in runs/quickstart; data that is missing is
prepared first. deepspeed, torchrun, mpirun and srun start several ranks; for several machines see
scripts/multinode.sh and scripts/slurm/. From an installed package, start `deepspeed --module stlm pretrain` or
`torchrun -m -- stlm pretrain`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from data_pipeline.errors import DataError
from stlm.commands.options import add_local_rank, add_overrides, typed
from stlm.errors import NonFinite, StlmError, Stopped
from stlm.training.distributed.ranks import find_ranks
from stlm.training.request import RunRequest, initial_run

if TYPE_CHECKING:
    from stlm.training.distributed.connection import Distributed


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    ranks = find_ranks()
    try:
        request = RunRequest.read(
            args.config, args.set, data=args.data, ds_config=args.ds_config, profile=args.profile,
            world_size=ranks.world_size,
        )  # fmt: skip
    except StlmError as error:
        if ranks.rank > 0:  # every rank finds the same error, and rank 0 reports it
            return error.exit_code
        raise
    if request.followed and ranks.rank == 0:
        print(f"follows its data: {', '.join(request.followed)}", flush=True)
    # Set before torch is imported: else, when a rank is lost, the others print pages of C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from stlm.training.distributed.connection import Distributed

    distributed = Distributed.join()
    try:
        with distributed.naming_lost_ranks():
            train(args, request, distributed)
    except (Stopped, NonFinite) as ending:  # the trainer has logged it
        return ending.exit_code
    except (StlmError, DataError) as error:
        if distributed.reported_by_another(error):
            return error.exit_code
        raise
    return 0


def train(args: argparse.Namespace, request: RunRequest, distributed: Distributed) -> None:
    """Open the data, build model, optimizer and trainer, and train. Every rank calls it."""
    from data_pipeline.loading.loaders import open_data
    from stlm.evals import EvalShard, LiveTasks
    from stlm.stlm import STLM
    from stlm.training.loaders import build_loaders
    from stlm.training.optim.optimizers import build_optimizer
    from stlm.training.profiling import Profiler
    from stlm.training.run.run_directory import choose_run_directory, why_not_extended
    from stlm.training.trainer import Trainer

    config = request.config

    def prepare_data() -> None:
        open_data(config.data)  # checks it; the default corpus is prepared if it is missing

    distributed.on_rank_zero(prepare_data)
    data = distributed.on_every_rank(lambda: open_data(replace(config.data, verify=False)))
    train_loader, validation_loader = build_loaders(config, data)
    run_dir, note = args.run, ""
    if run_dir is None:
        run_dir, note = distributed.on_rank_zero(lambda: choose_run_directory(
            request.name, args.resume,
            obstacle=lambda path: why_not_extended(path, config, data.fingerprint, args.allow_change),
        ))  # fmt: skip
    if note and distributed.rank == 0:
        print(note, flush=True)
    shard = EvalShard(distributed.rank, distributed.world_size, distributed.interruptible.sum)
    tasks = distributed.on_every_rank(lambda: LiveTasks(config, data, shard)) if config.evals.every_steps else None
    model = distributed.on_every_rank(lambda: STLM.from_config(config.model, data.tokenizer, seed=config.seed))
    optimizer = distributed.on_every_rank(lambda: build_optimizer(model, config.training))
    trainer = Trainer(
        config, model, optimizer, train_loader, validation_loader,
        run_dir=run_dir, deepspeed_config=request.deepspeed_config, resume=args.resume,
        allow_change=args.allow_change, evaluate=tasks, distributed=distributed,
    )  # fmt: skip
    with Profiler(trainer, request.profiled) as profiler:
        for step in trainer.steps():
            with profiler.step(step):
                loss = trainer.train_step(step)
            trainer.log(step, loss)
            trainer.val_step()
            trainer.save_checkpoint(step)

    if distributed.rank == 0:
        print(f"The run is in {run_dir}. Next:")
        print(f"  {typed('evaluate')} {run_dir}")
        print(f"  {typed('generate')} {run_dir}")
    distributed.leave()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", metavar="FILE", help="DeepSpeed configuration in JSON (default: ZeRO stage 0)")
    parser.add_argument(
        "--config", metavar="PRESET|FILE|RUN",
        help="preset, YAML file or run (default: the run of training.init_from if that is set, else quickstart)",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="DIR",
        help="prepared data; tokenizer, embedder and head follow it unless the config or --set chooses others "
        "(default: data.dir of the config, else the default corpus)",
    )  # fmt: skip
    parser.add_argument(
        "--run", metavar="DIR",
        help="run directory (default: runs/NAME, with the name of the config. If that run is finished, a larger "
        "training.max_steps or other limit extends it, and the same command starts runs/NAME-2)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", choices=("auto", "never", "must"), default="auto",
        help="auto: resume the run if it has started; never: start a new run; must: resume or fail (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-change", action="store_true",
        help="resume with another learning rate, schedule or batch size (training.learning_rate, .schedule, "
        ".warmup_steps, .decay_steps, .final_learning_rate_fraction, .batch_size); weights and moments are kept",
    )  # fmt: skip
    add_overrides(parser)
    parser.add_argument(
        "--profile", metavar="FIRST[:LAST]", help="record these steps with torch's profiler, in RUN/profile/"
    )
    add_local_rank(parser)
    args = parser.parse_args(argv)
    if args.config is None and args.run is None and (source := initial_run(args.set)):
        parser.error(f"--run: expected a directory for the run that starts from {source}, for example runs/tuned")
    return args
