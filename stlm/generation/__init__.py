"""Drawing text from a model and scoring text with it. Never imports STLM: it works on what has `begin` and `step`."""

from stlm.generation.decoding import Steppable, generate_ids
from stlm.generation.sampling import sample
from stlm.generation.scoring import nats_per_id
from stlm.generation.text import TextStream

__all__ = ["Steppable", "TextStream", "generate_ids", "nats_per_id", "sample"]
