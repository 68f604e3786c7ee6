"""Records of training steps and validations, and their lines for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stlm.training.deepspeed.loss_scale import LossScale
from stlm.training.metrics.monitor import readable_time
from stlm.training.run.progress import RunProgress
from stlm.training.step import StepResult
from stlm.training.validation import Sums, total


def step_figures(result: StepResult, loss_scale: LossScale | None) -> dict[str, float]:
    """Return the figures of a step that made an update."""
    figures = {
        "loss": result.loss,
        "bits_per_byte": result.nats / math.log(2) / result.bytes if result.bytes else math.nan,
        "learning_rate": result.learning_rate,
        "gradient_norm": result.gradient_norm,
        **{f"{name}_loss": nats / result.ids for name, nats in result.terms.items()},
        **result.measures,
    }
    if loss_scale is not None:
        figures |= {"loss_scale": loss_scale.value, "overflowed_steps": loss_scale.overflowed_steps}
    return figures


def training_record(
    figures: Mapping[str, float], progress: RunProgress, epoch: float, gradient_norms: Mapping[str, float],
    timing: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return the record of the newest step."""
    return {
        "step": progress.step,
        "split": "train",
        **figures,
        "gradient_norm_of": gradient_norms,
        "epoch": epoch,
        "ids_seen": progress.ids_seen,
        "bytes_seen": progress.bytes_seen,
        "timing": timing,
    }


def validation_record(step: int, by_source: Mapping[str, Sums], seconds: float) -> dict[str, Any]:
    """Return the record of a validation after `step`, which took `seconds`."""
    whole = total(by_source.values())
    record: dict[str, Any] = {
        "step": step,
        "split": "validation",
        "loss": whole.nats / whole.ids,
        "bits_per_byte": whole.bits_per_byte,
        "timing": {"seconds": seconds},
    }
    if len(by_source) > 1:
        record["bits_per_byte_of"] = {name: sums.bits_per_byte for name, sums in by_source.items() if sums.bytes}
    return record


def validation_line(record: Mapping[str, Any], max_steps: int, num_bytes: float) -> str:
    """Format a validation record, over `num_bytes` of text, as a line for people, and one more for each source."""
    return (
        f"step {record['step']}/{max_steps}  validation {record['loss']:.4f} nats/id  "
        f"{record['bits_per_byte']:.4f} bits/byte  ({num_bytes:,.0f} bytes in "
        f"{readable_time(record['timing']['seconds'])})"
        + "".join(f"\n  {value:.4f} bits/byte  {name}" for name, value in record.get("bits_per_byte_of", {}).items())
    )
