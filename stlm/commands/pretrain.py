"""Train a model: `deepspeed scripts/pretrain.py --ds_config ds_configs/zero2.json`, with nothing else typed.

That prepares the default data if it is missing, and trains the quickstart preset into runs/quickstart, or continues it.
`deepspeed --num_accelerators 2`, `torchrun --`, mpirun and srun start several ranks; plain python one. On several
nodes: scripts/multinode.sh, scripts/slurm/.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import DataError
from data_pipeline.storage.manifest import Manifest
from stlm.config import RunConfig, data_folder, following, load_deepspeed_config, load_run_config
from stlm.errors import ConfigError, NonFinite, StlmError, Stopped
from stlm.training.distributed.ranks import BatchSplit, find_ranks

if TYPE_CHECKING:
    from stlm.training.distributed.connection import Distributed


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    ranks = find_ranks()
    try:  # checks without torch, so that user errors are reported at once
        followed = follow_data(arguments)
        config = load_run_config(arguments.config, [*followed, *arguments.set])
        deepspeed_config = load_deepspeed_config(arguments.ds_config) if arguments.ds_config else None
        BatchSplit.of(config.training, ranks.world_size)
        profiled = steps_to_profile(arguments.profile, config.training.max_steps)
    except StlmError as error:
        if ranks.rank > 0:  # every rank finds the same error, and rank 0 reports it
            return error.exit_code
        raise
    if followed and ranks.rank == 0:
        print(f"follows its data: {', '.join(followed)}", flush=True)
    # Set before torch is imported: else, when a rank is lost, the others print pages of C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from stlm.training.distributed.connection import Distributed

    distributed = Distributed.join()
    try:
        with distributed.naming_lost_ranks():
            return train(arguments, config, deepspeed_config, profiled, distributed)
    except (Stopped, NonFinite) as ending:  # the trainer has logged it
        return ending.exit_code
    except (StlmError, DataError) as error:
        if distributed.reported_by_another(error):
            return error.exit_code
        raise


def train(
    arguments: argparse.Namespace, config: RunConfig, deepspeed_config: dict[str, Any] | None,
    profiled: tuple[int, int] | None, distributed: Distributed,
) -> int:  # fmt: skip
    from data_pipeline.loading.loaders import open_data
    from stlm.evals import EvalShard, LiveTasks
    from stlm.stlm import STLM
    from stlm.training.loaders import build_loaders
    from stlm.training.optim.optimizers import build_optimizer
    from stlm.training.profiling import Profiler
    from stlm.training.trainer import Trainer

    if arguments.data:
        config = replace(config, data=replace(config.data, dir=arguments.data, mixture=()))
    distributed.on_rank_zero(lambda: check_data(config))
    data = distributed.on_every_rank(lambda: open_data(replace(config.data, verify=False)))
    train_loader, validation_loader = build_loaders(config, data)
    run_dir, note = arguments.run, ""
    if run_dir is None:
        run_dir, note = distributed.on_rank_zero(lambda: choose(arguments, config, data.fingerprint))
    if note and distributed.rank == 0:
        print(note, flush=True)
    shard = EvalShard(distributed.rank, distributed.world_size, distributed.interruptible.sum)
    tasks = distributed.on_every_rank(lambda: LiveTasks(config, data, shard)) if config.evals.every_steps else None
    model = distributed.on_every_rank(lambda: STLM.from_config(config.model, data.tokenizer, seed=config.seed))
    optimizer = distributed.on_every_rank(lambda: build_optimizer(model, config.training))
    trainer = Trainer(
        config, model, optimizer, train_loader, validation_loader,
        run_dir=run_dir, deepspeed_config=deepspeed_config, resume=arguments.resume,
        allow_change=arguments.allow_change, evaluate=tasks, distributed=distributed,
    )  # fmt: skip
    with Profiler(trainer, profiled) as profiler:
        for step in trainer.steps():
            with profiler.step(step):
                loss = trainer.train_step(step)
            trainer.log(step, loss)
            trainer.val_step()
            trainer.save_checkpoint(step)

    if distributed.rank == 0:
        print(f"The run is in {run_dir}. What now:")
        print(f"  python scripts/evaluate.py {run_dir}")
        print(f"  python scripts/generate.py {run_dir}")
    distributed.leave()
    return 0


def follow_data(arguments: argparse.Namespace) -> list[str]:
    """Return overrides for tokenizer, embedder and head that fit the data, where the user has not chosen others."""
    folder = arguments.data or data_folder(arguments.config, arguments.set)
    try:
        tokenizer = Manifest.load(folder).tokenizer["spec"] if folder else None
    except DataError:  # reported when the data is opened
        return []
    if tokenizer is None:
        return []
    followed = following(tokenizer, arguments.config, arguments.set, preset_is_chosen=arguments.config_is_chosen)
    return [f"{key}={value}" for key, value in followed.items()]


def name_of(config: str) -> str:
    """Return the name of a run: that of its preset, its config file, or the run whose config it has."""
    path = Path(os.path.abspath(config))
    return path.name if path.is_dir() else path.stem


def choose(arguments: argparse.Namespace, config: RunConfig, fingerprint: str) -> tuple[Path, str]:
    """Choose the run directory where none is named, and return it with a message about the choice."""
    from stlm.training.run.run_directory import choose_run_directory, why_not_extended

    return choose_run_directory(
        name_of(arguments.config), arguments.resume,
        obstacle=lambda run_dir: why_not_extended(run_dir, config, fingerprint, arguments.allow_change),
    )  # fmt: skip


def check_data(config: RunConfig) -> None:
    """Open the data once to check that it is complete; the default corpus is prepared if it is missing."""
    from data_pipeline.loading.loaders import open_data

    open_data(config.data)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", metavar="FILE", help="DeepSpeed configuration in JSON (default: ZeRO stage 0)")
    parser.add_argument(
        "--config",
        metavar="PRESET|FILE",
        help="preset, YAML file or run (default: the run of training.init_from where that is set, else quickstart)",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="prepared data (default: data.dir of the config, else the default corpus); "
        "tokenizer, embedder and head follow it unless the config or --set chooses others",
    )
    parser.add_argument(
        "--run",
        metavar="DIR",
        help="run directory (default: runs/PRESET; once that is finished, the same "
        "command begins runs/PRESET-2 …, and one with a larger training.max_steps or limit continues it)",
    )
    parser.add_argument(
        "--resume", choices=("auto", "never", "must"), default="auto",
        help="auto: continue what the run directory holds; never: begin anew; must: only continue (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-change", action="store_true",
        help="continue a run with another learning rate, schedule or batch size (training.learning_rate, .schedule, "
        ".warmup_steps, .decay_steps, .final_learning_rate_fraction, .batch_size), keeping its weights and moments",
    )  # fmt: skip
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
        help="override settings, for example training.max_steps=200",
    )  # fmt: skip
    parser.add_argument(
        "--profile",
        metavar="FIRST[:LAST]",
        help="record these steps, or this one, with torch's profiler, into RUN/profile/",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    arguments = parser.parse_args(argv)
    arguments.config_is_chosen = arguments.config is not None
    if arguments.config is None:
        arguments.config = begun_from(arguments.set) or "quickstart"
        if arguments.config != "quickstart" and arguments.run is None:
            parser.error(f"--run: expected a name for what becomes of {arguments.config}, for example runs/tuned")
    return arguments


def steps_to_profile(text: str | None, max_steps: int) -> tuple[int, int] | None:
    """Parse "10:12" as (10, 12), "10" as (10, 10). Raises ConfigError where these are not steps of the run."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= max_steps:
        works = f"{min(3, max_steps)}:{min(5, max_steps)}"
        raise ConfigError(
            f"--profile: got {text!r}, expected FIRST:LAST, steps of the run from 1 to {max_steps}; {works} would work"
        )
    return first, last


def begun_from(overrides: list[str]) -> str | None:
    """Return the run that holds the model of training.init_from, whose settings fit the model; None if not set."""
    for override in reversed(overrides):
        key, _, value = override.partition("=")
        if key.strip() == "training.init_from":
            places = [Path(value), *Path(os.path.abspath(value)).parents]
            return next((str(place) for place in places[:4] if (place / "config.yaml").is_file()), None)
    return None
