"""Configuration of a run: one tree of frozen dataclasses, read from strict YAML, with all problems in one report."""

from data_pipeline.config import DataConfig
from stlm.config.deepspeed import load_deepspeed_config, stated_precision
from stlm.config.evals import EvalsConfig
from stlm.config.model.attention import AttentionConfig, GroupedQueryConfig
from stlm.config.model.core import CoreConfig, ResidualConfig, TransformerCoreConfig
from stlm.config.model.embedders import (
    ByteEmbedderConfig,
    BytePatchEmbedderConfig,
    EmbedderConfig,
    PaperEmbedderConfig,
    TokenEmbedderConfig,
)
from stlm.config.model.exits import ExitsConfig
from stlm.config.model.feed_forward import FeedForwardConfig, GELUConfig, MoEConfig, ReLUSquaredConfig, SwiGLUConfig
from stlm.config.model.heads import BytePatchHeadConfig, HeadConfig, LinearHeadConfig, PaperHeadConfig
from stlm.config.model.loops import LoopsConfig
from stlm.config.model.lora import LoRAConfig
from stlm.config.model.ngrams import ByteNgramsConfig, NgramsConfig
from stlm.config.model.normalization import LayerNormConfig, NormConfig, RMSNormConfig
from stlm.config.model.patching import (
    EntropyPatchingConfig,
    FixedPatchingConfig,
    LearnedPatchingConfig,
    PatchingConfig,
    SpacePatchingConfig,
)
from stlm.config.model.positions import (
    ALiBiConfig,
    LearnedPositionsConfig,
    NoPositionsConfig,
    PositionsConfig,
    RoPEConfig,
)
from stlm.config.model.sharing import SharingConfig
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
from stlm.config.schema import ModelConfig, RunConfig, TrainingConfig
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
    "PaperEmbedderConfig",
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
    "PaperHeadConfig",
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
