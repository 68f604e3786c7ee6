"""RunConfig: all settings of a run, as one tree of frozen dataclasses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from data_pipeline.config import DataConfig
from data_pipeline.plurals import number_of
from stlm.config.evals import EvalsConfig
from stlm.config.model.network import ModelConfig
from stlm.config.objectives import NextTokenConfig, ObjectiveConfig
from stlm.config.yaml.fields import ON_REQUEST, Conflict, setting

PARTS = ("embedder", "core", "head")  # of a model


@dataclass(frozen=True)
class LimitsConfig:
    """Limits in addition to training.max_steps. The first one reached ends the run, and the schedule follows it."""

    ids: int | None = setting(None, "ids predicted in training; null: no limit", unit="ids", minimum=1, may_change=True)
    bytes: int | None = setting(
        None, "bytes of text trained on; null: no limit", unit="bytes", minimum=1, may_change=True
    )
    wall_time_s: float | None = setting(
        None,
        "seconds of training, over all starts, after which no step begins (a validation and a checkpoint "
        "follow); learning rates then depend on the speed of the machine; null: no limit",
        unit="seconds",
        above=0.0,
        may_change=True,
    )


@dataclass(frozen=True)
class RecoveryConfig:
    """Skipped steps and rollbacks to a checkpoint. None of it affects a run without such losses."""

    max_skipped_in_a_row: int = setting(
        3,
        "consecutive steps skipped because loss or gradient is not finite; one more rolls back to the "
        "last scheduled checkpoint",
        unit="steps",
        minimum=0,
        may_change=True,
    )
    max_rollbacks: int = setting(
        2,
        "rollbacks to a checkpoint in a run; when one more is needed, the run stops",
        unit="rollbacks",
        minimum=0,
        may_change=True,
    )
    spike_factor: float | None = setting(
        None,
        "a loss above this multiple of the median of the last spike_window losses is a spike (1.5 is "
        "large); null: none is",
        above=1.0,
        may_change=True,
    )
    spike_steps: int = setting(
        10, "consecutive steps with a spike after which the run rolls back", unit="steps", minimum=1, may_change=True,
        needs=("spike_factor", 1.5),
    )  # fmt: skip
    spike_window: int = setting(
        100, "losses whose median spikes are measured against; before there are as many, no loss is a spike",
        unit="steps", minimum=1, may_change=True, needs=("spike_factor", 1.5),
    )  # fmt: skip

    def check(self) -> Iterator[Conflict]:
        """Yield the conflicts between these settings."""
        if self.spike_factor is not None and self.max_rollbacks == 0:
            yield Conflict(
                "spike_factor",
                f"got {self.spike_factor:g}, which has no effect with training.recovery.max_rollbacks = 0, as a spike "
                "causes a rollback; expected null, or training.recovery.max_rollbacks=2",
                ("max_rollbacks",),
                idle=True,
            )


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of training. The number of ranks is not among them, as it may change at every resume."""

    objective: ObjectiveConfig = field(default=NextTokenConfig(), metadata={"help": "what is predicted"})
    init_from: str | None = setting(
        None, "run, checkpoint or model whose weights the run starts from; null: initial values", may_change=True
    )
    init_parts: str = setting(
        "embedder,core,head", "parts of the model that start from them", may_change=True, needs=("init_from", "RUN")
    )
    frozen_parts: str = setting(
        "",
        "parts of the model that are not trained: one or two of embedder,core,head, or layers such as "
        "core.stack.blocks.0; empty: none",
    )
    max_steps: int = setting(1000, "optimizer steps of the whole run", unit="steps", minimum=1, may_change=True)
    batch_size: int = setting(32, "windows per step, over all ranks", unit="windows", minimum=1, may_change=ON_REQUEST)
    micro_batch_size: int | None = setting(
        None,
        "windows per rank in one forward pass; null: batch_size / ranks",
        unit="windows",
        minimum=1,
        may_change=True,
    )

    optimizer: str = setting(
        "adamw",
        "adamw, or muon: orthogonalized updates for the matrices inside the model and AdamW for the rest, "
        "at one learning rate",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(1e-3, "peak learning rate", above=0.0, may_change=ON_REQUEST)
    weight_decay: float = setting(0.1, "decoupled weight decay; vectors and embeddings are exempt", minimum=0.0)
    beta1: float = setting(0.9, "decay of the first moment per step", minimum=0.0, below=1.0)
    beta2: float = setting(0.95, "decay of the second moment per step", minimum=0.0, below=1.0)
    epsilon: float = setting(1e-8, "added to the root of the second moment", above=0.0)
    z_loss_weight: float = setting(
        0.0, "weight of the z-loss, log(Z)^2 of each predicted id (PaLM: 1e-4); 0: none", minimum=0.0
    )
    gradient_clipping: float = setting(1.0, "largest norm of the whole gradient; 0: no clipping", minimum=0.0)

    ema_decay: float | None = setting(
        None,
        "decay of a moving average of the weights, such as 0.999, which is validated and saved instead of "
        "them; null: none",
        above=0.0,
        below=1.0,
    )

    schedule: str = setting(
        "cosine",
        "learning rate after the warm-up: cosine decay to max_steps, wsd (constant, then a decay over the "
        "last decay_steps) or constant",
        choices=("cosine", "wsd", "constant"),
        may_change=ON_REQUEST,
    )
    warmup_steps: int = setting(
        100,
        "steps over which the learning rate rises from 0; may be more than max_steps",
        unit="steps",
        minimum=0,
        may_change=ON_REQUEST,
    )
    decay_steps: int = setting(0, "steps of the final decay (wsd only)", unit="steps", minimum=0, may_change=ON_REQUEST)
    final_learning_rate_fraction: float = setting(
        0.1,
        "final learning rate, as a fraction of the peak (cosine, wsd)",
        minimum=0.0,
        maximum=1.0,
        may_change=ON_REQUEST,
    )

    quantization_bits: int | None = setting(
        None,
        "bits of each weight in an artifact (convert_checkpoint.py --to artifact), which the last "
        "quantization_steps train for: 8, 6 or 4; null: none do",
        unit="bits",
        may_change=True,
    )
    quantization_steps: int = setting(
        0, "last steps, which compute gradients with rounded matrices", unit="steps", minimum=0, may_change=True
    )

    precision: str = setting(
        "auto",
        "arithmetic of forward and backward; weights stay fp32. auto: bf16 where the machine is fast at "
        "it, else fp32; fp16 uses a dynamic loss scale",
        choices=("auto", "fp32", "bf16", "fp16"),
        may_change=True,
    )
    activation_checkpointing: bool = setting(
        False, "keep only the inputs of layers, and recompute the rest in the backward pass", may_change=True
    )
    compile: bool | str = setting(
        "auto",
        "compile the layers with torch.compile at the first step. auto: where a long run gains more time than "
        "this takes, by an estimate at its begin, and after a resume as before",
        choices=("auto",),
        may_change=True,
    )

    log_every_steps: int = setting(10, "steps between two lines of metrics", unit="steps", minimum=1, may_change=True)
    eval_every_steps: int = setting(250, "steps between two validations", unit="steps", minimum=1, may_change=True)
    save_every_steps: int = setting(250, "steps between two checkpoints", unit="steps", minimum=1, may_change=True)
    keep_last: int = setting(2, "newest checkpoints to keep", unit="checkpoints", minimum=1, may_change=True)
    keep_every_steps: int | None = setting(
        None, "keep checkpoints whose step is a multiple of this; null: none", unit="steps", minimum=1, may_change=True
    )
    keep_best: bool = setting(True, "keep the checkpoint with the lowest validation bits per byte", may_change=True)

    wandb: bool = setting(
        False, "mirror metrics to Weights & Biases; offline unless WANDB_MODE is set", may_change=True
    )

    hang_timeout_s: float = setting(
        600.0,
        "seconds after which ranks that wait for each other write their stacks and exit",
        unit="seconds",
        above=0.0,
        may_change=True,
    )
    limits: LimitsConfig = field(default=LimitsConfig(), metadata={"help": "limits in addition to max_steps"})
    recovery: RecoveryConfig = field(default=RecoveryConfig(), metadata={"help": "handling of bad losses"})

    def check(self) -> Iterator[Conflict]:
        """Yield the conflicts between these settings."""
        for key, allowed in (("init_parts", 3), ("frozen_parts", 2)):
            parts = [part for part in getattr(self, key).split(",") if part or key == "init_parts"]
            if key == "frozen_parts":  # names of layers are checked once there is a model
                parts = [part for part in parts if "." not in part]
            if len(set(parts)) < len(parts) or not set(parts) <= set(PARTS) or len(parts) > allowed:
                number = "some" if allowed == 3 else "one or two"
                expected = f"expected {number} of {','.join(PARTS)}; core would work"
                yield Conflict(key, f"got {getattr(self, key)!r}, {expected}")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            yield Conflict(
                "micro_batch_size",
                f"got {self.micro_batch_size}, expected a divisor of training.batch_size = {self.batch_size}; "
                f"{_divisor_below(self.batch_size, self.micro_batch_size)} would work",
                ("batch_size",),
            )
        yield from self._check_quantization()
        yield from (conflict.under("recovery") for conflict in self.recovery.check())
        final = self.final_learning_rate_fraction
        if self.schedule == "constant" and final != TrainingConfig.final_learning_rate_fraction:
            yield Conflict(
                "final_learning_rate_fraction",
                f"got {final:g}, which has no effect with training.schedule = constant; leave it out (or set "
                f"{TrainingConfig.final_learning_rate_fraction:g}), or choose training.schedule = cosine or wsd",
                ("schedule",),
                idle=True,
            )
        if self.schedule == "wsd" and self.decay_steps == 0:
            yield Conflict(
                "decay_steps",
                "got 0, expected 1 or more with training.schedule = wsd, which ends in a decay; "
                f"{max(1, self.max_steps // 5)} would work",
                ("schedule", "max_steps"),
            )
        elif self.schedule != "wsd" and self.decay_steps:
            yield Conflict(
                "decay_steps",
                f"got {self.decay_steps}, which has no effect with training.schedule = {self.schedule}; "
                "expected 0, or training.schedule = wsd",
                ("schedule",),
            )
        elif self.decay_steps and self.warmup_steps + self.decay_steps > self.max_steps:
            room = self.max_steps - self.decay_steps
            works = f"{room}" if room >= 0 else f"training.max_steps={self.warmup_steps + self.decay_steps}"
            yield Conflict(
                "warmup_steps",
                f"got {self.warmup_steps}, expected warm-up and decay ({number_of(self.decay_steps, 'step')}) to fit "
                f"into training.max_steps = {self.max_steps}; {works} would work",
                ("decay_steps", "max_steps"),
            )

    def _check_quantization(self) -> Iterator[Conflict]:
        bits, steps = self.quantization_bits, self.quantization_steps
        if bits not in (None, 8, 6, 4):
            yield Conflict("quantization_bits", f"got {bits}, expected 8, 6, 4 or null; 4 would work")
        if bits is None and steps:
            yield Conflict(
                "quantization_steps",
                f"got {steps}, which has no effect with training.quantization_bits = null; expected 0, or "
                "training.quantization_bits = 4",
                ("quantization_bits",),
            )
        elif bits is not None and not 0 < steps <= self.max_steps:
            yield Conflict(
                "quantization_steps",
                f"got {steps}, expected 1 to training.max_steps = {self.max_steps} with training.quantization_bits = "
                f"{bits}; {max(1, self.max_steps // 5)} would work",
                ("quantization_bits", "max_steps"),
            )


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. With the same data they give the same model."""

    seed: int = setting(1, "seed of all random numbers of the run", minimum=0)
    data: DataConfig = field(default=DataConfig(), metadata={"help": "data to train on"})
    model: ModelConfig = field(default=ModelConfig(), metadata={"help": "architecture"})
    training: TrainingConfig = field(
        default=TrainingConfig(), metadata={"help": "optimization, checkpoints and metrics"}
    )
    evals: EvalsConfig = field(default=EvalsConfig(), metadata={"help": "tasks evaluated during training"})

    def check(self) -> Iterator[Conflict]:
        """Yield the conflicts between and within the sections."""
        yield from (conflict.under("model") for conflict in self.model.check())
        yield from (conflict.under("training") for conflict in self.training.check())
        yield from (conflict.under("evals") for conflict in self.evals.check())
        yield from self.training.objective.check(self)
        if self.training.optimizer == "muon" and self.model.base_width is not None:
            yield Conflict(
                "training.optimizer",
                f"got 'muon' with model.base_width = {self.model.base_width}, whose scales are for AdamW; "
                "expected 'adamw', or model.base_width=null",
                ("model.base_width",),
            )
        if self.data.mixture and self.data.dir is not None:
            yield Conflict(
                "data.mixture",
                f"got a list of {len(self.data.mixture)} in addition to data.dir = {self.data.dir!r}, expected one; "
                "data.dir=null would work",
                ("data.dir",),
            )
        if len(self.data.mixture) == 1 and self.data.mixture[0].weight != 1.0:
            yield Conflict(
                "data.mixture",
                f"got the weight {self.data.mixture[0].weight:g} of a single folder, which has no effect; leave it "
                "out, or name a second folder",
                idle=True,
            )
        if self.model.embedder.byte_ids and self.data.tokenizer != "byte":
            yield Conflict(
                "data.tokenizer",
                f"got {self.data.tokenizer!r}, expected 'byte' for model.embedder.kind = {self.model.embedder.kind}; "
                "or model.embedder={kind: token} with model.head={kind: linear}",
                ("model.embedder.kind",),
            )


def _divisor_below(number: int, limit: int) -> int:
    return next(candidate for candidate in range(min(limit, number), 0, -1) if number % candidate == 0)
