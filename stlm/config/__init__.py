"""What decides a run: one tree of frozen dataclasses, read from strict YAML with every problem named at once."""

from data_pipeline.config import DataConfig
from stlm.config.attention import AttentionConfig, GroupedQueryConfig
from stlm.config.build import from_dict, to_dict, value_at
from stlm.config.cores import CoreConfig, ResidualConfig, TransformerCoreConfig
from stlm.config.deepspeed import load_deepspeed_config, stated_precision
from stlm.config.embedders import (
    ByteEmbedderConfig,
    BytePatchEmbedderConfig,
    EmbedderConfig,
    PaperEmbedderConfig,
    TokenEmbedderConfig,
)
from stlm.config.evals import EvalsConfig
from stlm.config.exits import ExitsConfig
from stlm.config.feed_forward import FeedForwardConfig, GELUConfig, MoEConfig, ReLUSquaredConfig, SwiGLUConfig
from stlm.config.fields import ON_REQUEST
from stlm.config.heads import BytePatchHeadConfig, HeadConfig, LinearHeadConfig, PaperHeadConfig
from stlm.config.loops import LoopsConfig
from stlm.config.lora import LoRAConfig
from stlm.config.ngrams import ByteNgramsConfig, NgramsConfig
from stlm.config.normalization import LayerNormConfig, NormConfig, RMSNormConfig
from stlm.config.patching import (
    EntropyPatchingConfig,
    FixedPatchingConfig,
    LearnedPatchingConfig,
    PatchingConfig,
    SpacePatchingConfig,
)
from stlm.config.positions import ALiBiConfig, LearnedPositionsConfig, NoPositionsConfig, PositionsConfig, RoPEConfig
from stlm.config.reader import (
    changed_keys,
    data_folder,
    dump_run_config,
    following,
    load_run_config,
    preset_names,
)
from stlm.config.schema import ModelConfig, RunConfig, TrainingConfig
from stlm.config.sharing import SharingConfig
from stlm.config.tree import written

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
    "load_run_config",
    "data_folder",
    "following",
    "dump_run_config",
    "preset_names",
    "changed_keys",
    "stated_precision",
    "to_dict",
    "from_dict",
    "value_at",
    "written",
    "load_deepspeed_config",
]
