"""Which arithmetic forward and backward use. Weights, moments and gradient sums are fp32 in every case."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stlm.config import stated_precision
from stlm.errors import ConfigError


class Precision(NamedTuple):
    """The choice, and the reason as people read it."""

    name: str  # "fp32", "bf16" or "fp16"
    reason: str


def choose_precision(requested: str, deepspeed_config: Mapping[str, Any] | None = None) -> Precision:
    """What `training.precision` means on this machine, with a DeepSpeed config that may state it as well.

    Raises ConfigError where the two contradict each other, and for fp16 where only software would do it.

    auto: bf16 where the device has instructions for it, else fp32. The decision rests on what the hardware says it can
    do, not on a measurement, so that it is the same at every start on the same machine.
    """
    reason = f"training.precision={requested}"
    if (stated := stated_precision(deepspeed_config or {})) is not None:
        name, key = stated
        if requested not in ("auto", name):
            raise ConfigError(
                f"training.precision: got {requested}, but {key} of the DeepSpeed config says {name}; expected auto or "
                f'{name}, or "auto" there'
            )
        requested, reason = name, f"{key} of the DeepSpeed config"
    if requested == "fp16" and not torch.cuda.is_available() and "avx512_fp16" not in cpu_flags():
        raise ConfigError(
            f"{reason.partition('=')[0]}: got fp16, but this CPU has no instructions for it (avx512_fp16) and would "
            "take many times as long as for fp32; expected auto, fp32 or bf16"
        )
    if requested != "auto":
        return Precision(requested, reason)
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability() >= (8, 0):
            return Precision("bf16", f"{torch.cuda.get_device_name()} multiplies bf16 in hardware")
        return Precision("fp32", f"{torch.cuda.get_device_name()} has no bf16 hardware; fp16 is there to be chosen")
    found = sorted(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
    if found:
        return Precision("bf16", f"this CPU multiplies bf16 in hardware ({', '.join(found)})")
    return Precision("fp32", "this CPU has no bf16 instructions")


def cpu_flags() -> set[str]:
    """What the kernel says the processor can do; empty where it does not say."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(line.group(1).split()) if line else set()
