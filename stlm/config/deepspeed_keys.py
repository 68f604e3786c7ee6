"""Table of DeepSpeed's keys: those that work here, and an alternative for each of the others.

The table covers all keys that DeepSpeed 0.19.7 and 0.19.8 read. A key works if training with it, on one rank and on
several, gives the same result as without it, apart from the key's purpose. All others are refused by name: keys that
the run config owns, that only DeepSpeed's own data loader, optimizers, checkpoints or parallel layers read, that would
change the gradient, or that end in a traceback.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STAGES = (0, 1, 2, 3)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys that work, by section. tests/training/test_deepspeed_keys.py trains with each of them, on one rank and on two.
TOP_LEVEL = _names("""
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer scheduler
    fp16 bf16 torch_autocast zero_optimization communication_data_type
    wall_clock_breakdown log_level flops_profiler tensorboard csv_monitor
    """)
SECTIONS = {
    "zero_optimization": _names("""
        stage reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_bucket_size overlap_comm offload_param offload_optimizer sub_group_size
        stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold
        stage3_max_live_parameters stage3_max_reuse_distance stage3_use_all_reduce_for_fetch_params
        stage3_allgather_sequential ignore_unused_parameters parameter_alignment
        log_trace_cache_warnings enable_sanity_checks leaf_module
        """),
    "zero_optimization.offload_optimizer": _names("device pin_memory"),
    "zero_optimization.offload_param": _names("device pin_memory"),
    "zero_optimization.leaf_module": _names("classes names name_suffixes"),
    "fp16": _names("""
        enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads
        """),
    "bf16": _names(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "torch_autocast": _names("enabled dtype lower_precision_safe_modules"),
    "flops_profiler": _names("enabled profile_step module_depth top_modules detailed output_file recompute_fwd_factor"),
    "tensorboard": _names("enabled output_path job_name"),
    "csv_monitor": _names("enabled output_path job_name"),
}

# Stages at which a key has an effect; keys that are not listed have one at all stages.
EFFECTIVE_AT = {
    "torch_autocast.lower_precision_safe_modules": (1, 2, 3),
    **{
        f"zero_optimization.{key}": stages
        for keys, stages in (
            ("reduce_scatter reduce_bucket_size overlap_comm offload_optimizer", (1, 2, 3)),
            ("use_multi_rank_bucket_allreduce allgather_bucket_size parameter_alignment", (1, 2)),
            ("ignore_unused_parameters", (1, 2)),
            (
                "offload_param sub_group_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
                "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
                "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential log_trace_cache_warnings "
                "enable_sanity_checks leaf_module",
                (3,),
            ),
        )
        for key in keys.split()
    },
}

# In elements; DeepSpeed's own files may write them as 5e8. No buffer is larger than this.
LARGEST_BUCKET = 2**40


def _is_bucket(value: Any, multiple_of: int) -> bool:
    """Return True for a whole number that may be the size of a buffer."""
    return type(value) in (int, float) and 1 <= value <= LARGEST_BUCKET and value % multiple_of == 0


def _can_hold(folder: Path) -> bool:
    """Return True if files can be written to a folder, or if a missing folder can be made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _is_folder(value: Any) -> bool:
    return isinstance(value, str) and _can_hold(Path(value).absolute())


def _is_file(value: Any) -> bool:
    path = Path(value).absolute() if isinstance(value, str) and value else None
    return value is None or (path is not None and not path.is_dir() and _can_hold(path.parent))


# Values that DeepSpeed would accept and misuse, or fail at in the middle of a run: key → (check, expected value).
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("wall_clock_breakdown", "flops_profiler.enabled", "flops_profiler.detailed"),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
    **dict.fromkeys(
        ("flops_profiler.profile_step", "flops_profiler.top_modules"),
        (lambda value: type(value) is int and value > 0, "a number of 1 or more"),
    ),
    "flops_profiler.module_depth": (lambda value: type(value) is int and value >= -1, "a number of -1 or more"),
    "flops_profiler.recompute_fwd_factor": (
        lambda value: type(value) in (int, float) and value >= 0, "a number of 0 or more"
    ),
    "flops_profiler.output_file": (_is_file, "the name of a file that can be written, or null"),
    **dict.fromkeys(
        ("tensorboard.output_path", "csv_monitor.output_path"), (_is_folder, "a folder that can be written")
    ),
    "zero_optimization.reduce_bucket_size": (
        lambda value: _is_bucket(value, 1), "a whole number of elements, 1 or more"
    ),
    "zero_optimization.allgather_bucket_size": (
        lambda value: _is_bucket(value, 2), "an even number of elements, 2 or more"
    ),
    "log_level": (
        lambda value: value in ("debug", "info", "warning", "error", "critical"),
        "debug, info, warning, error or critical",
    ),
    "torch_autocast.lower_precision_safe_modules": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) and "." in name for name in value),
        "a list of classes, such as torch.nn.Linear",
    ),
    "communication_data_type": (lambda value: str(value).lower() in ("fp32", "bf16", "fp16"), "fp32, bf16 or fp16"),
    **dict.fromkeys(
        ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"),
        (lambda value: value in ("cpu", "none"), "cpu or none: training here builds no operator for NVMe"),
    ),
}  # fmt: skip


class Refusal(NamedTuple):
    """A key that DeepSpeed reads and this project refuses."""

    instead: str  # why, and what to use
    harmless: tuple[Any, ...] = ()  # values that change nothing, and are accepted


_OWN_CHECKPOINTS = "checkpoints are this project's own (training.save_every_steps) and fit any stage; leave it out"
_EVEN_SUM = "gradients are summed over ranks and divided once, by the ids of the whole step; leave it out"
_NVME = "training here builds no operator for NVMe; use the device cpu, which has no such key"
_QUANTIZED = "it needs operators that training here does not build; communication_data_type=bf16 halves what is sent"
_OWN_OPTIMIZER = "the optimizer is not one of DeepSpeed's but that of training.optimizer; leave it out"
_FP32 = "weights and sums of gradients are fp32, and training.precision decides the rest; leave it out"
_OFF_TIMERS = ({"throughput": {"enabled": False}},)
_REMOVED = "DeepSpeed has removed it"

REFUSED: dict[str, Refusal] = {
    "zero_allow_untested_optimizer": Refusal(_OWN_OPTIMIZER, (True,)),
    "zero_force_ds_cpu_optimizer": Refusal(_OWN_OPTIMIZER, (False,)),
    "gradient_allreduce_op": Refusal(_EVEN_SUM, ("mean",)),
    "prescale_gradients": Refusal(_EVEN_SUM, (False,)),
    "gradient_predivide_factor": Refusal(_EVEN_SUM, (1, 1.0)),
    "managed_gradient_accumulation": Refusal(
        "the trainer accumulates; set training.batch_size and training.micro_batch_size", (True,)
    ),
    "disable_allgather": Refusal("DeepSpeed reads it and does nothing with it; leave it out", (False,)),
    "disable_python_gc": Refusal("not every version from 0.19.7 on reads it; leave it out", (False,)),
    "data_types": Refusal(_FP32, ({"grad_accum_dtype": "fp32"},)),
    "bfloat16": Refusal("its name is bf16; training.precision=bf16 says the same"),
    "amp": Refusal(f"{_REMOVED}; set training.precision"),
    "sequence_parallel_size": Refusal(
        "ranks share the rows of a batch, and each reads whole rows; set training.micro_batch_size", (1,)
    ),
    "seq_parallel_communication_data_type": Refusal("no row is cut over ranks; use communication_data_type"),
    "data_parallel_size": Refusal(
        "all ranks share the rows of a batch; choose their number with deepspeed --num_accelerators"
    ),
    "use_data_before_expert_parallelism": Refusal(
        "every rank holds all experts; model.core.feed_forward decides their number", (False,)
    ),
    "tensor_parallel": Refusal("no layer is cut over ranks; use zero_optimization.stage=3 where weights do not fit"),
    "expert_parallel": Refusal("every rank holds all experts; model.core.feed_forward decides their number"),
    "pipeline": Refusal("no rank holds only some layers; use zero_optimization.stage=3 where weights do not fit"),
    "hybrid_engine": Refusal(
        "text is generated without DeepSpeed: scripts/generate.py; leave it out",
        ({"enabled": False},),
    ),
    "compile": Refusal("use training.compile", ({"deepcompile": False}, {})),
    "activation_checkpointing": Refusal("use training.activation_checkpointing"),
    "aio": Refusal(_NVME),
    "data_efficiency": Refusal(
        "use data.packing and data.curriculum",
        ({"enabled": False},),
    ),
    "curriculum_learning": Refusal(f"{_REMOVED}; use data.curriculum"),
    "dataloader_drop_last": Refusal(
        "the data are this project's own, and every window is read; leave it out",
        (False,),
    ),
    "weight_quantization": Refusal("use training.quantization_bits and training.quantization_steps"),
    "compression_training": Refusal(f"{_REMOVED}; use training.quantization_bits and training.quantization_steps"),
    "quantize_training": Refusal(f"{_REMOVED}; use training.quantization_bits and training.quantization_steps"),
    "eigenvalue": Refusal(f"{_REMOVED}; use training.quantization_bits and training.quantization_steps"),
    "checkpoint": Refusal(_OWN_CHECKPOINTS),
    "datastates_ckpt": Refusal(_OWN_CHECKPOINTS),
    "nebula": Refusal(f"{_REMOVED}, and {_OWN_CHECKPOINTS}"),
    "elasticity": Refusal("a run continues on any number of ranks; set training.batch_size"),
    "sparse_gradients": Refusal(f"{_REMOVED}; leave it out"),
    "sparse_attention": Refusal(f"{_REMOVED}; use model.core.attention.window"),
    "graph_harvesting": Refusal(f"{_REMOVED}; use training.compile"),
    "progressive_layer_drop": Refusal(f"{_REMOVED}; leave it out"),
    "steps_per_print": Refusal("progress is printed every training.log_every_steps; leave it out"),
    "timers": Refusal("every line of metrics.jsonl has the speed and the time of each phase", _OFF_TIMERS),
    "comms_logger": Refusal("every line of metrics.jsonl has the time that communication took"),
    "memory_breakdown": Refusal("every line of metrics.jsonl has the memory of the ranks", (False,)),
    "dump_state": Refusal("environment.json of the run has the whole configuration", (False,)),
    "vocabulary_size": Refusal("the tokenizer of the data decides it; leave it out"),
    "autotuning": Refusal(
        "set training.micro_batch_size; scripts/describe.py computes memory, benchmarks/scaling.py measures stages",
        ({"enabled": False},),
    ),
    "wandb": Refusal("use training.wandb=true", ({"enabled": False},)),
    "comet": Refusal(
        "use training.wandb=true, or read metrics.jsonl and tensorboard/ of the run",
        ({"enabled": False},),
    ),
    **{
        f"zero_optimization.{key}": refusal
        for key, refusal in {
            "compute_grad_norm": Refusal("the trainer clips by the norm, records it and judges steps by it", (True,)),
            "contiguous_gradients": Refusal(
                "without it DeepSpeed 0.19.7 adds up the micro-batches of several ranks wrongly; leave it out", (True,)
            ),
            "round_robin_gradients": Refusal(
                "with it DeepSpeed puts the weights of a checkpoint into the wrong places; leave it out", (False,)
            ),
            "allgather_partitions": Refusal("DeepSpeed reads it and does nothing with it; leave it out", (True,)),
            "legacy_stage1": Refusal("DeepSpeed has no other stage 1 any more; leave it out", (False,)),
            "zenflow": Refusal("it updates some weights late; use offload_optimizer.device=cpu"),
            "stage3_module_granularity_threshold": Refusal(
                "weights that are fetched for several modules at once have no place in a checkpoint here; use "
                "leaf_module", (0,)
            ),
            "load_from_fp32_weights": Refusal(_OWN_CHECKPOINTS, (True,)),
            "elastic_checkpoint": Refusal(_OWN_CHECKPOINTS, (False,)),
            "pipeline_loading_checkpoint": Refusal(_OWN_CHECKPOINTS, (False,)),
            "stage3_gather_16bit_weights_on_model_save": Refusal(_OWN_CHECKPOINTS, (False,)),
            "stage3_gather_fp16_weights_on_model_save": Refusal(_OWN_CHECKPOINTS, (False,)),
            "override_module_apply": Refusal("models are built whole, not by zero.Init; leave it out", (True,)),
            "memory_efficient_linear": Refusal(
                "it replaces torch's linear function in the whole process; use training.activation_checkpointing",
                (False,),
            ),
            "save_muon_momentum_buffer_in_memory": Refusal(_OWN_OPTIMIZER, (False,)),
            "zero_hpz_partition_size": Refusal(
                "weights are cut over all ranks at stage 3; use stage 2 where they fit on a node", (1,)
            ),
            "zero_quantized_weights": Refusal(_QUANTIZED, (False,)),
            "zero_quantized_nontrainable_weights": Refusal(_QUANTIZED, (False,)),
            "zero_quantized_gradients": Refusal(_QUANTIZED, (False,)),
            "zeropp_loco_param": Refusal(_QUANTIZED),
            "mics_shard_size": Refusal(f"{_REMOVED}; use stage 2 where weights fit on a node"),
            "mics_hierarchical_params_gather": Refusal(f"{_REMOVED}; use stage 2 where weights fit on a node"),
            "cpu_offload": Refusal("its name is offload_optimizer.device=cpu", (False,)),
            "cpu_offload_param": Refusal("its name is offload_param.device=cpu", (False,)),
            "cpu_offload_use_pin_memory": Refusal("its name is offload_optimizer.pin_memory", (False,)),
            **{
                f"offload_{place}.{key}": Refusal(_NVME)
                for place, keys in (
                    ("optimizer", "nvme_path buffer_count pipeline_read pipeline_write fast_init"),
                    ("param", "nvme_path buffer_count buffer_size max_in_cpu"),
                )
                for key in keys.split()
            },
            "offload_optimizer.ratio": Refusal(_OWN_OPTIMIZER, (1, 1.0)),
            "offload_optimizer.super_offload": Refusal(_OWN_OPTIMIZER, (False,)),
            "offload_optimizer.cpuadam_cores_perc": Refusal(_OWN_OPTIMIZER),
        }.items()
    },
}  # fmt: skip
