"""The DeepSpeed side of a run: `ds_configs/*.json`, checked before DeepSpeed sees it.

DeepSpeed accepts a misspelt top-level key silently and clips gradients at 1.0 where the key is absent. So every key is
checked here against what DeepSpeed 0.19 reads, and what the run config owns may only be "auto": the engine fills it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stlm.config.build import nearest, raise_problems
from stlm.config.tree import Node, Problem, describe, read_tree
from stlm.errors import ConfigError

AUTO = "auto"

# What the run config owns: dotted DeepSpeed key -> the key that decides instead.
OWNED = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and training.micro_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "training.optimizer, training.learning_rate, …",
    "scheduler": "training.schedule, training.warmup_steps, …",
}
OWNED_SECTIONS = {"bf16": "training.precision", "fp16": "training.precision"}  # every key in them, but those of STATED

# What may say a precision, which then has to be the run config's, or is the one that its `auto` stands for.
STATED: dict[str, dict[Any, str | None]] = {
    "bf16.enabled": {True: "bf16"},
    "fp16.enabled": {True: "fp16"},
    "torch_autocast.enabled": {True: None},  # in the precision of its dtype, or of the run config
    "torch_autocast.dtype": {"bfloat16": "bf16", "float16": "fp16"},
}

# What must be so because the optimizer is this project's own.
FIXED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}

STAGES = (0, 1, 2, 3)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What DeepSpeed 0.19 reads at the top level.
TOP_LEVEL = _names("""
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer scheduler
    fp16 bf16 torch_autocast data_types zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    managed_gradient_accumulation communication_data_type seq_parallel_communication_data_type prescale_gradients
    gradient_predivide_factor gradient_allreduce_op disable_allgather sequence_parallel_size data_parallel_size
    use_data_before_expert_parallelism tensor_parallel expert_parallel pipeline hybrid_engine compile
    activation_checkpointing aio data_efficiency dataloader_drop_last weight_quantization checkpoint datastates_ckpt
    steps_per_print dump_state disable_python_gc vocabulary_size wall_clock_breakdown memory_breakdown log_level timers
    flops_profiler comms_logger autotuning tensorboard wandb comet csv_monitor
    """)

# What it reads inside the sections that decide how a run behaves; the other sections are passed on as they are.
SECTIONS = {
    "zero_optimization": _names("""
        stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
        elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size
        stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold
        stage3_max_live_parameters stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save
        stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
        ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment
        zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients
        memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings
        enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module
        """),
    "zero_optimization.offload_optimizer": _names("""
        device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload
        cpuadam_cores_perc
        """),
    "zero_optimization.offload_param": _names("device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
    "fp16": _names("""
        enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads
        """),
    "bf16": _names(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "torch_autocast": _names("enabled dtype lower_precision_safe_modules"),
    "data_types": _names("grad_accum_dtype param_dtype buffer_dtype"),
}


def load_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """The DeepSpeed config of a JSON file, checked, its "auto" values left for the engine to fill.

    Raises ConfigError with all problems at once: unknown or repeated keys, keys that the run config owns, "auto" where
    nobody would fill it, two precisions.
    """
    path = Path(path)
    if not path.is_file():
        found = sorted(str(other) for other in path.parent.glob("*.json"))
        hint = f"; this folder has {', '.join(found)}" if found else ""
        raise ConfigError(f"{path}: no such file, expected a DeepSpeed configuration in JSON{hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        config = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not readable as JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8; NaN and Infinity, which JSON does not have; too deep
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(config, dict):
        raise ConfigError(f'{path}: got {describe(config)}, expected an object: {{"zero_optimization": …}}')

    # JSON is YAML once its tabs are spaces (no JSON string holds a bare tab); read as a tree it has its line numbers.
    problems: list[Problem] = []
    tree = read_tree(text.replace("\t", " "), os.fspath(path), problems)
    if tree is not None:
        _check(tree, "", problems)
        stated = _stated(config)
        if len(set(stated.values())) > 1:
            says = " and ".join(f"{key} ({name})" for key, name in stated.items())
            problems.append(Problem(tree.place, f"got {says}, expected one precision; leave out one section"))
    raise_problems(problems)
    return config


def stated_precision(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The precision that a DeepSpeed config says, and the key that says it; None if it leaves that to the run."""
    return next(((name, key) for key, name in _stated(config).items()), None)


def _stated(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> precision."""
    found = {}
    for key, meanings in STATED.items():
        section, name = key.split(".")
        content = config.get(section)
        value = content.get(name) if isinstance(content, dict) else None
        if isinstance(value, bool | str) and (meaning := meanings.get(value)) is not None:
            found[key] = meaning
    return found


def _check(node: Node, path: str, problems: list[Problem]) -> None:
    """Problems of a section and of those within it."""
    known = SECTIONS.get(path) if path else TOP_LEVEL
    for key, child in node.value.items():
        dotted = f"{path}.{key}" if path else key
        if known is not None and key not in known:
            problems.append(Problem(child.place, f"{dotted}: {_unknown(key, path, known)}"))
        elif dotted in STATED:
            allowed = [AUTO, *STATED[dotted]]
            if not any(type(child.value) is type(value) and child.value == value for value in allowed):
                expected = " or ".join(describe(value) for value in STATED[dotted])
                problems.append(
                    Problem(
                        child.place,
                        f'{dotted}: got {_shown(child.value)}, expected {expected}, "auto" or no such key: '
                        "the run config decides it with training.precision",
                    )
                )
        elif owner := OWNED.get(dotted) or OWNED_SECTIONS.get(path):
            if child.value != AUTO:
                expected = f'expected "auto" or no such key: the run config decides it with {owner}'
                problems.append(Problem(child.place, f"{dotted}: got {_shown(child.value)}, {expected}"))
        elif dotted in FIXED:
            if child.value is not FIXED[dotted]:
                expected = f"expected {describe(FIXED[dotted])} or no such key: the optimizer is not one of DeepSpeed's"
                problems.append(Problem(child.place, f"{dotted}: got {_shown(child.value)}, {expected}"))
        elif dotted == "zero_optimization.stage" and not (type(child.value) is int and child.value in STAGES):
            problems.append(Problem(child.place, f"{dotted}: got {_shown(child.value)}, expected 0, 1, 2 or 3"))
        elif child.value == AUTO:
            problems.append(Problem(child.place, f'{dotted}: got "auto", expected a value: nothing here would fill it'))
        elif dotted in SECTIONS and not isinstance(child.value, dict):
            problems.append(Problem(child.place, f"{dotted}: got {_shown(child.value)}, expected an object {{…}}"))
        elif isinstance(child.value, dict):
            _check(child, dotted, problems)


def _unknown(key: str, path: str, known: frozenset[str]) -> str:
    found = nearest(key, sorted(known))
    if not found and path:  # at home in another section?
        found = [f"the top level's {key}"] if key in TOP_LEVEL else []
    elif not found:
        found = [f"{section}.{key}" for section, keys in SECTIONS.items() if key in keys]
    hint = f"nearest: {', '.join(found)}" if found else f"expected one of {', '.join(sorted(known))}"
    return f"DeepSpeed has no such key; {hint}"


def _shown(value: Any) -> str:
    return "an object" if isinstance(value, dict) else describe(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
