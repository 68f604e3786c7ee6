"""All use of DeepSpeed's private interfaces: private attributes, and modules below the package.

Each function covers one such dependence and gives the reason for it. Before a version of DeepSpeed is added to
TESTED_VERSIONS and to the range in setup.py, the tests marked `deepspeed` must pass with it;
`bash scripts/test.sh --all` runs them with the oldest and the newest version.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from stlm.errors import ConfigError
from stlm.training.distributed.ranks import Ranks
from stlm.training.distributed.stopwatch import Stopwatch
from stlm.training.optim.zero_shards import ZeroShard

TESTED_VERSIONS = ("0.19.7", "0.19.8")


def communication_backend() -> Any:
    """Return the object that carries all of DeepSpeed's communication, after `init_distributed`."""
    return sys.modules["deepspeed.comm.comm"].cdb


def build_no_shared_memory_operator() -> None:
    """Keep `init_distributed` from compiling its shared-memory reduction, which serves inference only.

    The build needs a compiler and takes half a minute at the first start. If it is killed, its lock hangs every later
    build.
    """
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def refuse_wrong_values(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where DeepSpeed cannot read a value of its configuration, before an engine is made."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except Exception as error:  # pydantic's, AssertionError, TypeError, …: no common base
        reason = " ".join(str(error).split()).partition(" For further information")[0]
        raise ConfigError(f"DeepSpeed cannot use the values of its configuration: {reason}") from error
    for name in config.get("torch_autocast", {}).get("lower_precision_safe_modules", ()):
        module, _, kind = name.rpartition(".")
        try:
            getattr(importlib.import_module(module), kind)
        except (ImportError, AttributeError, ValueError):
            raise ConfigError(
                f"torch_autocast.lower_precision_safe_modules of the DeepSpeed config: got {name!r}, which is no "
                "class; torch.nn.Linear would work"
            ) from None


def refuse_unmatched_leaves(config: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ConfigError where `leaf_module` names modules that the model lacks; DeepSpeed would only warn."""
    given = config["zero_optimization"].get("leaf_module", {})
    named = {key: [names] if isinstance(names, str) else names for key, names in given.items()}
    modules = dict(model.named_modules())
    kinds = {type(module) for module in modules.values()}
    known = {f"{kind.__module__}.{kind.__qualname__}" for kind in kinds} | {kind.__name__ for kind in kinds}
    missing = [name for name in named.get("classes", ()) if name not in known]
    missing += [name for name in named.get("names", ()) if name not in modules]
    missing += [end for end in named.get("name_suffixes", ()) if not any(name.endswith(end) for name in modules)]
    if missing:
        raise ConfigError(
            f"zero_optimization.leaf_module of the DeepSpeed config: the model has no {', '.join(missing)}; "
            '{"name_suffixes": ["feed_forward"]} would work'
        )


def reduce_no_gradients(engine: Any) -> None:
    """Switch off the gradient reduction, for one rank at stage 0, where it would only copy all gradients twice."""
    engine.enable_backward_allreduce = False


def scale_no_losses(engine: Any, stage: int) -> None:
    """Remove DeepSpeed's loss scale, which clips gradients before it unscales them, and is not saved."""
    owner = engine.optimizer if stage else engine
    setattr(owner, "torch_autocast_gradscaler" if stage else "torch_autocast_z0_gradscaler", None)


def link_moments(zero: Any) -> None:
    """Link each parameter of a ZeRO optimizer of stage 1 or 2 to its moments.

    DeepSpeed does so after the first update of the first group, when the moments of later groups do not exist yet.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def count_steps(engine: Any, steps: int, batch_size: int) -> None:
    """Set the update count of DeepSpeed's checkpoints, monitors and profiler to `steps`."""
    engine.global_steps, engine.global_samples = steps, steps * batch_size


def shards_of(zero: Any, stage: int, ranks: Ranks, stopwatch: Stopwatch) -> list[ZeroShard]:
    """Return the shards that DeepSpeed's ZeRO optimizer of stage 1, 2 or 3 holds on this rank."""
    shards = []
    if stage < 3:
        for number, parameters in enumerate(zero.round_robin_bit16_groups):
            starts = zero.round_robin_bit16_offsets[number]
            places = [(start, parameter.numel()) for start, parameter in zip(starts, parameters, strict=True)]
            shapes = [parameter.shape for parameter in parameters]
            flat = zero.single_partition_of_fp32_groups[number]
            shards.append(ZeroShard(flat, parameters, places, shapes, False, ranks, stopwatch))
        return shards
    for number, parameters in enumerate(zero.fp16_groups):
        places, start = [], 0
        for parameter in parameters:
            places.append((start, parameter.partition_numel()))
            start += parameter.partition_numel()
        shapes = [parameter.ds_shape for parameter in parameters]
        flat = zero.fp32_partitioned_groups_flat[number]
        shards.append(ZeroShard(flat, parameters, places, shapes, True, ranks, stopwatch))
    return shards


def classes_in_checkpoints() -> Sequence[type]:
    """Return the DeepSpeed classes whose objects occur in its checkpoints; they only hold values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
