"""Progress of a run: what a checkpoint stores in addition to weights and moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from stlm.config import TrainingConfig
from stlm.training.optim.limits import used_up


@dataclass
class RunProgress:
    """Contents of state.json. `to_json` and `of` convert it, and tolerate keys that older runs lack."""

    step: int = 0  # updates made
    ids_seen: int = 0  # predicted in these updates
    bytes_seen: int = 0  # of text that these ids stand for
    seconds: float = 0.0  # of training before the newest step, the same on all ranks
    sequences_seen: int = 0
    batch_sizes: list[list[int]] = field(default_factory=list)  # see `TrainLoader`
    seed: int | None = None  # with the step, it determines all randomness
    loss_scale: dict[str, Any] | None = None  # of fp16
    recovery: dict[str, Any] | None = None  # see `Recovery.state`
    data_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    validation_bits_per_byte: float | None = None  # of a validation after this step
    compiled: bool = False  # blocks run as compiled programs, and do so after a resume under training.compile=auto
    scheduled: bool = True  # an uninterrupted run saves this checkpoint too
    pending: list[str] = field(default_factory=list)  # work of this step that an interruption left undone

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> RunProgress:
        """Return the progress that state.json holds."""
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in state.items() if key in known and value is not None})

    def to_json(self, training: TrainingConfig) -> dict[str, Any]:
        """Return the contents of state.json. Seconds are stored where a limit reads them."""
        return asdict(self) | {"seconds": self.seconds if training.limits.wall_time_s else None}

    def used_up(self, training: TrainingConfig) -> float:
        """Return the fraction of the run that ends with the next step; more than 1: there is none."""
        return used_up(training, self.step, self.ids_seen, self.bytes_seen, self.seconds)

    def is_finished(self, training: TrainingConfig) -> bool:
        """Return True if no step is left."""
        return self.used_up(training) > 1
