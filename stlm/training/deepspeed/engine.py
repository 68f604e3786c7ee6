"""The DeepSpeed engine under the trainer. All use of DeepSpeed's private interfaces is in internals.py.

The engine offers forward, backward and step to the rest of training, and the whole state, gathered from or scattered to
any ZeRO stage. DeepSpeed is imported when the first engine or connection is made.

Gradients: the trainer's loss is a sum over this rank's rows divided by the count of the whole step. DeepSpeed averages
over ranks, so the loss is first multiplied by their number, and the division by the accumulation steps is switched off.
The optimizer thus gets the gradient of the sum over all ranks and micro-batches, divided once.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from data_pipeline.extras import how_to_install
from stlm.config import TrainingConfig
from stlm.errors import CheckpointError, EngineError
from stlm.model import recompute_layers
from stlm.training.compilation import refuse_uncompilable
from stlm.training.deepspeed.gradient_norms import GradientNorms
from stlm.training.deepspeed.internals import (
    build_no_shared_memory_operator,
    communication_backend,
    count_steps,
    link_moments,
    reduce_no_gradients,
    refuse_unmatched_leaves,
    refuse_wrong_values,
    scale_no_losses,
    shards_of,
)
from stlm.training.deepspeed.loss_scale import LossScale
from stlm.training.deepspeed.precision import Precision
from stlm.training.distributed.collectives import on_every_rank, sum_over_ranks, time_collectives
from stlm.training.distributed.lost import introduce
from stlm.training.distributed.ranks import BatchSplit, Ranks, find_ranks, rank_environment
from stlm.training.distributed.rendezvous import ALONE, init_method
from stlm.training.distributed.stopwatch import STOPWATCH
from stlm.training.distributed.watchdog import WATCHDOG, watched
from stlm.training.optim.averaging import AVERAGE, keep_average
from stlm.training.optim.muon import Muon
from stlm.training.optim.straight_through import check_stage

# ---------------------------------------------------------------------- ranks


_connected: Ranks | None = None


def connect() -> Ranks:
    """Join the other ranks. Every rank calls it; a second call returns the same ranks.

    Raises EngineError where the ranks cannot meet or DeepSpeed cannot be imported.
    """
    global _connected
    if _connected is not None:
        return _connected
    ranks = find_ranks()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:  # ranks that share a machine share its cores
        torch.set_num_threads(max(1, _cores() // ranks.local_world_size))
    deepspeed = _import_deepspeed()
    try:
        with rank_environment(ranks):
            deepspeed.init_distributed(
                ALONE if ranks.world_size == 1 else None, verbose=False, init_method=init_method(ranks),
                rank=ranks.rank, world_size=ranks.world_size,
            )  # fmt: skip
    except (dist.DistNetworkError, OSError) as error:
        raise EngineError(
            f"the ranks cannot meet at {ranks.address}:{ranks.port}: {str(error).splitlines()[0]}; "
            "if another run has that port, choose another: deepspeed --master_port, torchrun --master_port, MASTER_PORT"
        ) from error
    time_collectives(communication_backend())
    introduce()
    _connected = ranks
    return ranks


def disconnect() -> None:
    """Leave the other ranks before the process ends. They cannot be joined again."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _import_deepspeed() -> Any:
    """Import DeepSpeed, and let it log warnings and errors only."""
    try:
        import deepspeed
    except ImportError as error:
        raise EngineError(
            f"training needs DeepSpeed, which cannot be imported ({error}): {how_to_install('deepspeed')}"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # how DeepSpeed calls torch
    build_no_shared_memory_operator()
    return deepspeed


# ---------------------------------------------------------------------- configuration


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
            # The default is 1.0. At stage 0 this file clips, as DeepSpeed would not report the norm.
            "gradient_clipping": training.gradient_clipping if zero.get("stage", 0) else 0.0,
            "torch_autocast": autocast | {"enabled": precision != "fp32", "dtype": AUTOCAST[precision]},
        }
    )


def checked_deepspeed_config(
    model: nn.Module, training: TrainingConfig, precision: Precision, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Resolve `given` for this model and the present number of ranks.

    Raises ConfigError or EngineError, the same on all ranks, where no engine can be made from it.
    """
    split = BatchSplit.of(training, connect().world_size)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    config = resolve_deepspeed_config(given, training, split, precision.name, numbers)
    stage = config["zero_optimization"].get("stage", 0)

    def check() -> None:
        refuse_wrong_values(config)
        refuse_unmatched_leaves(config, model)
        check_stage(training, stage)
        if training.compile:
            refuse_uncompilable(stage)

    _import_deepspeed()
    on_every_rank(check)
    return config


# ---------------------------------------------------------------------- engine


class State(NamedTuple):
    """Parameters and optimizer state, by parameter name, in fp32 on the CPU."""

    parameters: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]  # "exp_avg", … → parameter name → tensor
    updates: int  # made so far; Adam's bias correction depends on it


class Engine:
    """A model and its optimizer under DeepSpeed. All ranks have to call every method."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, training: TrainingConfig, precision: Precision,
        deepspeed_config: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.ranks = connect()
        self.split = BatchSplit.of(training, self.ranks.world_size)
        self.clipping = training.gradient_clipping
        self.precision = precision
        self.model = model
        self.optimizer = optimizer
        self.config = checked_deepspeed_config(model, training, precision, deepspeed_config)
        self.stage: int = self.config["zero_optimization"].get("stage", 0)
        self._parameters = dict(model.named_parameters())
        if training.activation_checkpointing:
            recompute_layers(model)
        self._averages = training.ema_decay is not None
        if training.ema_decay is not None:
            keep_average(optimizer, training.ema_decay)
        deepspeed = _import_deepspeed()
        with rank_environment(self.ranks):
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.config)
        if self.stage == 0 and self.ranks.world_size == 1:
            reduce_no_gradients(self._engine)
        self.device: torch.device = self._engine.device
        shards = shards_of(self._engine.optimizer, self.stage) if self.stage else []
        if isinstance(optimizer, Muon):
            optimizer.shards = {shard.flat: shard for shard in shards}
        # Parameter → the flat tensor that the optimizer has in its place; empty at stage 0.
        self._held_in = {parameter: shard.flat for shard in shards for parameter in shard.parameters}
        self._norms = GradientNorms(model, shards, self.ranks.rank)
        self._clipped_by = 1.0  # divisor of the newest gradient
        if self.stage:  # DeepSpeed sets the gradients of its flat tensors just before the update
            optimizer.register_step_pre_hook(self._note_gradients)
        self.loss_scale = LossScale() if precision.name == "fp16" else None
        self.overflowed = False  # the newest gradient overflowed: its step was skipped, the loss scale lowered
        scale_no_losses(self._engine, self.stage)
        if training.compile:
            self._engine.compile()

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Return the model's output, computed in the chosen precision."""
        WATCHDOG.renew()
        return self._engine(*inputs, **named)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate gradients: all backward passes of a step run inside this context. Ranks communicate at its end."""
        if self.stage == 0 or self.split.accumulation == 1:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(self._engine.coalesce_grad_reduction())
            yield
            with STOPWATCH.phase("backward"):
                stack.close()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`, which is already divided by the count of the whole step over all ranks.

        `last`: this is the last micro-batch of the step.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        if self.loss_scale is not None:
            if self.stage:
                self._engine.optimizer.override_loss_scale(self.loss_scale.value)
            else:
                loss = loss * self.loss_scale.value
        with STOPWATCH.phase("backward"):
            self._engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip, update, and clear the gradients. Returns the norm of the whole gradient before clipping.

        If the norm is not finite, nothing is updated; `overflowed` is then True if the loss scale was lowered.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("learning_rate_scale", 1.0)
        self._norms.forget()
        with STOPWATCH.phase("optimizer"):
            norm = self._update()
        clips = 0 < self.clipping < norm + 1e-6 and self.stage > 0
        self._clipped_by = (norm + 1e-6) / self.clipping if clips else 1.0
        if self.loss_scale is not None:
            scale, self.loss_scale = self.loss_scale, self.loss_scale.after(overflow=not math.isfinite(norm))
            self.overflowed = self.loss_scale.value < scale.value
        return norm

    def _update(self) -> float:
        if self.stage == 0:
            norm = self._clip()
            if math.isfinite(norm):
                self._engine.step()
            else:
                self._engine.zero_grad()
            return norm
        self._engine.set_gradient_accumulation_boundary(True)  # accumulate() may restore another value
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def _clip(self) -> float:
        """Scale gradients down to the norm `clipping` where they exceed it. Returns their norm before."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_div_(gradients, self.loss_scale.value)
        norm = torch.linalg.vector_norm(self._norms.note(self._parameters.values()))
        value = float(norm)
        if 0 < self.clipping < value:
            torch._foreach_mul_(gradients, self.clipping / (norm + 1e-6))
        return value

    def _note_gradients(self, optimizer: Optimizer, *_: Any) -> None:
        self._norms.note(tensor for group in optimizer.param_groups for tensor in group["params"])

    def gradient_norms(self) -> dict[str, float]:
        """Return the gradient norm of the newest update by part of the model, before clipping, without loss scale."""
        squares = self._norms.squares()
        if self.stage:
            squares = sum_over_ranks(squares)
        norms = [math.sqrt(square) * self._clipped_by for square in squares]
        return dict(zip(self._norms.parts, norms, strict=True))

    @property
    def native(self) -> Any:
        """DeepSpeed's own engine, for its own formats."""
        return self._engine

    # ------------------------------------------------------------------ state

    @watched("gathering the state")
    def full_state(self, reused: State | None = None) -> State:
        """Copy the whole state to rank 0; the other ranks take part and get empty dicts.

        The copies overwrite the tensors of `reused`, an earlier state that is no longer needed: several times faster
        than allocating new memory.
        """
        self._link_moments()
        keep = self.ranks.rank == 0
        parameters: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters.items():
            for key in (None, *self._moment_names(parameter)):
                tensor = self._gather(parameter, key)
                if keep:
                    target = parameters if key is None else moments.setdefault(key, {})
                    used = {} if reused is None else reused.parameters if key is None else reused.moments.get(key, {})
                    room = used.get(name)
                    target[name] = torch.empty(tensor.shape, dtype=torch.float32) if room is None else room
                    target[name].copy_(tensor.detach())
        return State(parameters, moments, self._updates())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter with its name, whole and in fp32, on every rank.

        Where an average of the weights is kept, yields the average, which checkpoints store as their model.
        """
        averages = self._averages and bool(self._entries())
        if averages:
            self._link_moments()
        for name, parameter in self._parameters.items():
            yield name, self._gather(parameter, AVERAGE if averages and parameter.requires_grad else None).detach()

    @watched("loading the state")
    def load_state(self, state: State, example: Sequence[Tensor]) -> None:
        """Load `state`, which every rank has whole. `example`: inputs that the model's forward accepts.

        A state without moments leaves the optimizer's state new. Raises CheckpointError where the moments are those of
        another optimizer.
        """
        self._make_optimizer_state(example)
        self._link_moments()
        moments = state.moments or ({AVERAGE: state.parameters} if self._averages else {})
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._scatter(parameter, None, state.parameters[name])
                kept = self._moment_names(parameter)
                saved = sorted(key for key in moments if name in moments[key] and parameter.requires_grad)
                if state.moments and kept != saved:
                    raise CheckpointError(
                        f"{name}: beside its value the checkpoint has {' and '.join(saved) or 'nothing'} of it, and "
                        f"this optimizer keeps {' and '.join(kept) or 'nothing'}; use the optimizer that wrote it"
                    )
                for key in saved:
                    self._scatter(parameter, key, moments[key][name])
        for entry in self._entries():
            entry["step"].fill_(state.updates)

    def count_steps(self, steps: int) -> None:
        """Set the step count of DeepSpeed's own monitors and profiler to `steps`."""
        count_steps(self._engine, steps, self.split.micro_batch_size * self.split.accumulation * self.ranks.world_size)

    def _make_optimizer_state(self, example: Sequence[Tensor]) -> None:
        """Create the optimizer's state, which exists only after a step, by a step that changes nothing."""
        if self._entries():
            return
        self.train()
        with self.accumulate():
            self.backward(self.forward(*example)[0].float().sum() * 0.0, last=True)
        self.step(0.0)

    def _link_moments(self) -> None:
        if self.stage in (1, 2):
            link_moments(self._engine.optimizer)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let forward read the average of the weights inside this context, where one is kept. For evaluation only."""
        if not self._averages or not self._entries():
            yield
            return
        self._link_moments()
        trained = [parameter for parameter in self._parameters.values() if parameter.requires_grad]
        kept = [parameter.detach().clone() for parameter in trained] if self.stage == 0 else None
        self._set_weights(trained, (self._gather(parameter, AVERAGE) for parameter in trained))
        try:
            yield
        finally:
            self._set_weights(trained, kept or (self._gather(parameter, None) for parameter in trained))

    @torch.no_grad()
    def _set_weights(self, parameters: Sequence[nn.Parameter], values: Iterable[Tensor]) -> None:
        """Set the weights that forward reads, without changing the optimizer's copy."""
        for parameter, value in zip(parameters, values, strict=True):
            with self._whole(parameter):
                parameter.copy_(value)

    def _gather(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """Return the fp32 parameter (key None) or one of its moments, whole. Frozen parameters have no moments."""
        if not parameter.requires_grad:
            with self._whole(parameter):
                return parameter.detach().clone()
        if self.stage == 0:
            return parameter if key is None else self.optimizer.state[parameter][key]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)

    def _scatter(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """Set the fp32 parameter and the copy that forward reads (key None), or one of its moments."""
        value = value.to(self.device)
        if not parameter.requires_grad:
            with self._whole(parameter):
                parameter.copy_(value)
            return
        if self.stage == 0:
            (parameter if key is None else self.optimizer.state[parameter][key]).copy_(value)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is not None:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        safe_set_full_fp32_param(parameter, value)
        with self._whole(parameter):
            parameter.copy_(value)

    @contextmanager
    def _whole(self, parameter: nn.Parameter) -> Iterator[None]:
        """Give the parameter its full shape inside this context. What rank 0 writes to it is kept."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield

    def _entries(self) -> list[dict[str, Any]]:
        """Return the optimizer's state entries: of each parameter at stage 0, of this rank's flat parts above."""
        return [entry for entry in self.optimizer.state.values() if entry]

    def _moment_names(self, parameter: nn.Parameter) -> list[str]:
        """Return the names of a parameter's moments; none for a frozen one."""
        entry = self.optimizer.state.get(self._held_in.get(parameter, parameter), {})
        return sorted(key for key, value in entry.items() if isinstance(value, Tensor) and value.ndim)

    def _updates(self) -> int:
        return int(next(iter(self._entries()), {"step": 0})["step"])

    def close(self) -> None:
        """Release the model. The process group stays for the next engine; `disconnect` ends it."""
        self._engine.destroy()
