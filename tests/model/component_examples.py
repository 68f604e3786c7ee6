"""Examples of every component: tests of shapes and of whole models run them all."""

from stlm.config import (
    ALiBiConfig,
    ByteEmbedderConfig,
    ByteNgramsConfig,
    BytePatchEmbedderConfig,
    BytePatchHeadConfig,
    EntropyPatchingConfig,
    FixedPatchingConfig,
    GELUConfig,
    GroupedQueryConfig,
    LayerNormConfig,
    LearnedPatchingConfig,
    LearnedPositionsConfig,
    LinearHeadConfig,
    MoEConfig,
    NgramsConfig,
    NoPositionsConfig,
    PublishedEmbedderConfig,
    PublishedHeadConfig,
    ReLUSquaredConfig,
    ResidualConfig,
    RMSNormConfig,
    RoPEConfig,
    SpacePatchingConfig,
    SwiGLUConfig,
    TokenEmbedderConfig,
    TransformerCoreConfig,
)
from stlm.model.core.attention import ATTENTIONS
from stlm.model.core.base import CORES as CORE_KINDS
from stlm.model.core.feed_forward import FEED_FORWARDS
from stlm.model.core.normalization import NORMS
from stlm.model.core.positions import POSITIONS

EXAMPLES = {  # at least one for each entry, with settings away from their defaults
    CORE_KINDS: [TransformerCoreConfig(num_layers=2)],
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
PAIRS = {  # embedders and heads
    "token+linear": (TokenEmbedderConfig(), LinearHeadConfig()),
    "token+linear, untied": (TokenEmbedderConfig(), LinearHeadConfig(tied=False)),
    "token+linear, factorised": (TokenEmbedderConfig(rank=8), LinearHeadConfig()),
    "token+linear, factorised, bigrams, untied": (
        TokenEmbedderConfig(rank=8, ngrams=NgramsConfig(table_size=40)),
        LinearHeadConfig(tied=False),
    ),
    "byte+linear": (ByteEmbedderConfig(), LinearHeadConfig()),
    "byte+linear, n-grams": (ByteEmbedderConfig(ngrams=ByteNgramsConfig(table_size=50, longest=5)), LinearHeadConfig()),
    "byte_patch+byte_patch": (
        BytePatchEmbedderConfig(FixedPatchingConfig(4), width=16, num_heads=2, window=5),
        BytePatchHeadConfig(num_layers=2, num_heads=2, window=6),
    ),
    "byte_patch+byte_patch, patches of 3, untied": (
        BytePatchEmbedderConfig(FixedPatchingConfig(3), width=16, num_layers=2, num_heads=2, window=32),
        BytePatchHeadConfig(num_heads=2, window=32, tied=False),
    ),
    "byte_patch+byte_patch, patches of words": (
        BytePatchEmbedderConfig(SpacePatchingConfig(patch_length=3.0, span=4), width=16, num_heads=2, window=5),
        BytePatchHeadConfig(num_layers=2, num_heads=2, window=6),
    ),
    "byte_patch+byte_patch, patches that are learned": (
        BytePatchEmbedderConfig(LearnedPatchingConfig(patch_length=3.0, span=4), width=16, num_heads=2, window=5),
        BytePatchHeadConfig(num_layers=2, num_heads=2, window=6),
    ),
    "byte_patch+byte_patch, patches of hard bytes": (
        BytePatchEmbedderConfig(
            EntropyPatchingConfig(patch_length=3.0, span=4, width=16, core=TransformerCoreConfig(num_layers=1)),
            width=16,
            num_heads=2,
            window=5,
        ),
        BytePatchHeadConfig(num_layers=2, num_heads=2, window=6),
    ),
    "byte_patch+byte_patch, n-grams": (
        BytePatchEmbedderConfig(width=16, num_heads=2, window=5, ngrams=ByteNgramsConfig(table_size=30)),
        BytePatchHeadConfig(num_heads=2, window=6),
    ),
    "paper+paper": (PublishedEmbedderConfig(slots=3, width=16, num_heads=2), PublishedHeadConfig(num_heads=2)),
    "paper+paper, untied": (
        PublishedEmbedderConfig(slots=2, width=16, num_layers=1, num_heads=2),
        PublishedHeadConfig(num_layers=1, num_heads=4, tied=False),
    ),
    "paper+linear": (PublishedEmbedderConfig(slots=2, width=16, num_heads=2), LinearHeadConfig(tied=False)),
}
PLAIN = TransformerCoreConfig(num_layers=2, attention=GroupedQueryConfig(num_heads=4, num_kv_heads=2))
CORES = {  # parts of a transformer core
    "GPT-2": TransformerCoreConfig(
        num_layers=2,
        attention=GroupedQueryConfig(bias="all"),
        feed_forward=GELUConfig(approximate=True, bias=True),
        norm=LayerNormConfig(),
        positions=LearnedPositionsConfig(),
    ),
    "GPT-NeoX": TransformerCoreConfig(
        num_layers=2,
        attention=GroupedQueryConfig(bias="all"),
        feed_forward=GELUConfig(bias=True),
        norm=LayerNormConfig(),
        positions=RoPEConfig(fraction=0.5),
        residual=ResidualConfig(parallel=True),
    ),
    "Qwen3": TransformerCoreConfig(
        num_layers=2, attention=GroupedQueryConfig(num_kv_heads=2, head_width=16, qk_norm=True, bias="qkv")
    ),
    "every other layer sees all, capped": TransformerCoreConfig(
        num_layers=2, attention=GroupedQueryConfig(num_kv_heads=2, window=5, full_every=2, logit_cap=2.0)
    ),
    "ALiBi, one key, ReLU squared": TransformerCoreConfig(
        num_layers=2,
        attention=GroupedQueryConfig(num_kv_heads=1),
        feed_forward=ReLUSquaredConfig(),
        positions=ALiBiConfig(),
    ),
    "ALiBi, windows, capped": TransformerCoreConfig(
        num_layers=2,
        attention=GroupedQueryConfig(window=7, full_every=2, logit_cap=2.0),
        positions=ALiBiConfig(),
    ),
    "no positions, value residual, learned scale": TransformerCoreConfig(
        num_layers=3,
        attention=GroupedQueryConfig(num_kv_heads=2, value_residual=True),
        positions=NoPositionsConfig(),
        residual=ResidualConfig(scale=0.5, learned_scale=True),
    ),
    "experts, one of them shared": TransformerCoreConfig(
        num_layers=2, feed_forward=MoEConfig(num_experts=4, hidden_width=16, shared_hidden_width=8)
    ),
    "experts, one for each": TransformerCoreConfig(
        num_layers=2, feed_forward=MoEConfig(num_experts=3, experts_per_token=1), residual=ResidualConfig(scale=0.5)
    ),
}
for registry, examples in EXAMPLES.items():
    part = registry.name.removeprefix("core.")
    for example in examples:  # kinds that no core above has
        if part != "core" and all(getattr(core, part).kind != example.kind for core in CORES.values()):
            CORES[example.kind] = TransformerCoreConfig(num_layers=2, **{part: example})
BYTES, HEAD = ByteEmbedderConfig(scaled=False), LinearHeadConfig(logit_cap=3.0)
PAIRS |= {f"byte+linear, {name}": (BYTES, HEAD, core) for name, core in CORES.items()}
PAIRS |= {
    f"byte_patch+byte_patch, {name}": (
        BytePatchEmbedderConfig(patching=FixedPatchingConfig(patch_size=3), width=16, num_heads=2, window=5),
        BytePatchHeadConfig(num_heads=2, window=6, logit_cap=3.0),
        CORES[name],
    )
    for name in ("GPT-2", "no positions, value residual, learned scale", "experts, one for each")
}
