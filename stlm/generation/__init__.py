"""Sampling and scoring of text. Works on any model with `begin`, `step` and `join`; never imports STLM."""

from stlm.generation.beam import Hypothesis, beam_search
from stlm.generation.decoding import DecodingBatch, DecodingRow, generate_ids
from stlm.generation.drawing import Draws
from stlm.generation.early_exit import EarlyExit
from stlm.generation.effort import Effort
from stlm.generation.sampling import Sampling, probabilities
from stlm.generation.scoring import ScoredId, nats_per_id, score_ids
from stlm.generation.speculative import look_up, speculate
from stlm.generation.steppable import Steppable
from stlm.generation.text import TextStream
from stlm.generation.utf8 import ValidText

__all__ = [
    "DecodingBatch",
    "Draws",
    "EarlyExit",
    "Effort",
    "Hypothesis",
    "DecodingRow",
    "Sampling",
    "ScoredId",
    "Steppable",
    "TextStream",
    "ValidText",
    "beam_search",
    "generate_ids",
    "look_up",
    "nats_per_id",
    "probabilities",
    "score_ids",
    "speculate",
]
