"""The model's parts: ids in, logits out. Knows torch, and its own config dataclasses, and nothing else."""

from stlm.model.accounting import Account, account, count_parameters, optimizer_bytes
from stlm.model.byte_patch import BytePatchEmbedder, BytePatchHead
from stlm.model.cache import DecodingState, joined
from stlm.model.context import Context
from stlm.model.core import CORES, Core
from stlm.model.draws import row_keys
from stlm.model.embedders import EMBEDDERS, Embedder
from stlm.model.entropy import EntropyPatching
from stlm.model.heads import HEADS, Head, tie
from stlm.model.initialization import initialize
from stlm.model.moe import MoE
from stlm.model.network import Network, Output
from stlm.model.packing import PRECISIONS, pack, unpack
from stlm.model.paper import PaperEmbedder, PaperHead
from stlm.model.patching import Patches
from stlm.model.recomputation import recompute_layers
from stlm.model.sharing import other_ties
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
    "PaperEmbedder",
    "PaperHead",
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
