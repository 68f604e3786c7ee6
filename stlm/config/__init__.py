"""Configuration of a run: one tree of frozen dataclasses, read from strict YAML, with all problems in one report."""

from data_pipeline.config import DataConfig
from stlm.config.deepspeed import load_deepspeed_config, stated_precision
from stlm.config.evals import EvalsConfig
from stlm.config.model.core.attention import AttentionConfig, GroupedQueryConfig
from stlm.config.model.core.base import CoreConfig
from stlm.config.model.core.blocks import LoopsConfig, ResidualConfig
from stlm.config.model.core.feed_forward import FeedForwardConfig, GELUConfig, ReLUSquaredConfig, SwiGLUConfig
from stlm.config.model.core.lora import LoRAConfig
from stlm.config.model.core.moe import MoEConfig
from stlm.config.model.core.normalization import LayerNormConfig, NormConfig, RMSNormConfig
from stlm.config.model.core.positions import (
    ALiBiConfig,
    LearnedPositionsConfig,
    NoPositionsConfig,
    PositionsConfig,
    RoPEConfig,
)
from stlm.config.model.core.sharing import SharingConfig
from stlm.config.model.core.transformer import TransformerCoreConfig
from stlm.config.model.embedders.base import EmbedderConfig
from stlm.config.model.embedders.byte import ByteEmbedderConfig
from stlm.config.model.embedders.byte_patch import BytePatchEmbedderConfig
from stlm.config.model.embedders.ngrams import ByteNgramsConfig, NgramsConfig
from stlm.config.model.embedders.patching.entropy import EntropyPatchingConfig
from stlm.config.model.embedders.patching.learned import LearnedPatchingConfig
from stlm.config.model.embedders.patching.rules import FixedPatchingConfig, PatchingConfig, SpacePatchingConfig
from stlm.config.model.embedders.published import PublishedEmbedderConfig
from stlm.config.model.embedders.token import TokenEmbedderConfig
from stlm.config.model.exits import ExitsConfig
from stlm.config.model.heads.base import HeadConfig
from stlm.config.model.heads.byte_patch import BytePatchHeadConfig
from stlm.config.model.heads.linear import LinearHeadConfig
from stlm.config.model.heads.published import PublishedHeadConfig
from stlm.config.model.network import ModelConfig
from stlm.config.objectives import NextTokenConfig, ObjectiveConfig
from stlm.config.reader import (
    changed_keys,
    data_folder,
    dump_run_config,
    following,
    list_presets,
    load_run_config,
    preset_names,
)
from stlm.config.schema import RunConfig, TrainingConfig
from stlm.config.yaml.build import from_dict, to_dict, value_at
from stlm.config.yaml.fields import ON_REQUEST
from stlm.config.yaml.tree import written

__all__ = [
    "ON_REQUEST",
    "RunConfig",
    "DataConfig",
    "ModelConfig",
    "TrainingConfig",
    "EvalsConfig",
    "EmbedderConfig",
    "TokenEmbedderConfig",
    "ByteEmbedderConfig",
    "BytePatchEmbedderConfig",
    "PublishedEmbedderConfig",
    "NgramsConfig",
    "ByteNgramsConfig",
    "PatchingConfig",
    "FixedPatchingConfig",
    "SpacePatchingConfig",
    "LearnedPatchingConfig",
    "EntropyPatchingConfig",
    "CoreConfig",
    "TransformerCoreConfig",
    "SharingConfig",
    "LoopsConfig",
    "LoRAConfig",
    "ExitsConfig",
    "AttentionConfig",
    "GroupedQueryConfig",
    "FeedForwardConfig",
    "SwiGLUConfig",
    "GELUConfig",
    "ReLUSquaredConfig",
    "MoEConfig",
    "NormConfig",
    "RMSNormConfig",
    "LayerNormConfig",
    "PositionsConfig",
    "RoPEConfig",
    "LearnedPositionsConfig",
    "NoPositionsConfig",
    "ALiBiConfig",
    "ResidualConfig",
    "HeadConfig",
    "LinearHeadConfig",
    "BytePatchHeadConfig",
    "PublishedHeadConfig",
    "ObjectiveConfig",
    "NextTokenConfig",
    "load_run_config",
    "data_folder",
    "following",
    "dump_run_config",
    "list_presets",
    "preset_names",
    "changed_keys",
    "stated_precision",
    "to_dict",
    "from_dict",
    "value_at",
    "written",
    "load_deepspeed_config",
]
