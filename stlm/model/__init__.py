"""The model's parts, from ids to logits. They depend on torch and their config dataclasses, not on data or training."""

from stlm.model.accounting import Account, account, count_parameters, optimizer_bytes
from stlm.model.context import Context
from stlm.model.core.moe import MoE
from stlm.model.core.recomputation import recompute_layers
from stlm.model.core.sharing import other_ties
from stlm.model.core.transformer import CORES, Core
from stlm.model.decoding.cache import DecodingState, joined
from stlm.model.decoding.packed_weights import PRECISIONS, pack, unpack
from stlm.model.embedders.byte_patch import BytePatchEmbedder, BytePatchHead
from stlm.model.embedders.patching.entropy import EntropyPatching
from stlm.model.embedders.patching.rules import Patches
from stlm.model.embedders.published import PublishedEmbedder, PublishedHead
from stlm.model.embedders.token import EMBEDDERS, Embedder
from stlm.model.heads.linear import HEADS, Head, tie
from stlm.model.initialization import initialize
from stlm.model.network import Network, Output
from stlm.model.row_random import row_keys
from stlm.model.vocabulary import Vocabulary
from stlm.model.width_transfer import learning_rate_scales, transfer

__all__ = [
    "CORES",
    "EMBEDDERS",
    "HEADS",
    "PRECISIONS",
    "BytePatchEmbedder",
    "BytePatchHead",
    "Account",
    "Context",
    "Core",
    "DecodingState",
    "Embedder",
    "EntropyPatching",
    "Head",
    "MoE",
    "Network",
    "Output",
    "PublishedEmbedder",
    "PublishedHead",
    "Patches",
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
    "tie",
    "transfer",
    "unpack",
]
