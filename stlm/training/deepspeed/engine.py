"""The DeepSpeed engine under the trainer: forward, backward and step. state_transfer.py moves whole states in and out.

Gradients: the trainer's loss is a sum over this rank's rows divided by the count of the whole step. DeepSpeed averages
over ranks, so the loss is first multiplied by their number, and the division by the accumulation steps is switched off.
The optimizer thus gets the gradient of the sum over all ranks and micro-batches, divided once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stlm.config import TrainingConfig
from stlm.model import recompute_layers
from stlm.training.compilation import CompiledBlocks
from stlm.training.deepspeed.configuration import checked_deepspeed_config
from stlm.training.deepspeed.gradient_norms import GradientNorms
from stlm.training.deepspeed.internals import count_steps, reduce_no_gradients, scale_no_losses, shards_of
from stlm.training.deepspeed.loss_scale import LossScale
from stlm.training.deepspeed.precision import Precision
from stlm.training.deepspeed.startup import load_deepspeed
from stlm.training.distributed.connection import Distributed
from stlm.training.distributed.ranks import BatchSplit, rank_environment
from stlm.training.memory import keep_freed_memory
from stlm.training.optim.averaging import keep_average
from stlm.training.optim.muon import Muon


class Engine:
    """A model and its optimizer under DeepSpeed. All ranks have to call every method."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, training: TrainingConfig, precision: Precision,
        deepspeed_config: Mapping[str, Any], distributed: Distributed,
    ) -> None:  # fmt: skip
        self.distributed = distributed
        self.split = BatchSplit.of(training, self.distributed.world_size)
        self.clipping = training.gradient_clipping
        self.precision = precision
        self.model = model
        self.optimizer = optimizer
        self.config = checked_deepspeed_config(model, training, precision, deepspeed_config, distributed)
        self.stage: int = self.config["zero_optimization"].get("stage", 0)
        self.parameters = dict(model.named_parameters())
        if training.activation_checkpointing:
            recompute_layers(model)
        self.keeps_average = training.ema_decay is not None
        if training.ema_decay is not None:
            keep_average(optimizer, training.ema_decay)
        with rank_environment(distributed.ranks):  # `native`: DeepSpeed's own engine
            self.native, *_ = load_deepspeed().initialize(model=model, optimizer=optimizer, config=self.config)
        if self.stage == 0 and self.distributed.world_size == 1:
            reduce_no_gradients(self.native)
        self.device: torch.device = self.native.device
        if self.device.type == "cpu":
            keep_freed_memory()
        shards = (
            shards_of(self.native.optimizer, self.stage, distributed.ranks, distributed.stopwatch) if self.stage else []
        )
        if isinstance(optimizer, Muon):
            optimizer.shards = {shard.flat: shard for shard in shards}
            optimizer.dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32
        # Parameter → the flat tensor that the optimizer has in its place; empty at stage 0.
        self.held_in = {parameter: shard.flat for shard in shards for parameter in shard.parameters}
        self._norms = GradientNorms(model, shards, self.distributed.rank)
        self._clipped_by = 1.0  # divisor of the newest gradient
        if self.stage:  # DeepSpeed sets the gradients of its flat tensors just before the update
            optimizer.register_step_pre_hook(self._note_gradients)
        self.loss_scale = LossScale() if precision.name == "fp16" else None
        self.overflowed = False  # the newest gradient overflowed: its step was skipped, the loss scale lowered
        scale_no_losses(self.native, self.stage)
        self.compiled = CompiledBlocks(model)
        if training.compile is True:
            self.compiled.start("got true")

    def train(self) -> None:
        self.native.train()

    def eval(self) -> None:
        self.native.eval()

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Return the model's output, computed in the chosen precision."""
        self.distributed.watchdog.renew()
        return self.native(*inputs, **named)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulate gradients: all backward passes of a step run inside this context. Ranks communicate at its end."""
        if self.stage == 0 or self.split.accumulation == 1:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(self.native.coalesce_grad_reduction())
            yield
            with self.distributed.stopwatch.phase("backward"):
                stack.close()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`, which is already divided by the count of the whole step over all ranks.

        `last`: this is the last micro-batch of the step.
        """
        self.native.set_gradient_accumulation_boundary(last)
        if self.loss_scale is not None:
            if self.stage:
                self.native.optimizer.override_loss_scale(self.loss_scale.value)
            else:
                loss = loss * self.loss_scale.value
        with self.distributed.stopwatch.phase("backward"):
            self.native.backward(loss * self.distributed.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip, update, and clear the gradients. Returns the norm of the whole gradient before clipping.

        If the norm is not finite, nothing is updated; `overflowed` is then True if the loss scale was lowered.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("learning_rate_scale", 1.0)
        self._norms.forget()
        with self.distributed.stopwatch.phase("optimizer"):
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
                self.native.step()
            else:
                self.native.zero_grad()
            return norm
        self.native.set_gradient_accumulation_boundary(True)  # accumulate() may restore another value
        self.native.step()
        return float(self.native.get_global_grad_norm())

    def _clip(self) -> float:
        """Scale gradients down to the norm `clipping` where they exceed it. Returns their norm before."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_div_(gradients, self.loss_scale.value)
        norm = torch.linalg.vector_norm(self._norms.note(self.parameters.values()))
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
            squares = self.distributed.sum_over_ranks(squares)
        norms = [math.sqrt(square) * self._clipped_by for square in squares]
        return dict(zip(self._norms.parts, norms, strict=True))

    def count_steps(self, steps: int) -> None:
        """Set the step count of DeepSpeed's own monitors and profiler to `steps`."""
        count_steps(self.native, steps, self.split.rows * self.distributed.world_size)

    def close(self) -> None:
        """Release the model. The process group stays for the next engine; `Distributed.leave` ends it."""
        self.native.destroy()
