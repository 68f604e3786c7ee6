"""The model's parts: ids in, logits out. Knows torch, and its own config dataclasses, and nothing else."""

from stlm.model.accounting import count_parameters
from stlm.model.cache import DecodingState
from stlm.model.context import Context
from stlm.model.core import CORES, Core
from stlm.model.embedders import EMBEDDERS, Embedder, Patches
from stlm.model.heads import HEADS, Head, tie
from stlm.model.initialization import initialize

__all__ = [
    "CORES",
    "EMBEDDERS",
    "HEADS",
    "Context",
    "Core",
    "DecodingState",
    "Embedder",
    "Head",
    "Patches",
    "count_parameters",
    "initialize",
    "tie",
]
