"""Sampling and scoring of text. Works on any model with `begin`, `step` and `join`; never imports STLM."""

from stlm.generation.beam import Hypothesis, beam_search
from stlm.generation.decoding import DecodingBatch, DecodingRow, generate_ids
from stlm.generation.early_exit import EarlyExit
from stlm.generation.interfaces import DecodableModel
from stlm.generation.sampler import Sampler
from stlm.generation.sampling import Sampling, probabilities, resolve_sampling
from stlm.generation.scoring import ScoredId, nats_per_id, score_ids
from stlm.generation.speculative import speculate_with_layers, speculate_with_ngrams
from stlm.generation.stats import DecodingStats
from stlm.generation.text import TextStream
from stlm.generation.utf8 import UTF8Automaton

__all__ = [
    "DecodingBatch",
    "Sampler",
    "EarlyExit",
    "DecodingStats",
    "Hypothesis",
    "DecodingRow",
    "Sampling",
    "ScoredId",
    "DecodableModel",
    "TextStream",
    "UTF8Automaton",
    "beam_search",
    "generate_ids",
    "speculate_with_ngrams",
    "nats_per_id",
    "probabilities",
    "resolve_sampling",
    "score_ids",
    "speculate_with_layers",
]
