"""Learning on top of a model: probes, fine-tuning, and their protocol. `METHODS` holds all methods by name."""

from __future__ import annotations

from collections.abc import Callable

from stlm.evals.probing.fine_tuning import LORA_RANK, FineTuning
from stlm.evals.probing.linear_probe import LinearProbe
from stlm.evals.probing.protocol import Method
from stlm.stlm import STLM

METHODS: dict[str, Callable[[STLM], Method]] = {
    "linear": LinearProbe,
    "finetune": FineTuning,
    "lora": lambda model: FineTuning(model, learning_rates=(1e-3, 3e-3), lora_rank=LORA_RANK),
}
