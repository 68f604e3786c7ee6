"""Sampling rules, which turn logits into the distribution that ids are drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stlm.errors import ConfigError
from stlm.generation.arguments import check_biases, check_boolean, check_integer, check_number


@dataclass(frozen=True)
class Sampling:
    """Sampling rules, applied in the order of the fields. The default samples from the model's distribution.

    Raises ConfigError if a value is out of range.
    """

    repetition_penalty: float = 1.0  # divides positive logits, multiplies others, of ids in prompt or text
    frequency_penalty: float = 0.0  # subtracted from an id's logit for each occurrence in the text
    presence_penalty: float = 0.0  # subtracted once from the logits of ids in the text
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, number from -100 to 100 added to its logit)
    temperature: float = 1.0  # divides logits; 0 takes the most probable id
    top_k: int | None = None  # keep the k most probable ids
    typical_p: float | None = None  # locally typical sampling: keep this probability mass
    top_p: float | None = None  # nucleus sampling: keep this probability mass
    min_p: float | None = None  # keep ids at least this probable, relative to the most probable
    valid_utf8: bool = False  # draw only ids that keep the text valid UTF-8, with a whole character at its end
    seed: int = 0  # row r of a batch draws as a single text does with seed + r

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                check_number(name, value, low, high)
        if self.repetition_penalty == 0:
            raise ConfigError("repetition_penalty: got 0, expected above 0 and at most 100; 1 changes nothing")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1)
        check_integer("seed", self.seed)
        check_boolean("valid_utf8", self.valid_utf8)
        check_biases("logit_bias", self.logit_bias)

    @property
    def counts(self) -> bool:
        """True if a penalty depends on the counts of ids drawn before."""
        return bool(self.frequency_penalty or self.presence_penalty)


_OPTIONAL = ("typical_p", "top_p", "min_p")  # None: off
_RANGES = (
    ("repetition_penalty", 0.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("temperature", 0.0, 100.0),
    ("typical_p", 0.0, 1.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
)


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return the probability of each id to be drawn, [B, V], without penalties. At least one is kept.

    top_p is nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751, section 3.1); typical_p keeps ids whose surprise
    is near the entropy (Meister et al. 2022, arXiv 2202.00666, section 4); min_p is relative to the most probable id
    (Nguyen et al. 2024, arXiv 2407.01082, section 3).
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    # Subtract the largest and bound the divisor, so that nothing overflows at low temperatures.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if sampling.top_k is not None and sampling.top_k < logits_BV.size(-1):
        smallest_kept = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept, -torch.inf)
    if sampling.typical_p is not None and sampling.typical_p < 1:
        log_BV = logits_BV.log_softmax(-1)
        entropy_B1 = torch.special.entr(log_BV.exp()).sum(-1, keepdim=True)
        deviation_BV = (-log_BV - entropy_B1).abs()
        logits_BV = _keep_mass(logits_BV, deviation_BV.sort(dim=-1).indices, sampling.typical_p)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits_BV = _keep_mass(logits_BV, logits_BV.sort(dim=-1, descending=True).indices, sampling.top_p)
    if sampling.min_p:
        lowest_B1 = logits_BV.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, -torch.inf)
    return logits_BV.softmax(-1)


def _keep_mass(logits_BV: Tensor, order_BV: Tensor, share: float) -> Tensor:
    """Keep the fewest first ids of an order that hold a share of the probability, and at least one."""
    probability = logits_BV.softmax(-1).gather(-1, order_BV)
    before = probability.cumsum(-1) - probability  # mass of the ids before this one: exactly 0 for the first
    first = torch.arange(order_BV.size(-1), device=order_BV.device) == 0
    dropped = torch.empty_like(before, dtype=torch.bool).scatter(-1, order_BV, (before >= share) & ~first)
    return logits_BV.masked_fill(dropped, -torch.inf)


def apply_penalties(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None, counts_BV: Tensor | None) -> Tensor:
    """Apply the penalties for earlier ids and `logit_bias` to logits.

    `seen_BV`: True for ids in prompt or text (the repetition penalty of CTRL: Keskar et al. 2019, arXiv 1909.05858,
    section 4.1); `counts_BV`: the number of occurrences in the text alone.
    """
    logits_BV = logits_BV.float()
    if seen_BV is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(seen_BV, penalized_BV, logits_BV)
    if counts_BV is not None and sampling.counts:
        logits_BV = logits_BV - sampling.frequency_penalty * counts_BV
        logits_BV = logits_BV - sampling.presence_penalty * (counts_BV > 0)
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        logits_BV = logits_BV.index_add(-1, torch.tensor(ids), torch.tensor(biases).expand(len(logits_BV), -1))
    return logits_BV


def resolve_sampling(sampling: Any, rules: Mapping[str, Any]) -> Sampling:
    """Return sampling rules from `sampling` or from its fields by name. Raises ConfigError if given both or unknown."""
    if unknown := [name for name in rules if name not in Sampling.__dataclass_fields__]:
        known = ", ".join(Sampling.__dataclass_fields__)
        raise ConfigError(f"{', '.join(unknown)}: unknown option; expected any of {known}")
    if sampling is None:
        return Sampling(**rules)
    if not isinstance(sampling, Sampling):
        raise ConfigError(f"sampling: got {type(sampling).__name__}, expected a Sampling; or give its fields by name")
    if rules:
        raise ConfigError(f"{', '.join(rules)}: given in addition to sampling; set it in sampling")
    return sampling
