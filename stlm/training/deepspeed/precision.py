"""Precision of forward and backward passes. Weights, moments and gradient sums are always fp32."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stlm.config import stated_precision
from stlm.errors import ConfigError


class Precision(NamedTuple):
    """The chosen precision, and the reason for people."""

    name: str  # "fp32", "bf16" or "fp16"
    reason: str


def choose_precision(requested: str, deepspeed_config: Mapping[str, Any] | None = None) -> Precision:
    """Resolve `training.precision` on this machine, with a DeepSpeed config that may state a precision too.

    auto: bf16 where the device has instructions for it, else fp32. The choice depends on the reported features of the
    hardware, not on a measurement, so it is the same at every start on the same machine.

    Raises ConfigError where the two contradict each other, and for fp16 where the hardware lacks it.
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
        return Precision(
            "fp32",
            f"{torch.cuda.get_device_name()} has no bf16 hardware; training.precision=fp16 is available",
        )
    found = sorted(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
    if found:
        return Precision("bf16", f"this CPU multiplies bf16 in hardware ({', '.join(found)})")
    return Precision("fp32", "this CPU has no bf16 instructions")


def cpu_flags() -> set[str]:
    """Return the processor's feature flags as the kernel lists them; empty where it does not."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(line.group(1).split()) if line else set()
