"""Models as architectures of transformers: Llama, and variants with other norms or factors.

Llama (arXiv 2302.13971) is the plain transformer core. Qwen3 (arXiv 2505.09388) normalizes queries and keys. Granite
(IBM, 2024) is Llama with factors on embeddings and on branch outputs: a model that scales its embeddings by sqrt(width)
is exported as Granite, with bit-equal weights.
"""

from __future__ import annotations

from typing import Any

from stlm.config import (
    ByteEmbedderConfig,
    GroupedQueryConfig,
    LinearHeadConfig,
    ModelConfig,
    ResidualConfig,
    RMSNormConfig,
    RoPEConfig,
    SwiGLUConfig,
    TokenEmbedderConfig,
    TransformerCoreConfig,
    changed_keys,
    value_at,
)

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "granite": "GraniteForCausalLM"}

# Names of a block's modules here and in transformers, and of modules outside of blocks.
_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_OUTSIDE = {"embedder.table": "model.embed_tokens", "core.norm": "model.norm", "head.output": "lm_head"}


def transformers_name(name: str) -> str:
    """Return a parameter's name in transformers: core.stack.blocks.0.attention.query.weight → model.layers.0.…"""
    place, _, kind = name.rpartition(".")
    if place in _OUTSIDE:
        return f"{_OUTSIDE[place]}.{kind}"
    number, _, part = place.removeprefix("core.stack.blocks.").partition(".")
    return f"model.layers.{number}.{_BLOCK[part]}.{kind}"


def obstacles(config: ModelConfig) -> list[str]:
    """Return the settings that no family can express, as "model.key = value"; if none, `describe` gives the family."""
    embedder, core, head = config.embedder, config.core, config.head
    plain_core: Any = TransformerCoreConfig()
    if isinstance(core, TransformerCoreConfig):
        attention, feed_forward, norm, positions = core.attention, core.feed_forward, core.norm, core.positions
        if isinstance(attention, GroupedQueryConfig):
            heads = attention.num_heads, attention.num_kv_heads, attention.head_width
            attention = GroupedQueryConfig(*heads, qk_norm=attention.qk_norm)
        plain_core = TransformerCoreConfig(
            num_layers=core.num_layers,
            attention=attention,
            feed_forward=SwiGLUConfig(getattr(feed_forward, "hidden_width", None)),
            norm=RMSNormConfig(norm.eps) if isinstance(norm, RMSNormConfig) else RMSNormConfig(),
            positions=RoPEConfig(positions.theta) if isinstance(positions, RoPEConfig) else RoPEConfig(),
            residual=ResidualConfig(scale=core.residual.scale),
            exits=core.exits,  # the last exit is the whole model
            layer_dropout=core.layer_dropout,  # only in training
        )
    kind = ByteEmbedderConfig if isinstance(embedder, ByteEmbedderConfig) else TokenEmbedderConfig
    plain = ModelConfig(
        config.context_length,
        config.width,
        embedder=kind(scaled=getattr(embedder, "scaled", True)),
        core=plain_core,
        head=LinearHeadConfig(head.tied),
    )
    keys = changed_keys(config, plain)
    if not keys and plain_core.attention.qk_norm:  # Qwen3 has no factors
        keys += ["embedder.scaled"] if value_at(config, "embedder.scaled") else []
        keys += ["core.residual.scale"] if plain_core.residual.scale != 1 else []
    return [f"model.{key} = {_as_yaml(value_at(config, key))}" for key in keys]


def _as_yaml(value: Any) -> str:
    """Return a value as in YAML."""
    if isinstance(value, float):
        return f"{value:g}"
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))


def describe(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a transformers config, including `model_type`, for a model without obstacles."""
    core: Any = config.core
    attention, scaled = core.attention, value_at(config, "embedder.scaled")
    head_width = attention.head_width_of(config.width)
    fields = {
        "hidden_size": config.width,
        "intermediate_size": core.feed_forward.hidden_width_of(config.width),
        "num_hidden_layers": core.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads or attention.num_heads,
        "head_dim": head_width,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": core.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": core.positions.theta},
        "tie_word_embeddings": config.head.tied,
    }
    if attention.qk_norm:
        return {"model_type": "qwen3", **fields}
    if not scaled and core.residual.scale == 1:
        return {"model_type": "llama", **fields}
    factors = {
        "embedding_multiplier": config.width**0.5 if scaled else 1.0,
        "residual_multiplier": core.residual.scale,
        "attention_multiplier": head_width**-0.5,
        "logits_scaling": 1.0,
    }
    return {"model_type": "granite", **fields, **factors}
