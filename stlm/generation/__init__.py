"""Drawing text from a model and scoring text with it. Never imports STLM: it works on what has `begin` and `step`."""

from stlm.generation.decoding import Steppable, generate_ids
from stlm.generation.early_exit import EarlyExit
from stlm.generation.effort import Effort
from stlm.generation.sampling import sample
from stlm.generation.scoring import nats_per_id
from stlm.generation.speculative import speculate
from stlm.generation.text import TextStream

__all__ = ["EarlyExit", "Effort", "Steppable", "TextStream", "generate_ids", "nats_per_id", "sample", "speculate"]
