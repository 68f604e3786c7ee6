"""Architectures of transformers as configs of this project, with the mapping of weights: the inverse of `families`.

Every field of a transformers config is read here, or known not to affect the logits, or required to have its default:
unknown settings are never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from stlm.config import (
    GELUConfig,
    GroupedQueryConfig,
    LayerNormConfig,
    LearnedPositionsConfig,
    LinearHeadConfig,
    ModelConfig,
    ResidualConfig,
    RMSNormConfig,
    RoPEConfig,
    SwiGLUConfig,
    TokenEmbedderConfig,
    TransformerCoreConfig,
)
from stlm.errors import ConversionError
from stlm.export.huggingface.families import transformers_name
from stlm.stlm import STLM

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "granite")

# Settings of training, generation and output, which do not affect the logits.
_INERT = """
    _name_or_path architectures attention_dropout attn_pdrop auto_map bos_token_id chunk_size_feed_forward dtype
    embd_pdrop eos_token_id id2label initializer_range keys_to_ignore_at_inference label2id max_window_layers model_type
    n_ctx output_attentions output_hidden_states pad_token_id pretraining_tp problem_type reorder_and_upcast_attn
    resid_pdrop return_dict sliding_window summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params torch_dtype transformers_version use_cache
"""
_READ = """
    activation_function attention_bias attention_multiplier embedding_multiplier head_dim hidden_size intermediate_size
    layer_norm_epsilon layer_types max_position_embeddings mlp_bias n_embd n_head n_inner n_layer n_positions
    num_attention_heads num_hidden_layers num_key_value_heads residual_multiplier rms_norm_eps rope_parameters
    tie_word_embeddings vocab_size
"""
_KNOWN = frozenset((_INERT + _READ).split())
_GELU = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu": False}  # approximated by tanh?


def config_of(config: Any, source: str) -> ModelConfig:
    """Return the config of a model whose transformers config is `config`, with a token embedder.

    Raises ConversionError, naming the keys that cannot be expressed.
    """
    if config.model_type not in FAMILIES:
        raise ConversionError(
            f"{source}: model_type: got {config.model_type!r}, which has no counterpart here, expected one of "
            f"{', '.join(FAMILIES)}"
        )
    if obstacles := list(_obstacles(config)):
        raise ConversionError(f"{source}: stlm cannot express {' and '.join(obstacles)} of a {config.model_type} model")
    found = _gpt2(config) if config.model_type == "gpt2" else _llama(config)
    for conflict in found.check():
        raise ConversionError(f"{source}: stlm cannot express this model: model.{conflict.key}: {conflict.message}")
    return found


def _obstacles(config: Any) -> Iterator[str]:
    """Yield the fields that cannot be expressed, as "key = value"."""
    given, usual = config.to_dict(), type(config)().to_dict()
    for key, value in given.items():
        if key not in _KNOWN and value != usual.get(key):
            yield f"{key} = {value}"
    rope = given.get("rope_parameters") or {}
    for key, value in rope.items():
        if key != "rope_theta" and (key, value) not in (("rope_type", "default"), ("partial_rotary_factor", 1.0)):
            yield f"rope_parameters.{key} = {value}"
    for kind in sorted(set(given.get("layer_types") or ()) - {"full_attention"}):
        yield f"layer_types = {kind}"
    if config.model_type == "gpt2" and config.activation_function not in _GELU:
        yield f"activation_function = {config.activation_function}"
    if config.model_type == "granite":
        if not math.isclose(config.attention_multiplier, _head_width(config) ** -0.5, rel_tol=1e-6):
            yield f"attention_multiplier = {config.attention_multiplier:g}"
        if not _scales_by_root(config) and config.embedding_multiplier != 1:
            yield f"embedding_multiplier = {config.embedding_multiplier:g}"


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _scales_by_root(config: Any) -> bool:
    """Return whether embeddings are scaled by the square root of the width, as in this project."""
    return math.isclose(getattr(config, "embedding_multiplier", 1.0), config.hidden_size**0.5, rel_tol=1e-6)


def _llama(config: Any) -> ModelConfig:
    """Return the config of Llama and its variants by norms, biases or factors."""
    heads, kv_heads, head_width = config.num_attention_heads, config.num_key_value_heads, _head_width(config)
    all_biased = getattr(config, "attention_bias", False)
    attention = GroupedQueryConfig(
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        head_width=None if head_width * heads == config.hidden_size else head_width,
        bias="qkv" if config.model_type == "qwen2" else "all" if all_biased else "none",
        qk_norm=config.model_type == "qwen3",
    )
    core = TransformerCoreConfig(
        num_layers=config.num_hidden_layers,
        attention=attention,
        feed_forward=SwiGLUConfig(config.intermediate_size, bias=getattr(config, "mlp_bias", False)),
        norm=RMSNormConfig(config.rms_norm_eps),
        positions=RoPEConfig(float(config.rope_parameters["rope_theta"])),
        residual=ResidualConfig(scale=float(getattr(config, "residual_multiplier", 1.0))),
    )
    return ModelConfig(
        context_length=config.max_position_embeddings,
        width=config.hidden_size,
        embedder=TokenEmbedderConfig(scaled=_scales_by_root(config)),
        core=core,
        head=LinearHeadConfig(tied=config.tie_word_embeddings),
    )


def _gpt2(config: Any) -> ModelConfig:
    """Return the config of GPT-2 (Radford et al. 2019): LayerNorm, learned positions, gelu, biases everywhere."""
    gelu = GELUConfig(config.n_inner or 4 * config.n_embd, bias=True, approximate=_GELU[config.activation_function])
    core = TransformerCoreConfig(
        num_layers=config.n_layer,
        attention=GroupedQueryConfig(num_heads=config.n_head, bias="all"),
        feed_forward=gelu,
        norm=LayerNormConfig(config.layer_norm_epsilon),
        positions=LearnedPositionsConfig(),
    )
    return ModelConfig(
        context_length=config.n_positions,
        width=config.n_embd,
        embedder=TokenEmbedderConfig(scaled=False),
        core=core,
        head=LinearHeadConfig(tied=config.tie_word_embeddings),
    )


def tensors_of(weights: Mapping[str, Tensor], model: STLM, family: str, source: str) -> dict[str, Tensor]:
    """Return the tensors of `model` by parameter name, taken from the weights of transformers.

    Raises ConversionError where weights are left over.
    """
    weights = dict(weights)
    if model.config.head.tied:
        weights.pop("lm_head.weight", None)
    rename = _gpt2_tensor if family == "gpt2" else _llama_tensor
    found, used = {}, set()
    for name, parameter in model.named_parameters():
        their_name, tensor = rename(weights, name, parameter)
        found[name] = tensor
        used.add(their_name)
    if left := sorted(set(weights) - used):
        raise ConversionError(f"{source}: weights without a counterpart here: {', '.join(left[:3])}")
    return found


def _llama_tensor(weights: Mapping[str, Tensor], name: str, parameter: Tensor) -> tuple[str, Tensor]:
    their_name = transformers_name(name)
    return their_name, weights[their_name]


_GPT2_BLOCK = {
    "attention_norm": "ln_1",
    "attention.query": "attn.c_attn",
    "attention.key": "attn.c_attn",
    "attention.value": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
_GPT2_OUTSIDE = {
    "embedder.table": "transformer.wte",
    "core.stack.positions.table": "transformer.wpe",
    "core.norm": "transformer.ln_f",
    "head.output": "lm_head",
}
_THIRDS = ("query", "key", "value")  # side by side in one matrix


def _gpt2_tensor(weights: Mapping[str, Tensor], name: str, parameter: Tensor) -> tuple[str, Tensor]:
    """Return a parameter's name in GPT-2 and its tensor. GPT-2 stores matrices transposed, [in, out]."""
    place, _, kind = name.rpartition(".")
    if place in _GPT2_OUTSIDE:
        their_name = f"{_GPT2_OUTSIDE[place]}.{kind}"
        return their_name, weights[their_name]
    number, _, part = place.removeprefix("core.stack.blocks.").partition(".")
    their_name = f"transformer.h.{number}.{_GPT2_BLOCK[part]}.{kind}"
    tensor = weights[their_name]
    last = part.rpartition(".")[2]
    if last in _THIRDS:
        tensor = tensor.chunk(3, dim=-1)[_THIRDS.index(last)]
    return their_name, tensor.T if tensor.dim() == 2 else tensor
