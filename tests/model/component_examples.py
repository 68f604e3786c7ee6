"""Examples of the parts of a transformer core: tests of shapes and of whole models run them all."""

from stlm.config import (
    ALiBiConfig,
    GELUConfig,
    GroupedQueryConfig,
    LayerNormConfig,
    LearnedPositionsConfig,
    MoEConfig,
    NoPositionsConfig,
    ReLUSquaredConfig,
    RMSNormConfig,
    RoPEConfig,
    SwiGLUConfig,
    TransformerCoreConfig,
)
from stlm.model.core.attention import ATTENTIONS
from stlm.model.core.base import CORES
from stlm.model.core.feed_forward import FEED_FORWARDS
from stlm.model.core.normalization import NORMS
from stlm.model.core.positions import POSITIONS

EXAMPLES = {  # at least one for each entry, with settings away from their defaults
    CORES: [TransformerCoreConfig(num_layers=2)],
    ATTENTIONS: [
        GroupedQueryConfig(),
        GroupedQueryConfig(
            num_heads=6, num_kv_heads=1, head_width=10, bias="all", qk_norm=True, window=3, logit_cap=5.0
        ),
    ],
    FEED_FORWARDS: [
        SwiGLUConfig(),
        SwiGLUConfig(hidden_width=5, bias=True),
        GELUConfig(bias=True, approximate=True),
        ReLUSquaredConfig(hidden_width=7),
        MoEConfig(num_experts=5, experts_per_token=3, hidden_width=4, shared_hidden_width=3),
    ],
    NORMS: [RMSNormConfig(), LayerNormConfig(), LayerNormConfig(eps=0.1, bias=False)],
    POSITIONS: [
        RoPEConfig(theta=100.0, fraction=0.34),
        LearnedPositionsConfig(),
        NoPositionsConfig(),
        ALiBiConfig(),
    ],
}
