"""DeepSpeed's configuration, resolved from the user's file and the run config, and checked before an engine is made."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from stlm.config import TrainingConfig
from stlm.training.compilation import refuse_uncompilable
from stlm.training.deepspeed.internals import refuse_unmatched_leaves, refuse_wrong_values
from stlm.training.deepspeed.precision import Precision
from stlm.training.deepspeed.startup import load_deepspeed
from stlm.training.distributed.connection import Distributed
from stlm.training.distributed.ranks import BatchSplit
from stlm.training.optim.straight_through import check_stage

AUTOCAST = {"fp32": "bfloat16", "bf16": "bfloat16", "fp16": "float16"}  # fp32: not used, but a name is required


def resolve_deepspeed_config(
    given: Mapping[str, Any], training: TrainingConfig, split: BatchSplit, precision: str, num_parameters: int
) -> dict[str, Any]:  # fmt: skip
    """Return DeepSpeed's configuration: `given`, with the values that the run config owns, and with every default that
    would change the training set explicitly."""
    config = copy.deepcopy(dict(given))
    for name in ("optimizer", "scheduler", "fp16", "bf16"):
        if config.get(name) == "auto" or isinstance(config.get(name), dict):
            config.pop(name)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    # DeepSpeed allocates whole buckets, 2 GB by default whatever the size of the model. It requires even sizes.
    bucket_size = min(num_parameters + num_parameters % 2, 50_000_000)
    zero.setdefault("reduce_bucket_size", bucket_size)
    zero.setdefault("allgather_bucket_size", bucket_size)
    # By default stage 3 replaces torch's F.linear, permanently and in the whole process.
    zero.setdefault("memory_efficient_linear", False)
    autocast = {"lower_precision_safe_modules": [], **config.get("torch_autocast", {})}  # []: gradients travel in fp32
    defaults = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the optimizer is always ours
        "steps_per_print": sys.maxsize,
        "timers": {"throughput": {"enabled": False}},
    }
    return (
        defaults
        | config
        | {
            "train_batch_size": training.batch_size,
            "train_micro_batch_size_per_gpu": split.micro_batch_size,
            "gradient_accumulation_steps": split.accumulation,
            # The default is 1.0. At stage 0 the engine clips, as DeepSpeed would not report the norm.
            "gradient_clipping": training.gradient_clipping if zero.get("stage", 0) else 0.0,
            "torch_autocast": autocast | {"enabled": precision != "fp32", "dtype": AUTOCAST[precision]},
        }
    )


def checked_deepspeed_config(
    model: nn.Module, training: TrainingConfig, precision: Precision, given: Mapping[str, Any], distributed: Distributed
) -> dict[str, Any]:
    """Resolve `given` for this model and the present number of ranks.

    Raises ConfigError or EngineError, the same on all ranks, where no engine can be made from it.
    """
    split = BatchSplit.of(training, distributed.world_size)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    config = resolve_deepspeed_config(given, training, split, precision.name, numbers)
    stage = config["zero_optimization"].get("stage", 0)

    def check() -> None:
        refuse_wrong_values(config)
        refuse_unmatched_leaves(config, model)
        check_stage(training, stage)
        if training.compile is True:
            refuse_uncompilable(stage, "got true")

    load_deepspeed()
    distributed.on_every_rank(check)
    return config
