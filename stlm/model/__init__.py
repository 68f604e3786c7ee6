"""The model's parts, from ids to logits. They depend on torch and their config dataclasses, not on data or training.

Importing a component registers it under its `kind`, so a file with a new one has its line here.
"""

from stlm.model.accounting import Account, account, count_parameters, optimizer_bytes
from stlm.model.context import Context
from stlm.model.core.base import CORES, Core
from stlm.model.core.moe import MoE
from stlm.model.core.recomputation import recompute_layers
from stlm.model.core.sharing import other_ties
from stlm.model.core.transformer import TransformerCore
from stlm.model.decoding.cache import DecodingState, joined
from stlm.model.decoding.packed_weights import PRECISIONS, pack, unpack
from stlm.model.embedders.base import EMBEDDERS, Embedder
from stlm.model.embedders.byte import ByteEmbedder
from stlm.model.embedders.byte_patch import BytePatchEmbedder
from stlm.model.embedders.patching.entropy import EntropyPatching
from stlm.model.embedders.patching.learned import LearnedPatching
from stlm.model.embedders.patching.rules import Patches
from stlm.model.embedders.published import PublishedEmbedder
from stlm.model.embedders.token import TokenEmbedder
from stlm.model.heads.base import HEADS, Head
from stlm.model.heads.byte_patch import BytePatchHead
from stlm.model.heads.linear import LinearHead
from stlm.model.heads.published import PublishedHead
from stlm.model.initialization import initialize
from stlm.model.network import Network, Output
from stlm.model.registry import Vocabulary
from stlm.model.row_random import row_keys
from stlm.model.width_transfer import learning_rate_scales, transfer

__all__ = [
    "CORES",
    "EMBEDDERS",
    "HEADS",
    "PRECISIONS",
    "Account",
    "ByteEmbedder",
    "BytePatchEmbedder",
    "BytePatchHead",
    "Context",
    "Core",
    "DecodingState",
    "Embedder",
    "EntropyPatching",
    "Head",
    "LearnedPatching",
    "LinearHead",
    "MoE",
    "Network",
    "Output",
    "Patches",
    "PublishedEmbedder",
    "PublishedHead",
    "TokenEmbedder",
    "TransformerCore",
    "Vocabulary",
    "account",
    "count_parameters",
    "initialize",
    "joined",
    "learning_rate_scales",
    "optimizer_bytes",
    "other_ties",
    "pack",
    "recompute_layers",
    "row_keys",
    "transfer",
    "unpack",
]
