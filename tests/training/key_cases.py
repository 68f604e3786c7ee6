"""Every DeepSpeed key that works here, in a few configurations, and the results of training with each.

As a program it is one rank: `python key_cases.py FOLDER` trains with all of them; rank 0 writes FOLDER/results.json.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_run import CONFIG

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import load_run_config
from stlm.stlm import STLM
from stlm.training import build_optimizer
from stlm.training.deepspeed.engine import Engine
from stlm.training.deepspeed.precision import Precision
from stlm.training.deepspeed.state_transfer import full_state, load_state
from stlm.training.distributed.connection import Distributed
from stlm.training.run.state import State

ROWS = torch.arange(8 * 32).view(8, 32) * 7919 % 251

# (stages, precision, largest relative difference, keys): keys on one line are independent of each other.
CASES = [
    ((0, 1, 2, 3), "fp32", 1e-6, {
        "communication_data_type": "fp32", "wall_clock_breakdown": True, "log_level": "warning",
        "flops_profiler": {"enabled": True, "profile_step": 2, "module_depth": 1, "top_modules": 1, "detailed": False,
                           "recompute_fwd_factor": 0.0, "output_file": "FOLDER/flops.txt"},
        "tensorboard": {"enabled": True, "output_path": "FOLDER/board", "job_name": "keys"},
        "csv_monitor": {"enabled": True, "output_path": "FOLDER/csv", "job_name": "keys"},
    }),
    ((0, 1, 2, 3), "fp32", 1e-3, {"communication_data_type": "bf16"}),
    ((1, 2, 3), "bf16", 0.1, {"torch_autocast": {"enabled": True, "dtype": "bfloat16",
                                                  "lower_precision_safe_modules": ["torch.nn.Linear"]}}),
    ((1, 2, 3), "fp32", 1e-6, {"zero_optimization": {
        "reduce_scatter": False, "overlap_comm": False}}),
    ((1, 2, 3), "fp32", 1e-6, {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000}}),
    ((1, 2), "fp32", 1e-6, {"zero_optimization": {
        "use_multi_rank_bucket_allreduce": False, "reduce_bucket_size": 1001, "allgather_bucket_size": 1000}}),
    ((1, 2), "fp32", 1e-6, {"zero_optimization": {
        "parameter_alignment": True, "ignore_unused_parameters": False}}),
    ((1, 2, 3), "fp32", 1e-6, {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}),
    ((3,), "fp32", 1e-6, {"zero_optimization": {
        "offload_param": {"device": "cpu", "pin_memory": False}, "offload_optimizer": {"device": "cpu"}}}),
    ((3,), "fp32", 1e-6, {"zero_optimization": {
        "sub_group_size": 1000, "stage3_prefetch_bucket_size": 100, "stage3_param_persistence_threshold": 10,
        "stage3_model_persistence_threshold": 40, "stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 10,
    }}),
    ((3,), "fp32", 1e-6, {"zero_optimization": {
        "stage3_use_all_reduce_for_fetch_params": True, "log_trace_cache_warnings": True, "enable_sanity_checks": True,
    }}),
    ((3,), "fp32", 1e-6, {"zero_optimization": {
        "stage3_allgather_sequential": True, "stage3_param_persistence_threshold": 0,
        "leaf_module": {"name_suffixes": ["feed_forward"], "names": ["core.stack.blocks.1.attention"],
                        "classes": ["stlm.model.core.feed_forward.SwiGLU"]},
    }}),
]  # fmt: skip


def figures(config, deepspeed_config, precision, distributed):
    """Return losses and norms of three steps, and of two after gathering and loading the state, on each rank."""
    model = STLM.from_config(config.model, build_tokenizer("byte"), seed=2)
    engine = Engine(
        model,
        build_optimizer(model, config.training),
        config.training,
        Precision(precision, ""),
        deepspeed_config,
        distributed,
    )
    rows = ROWS.view(distributed.world_size, -1, config.training.micro_batch_size, 32)[distributed.rank]

    def steps(count):
        found = []
        for _ in range(count):
            nats = 0.0
            with engine.accumulate():
                for number, ids in enumerate(rows, start=1):
                    logits = engine.forward(ids)[0].float().flatten(0, 1)
                    loss = F.cross_entropy(logits, ids.flatten(), reduction="sum") / ROWS.numel()
                    engine.backward(loss, last=number == len(rows))
                    nats += loss.item()
            total = torch.tensor([nats], dtype=torch.float64)
            torch.distributed.all_reduce(total)
            norm = engine.step(3e-3)
            found += [total.item(), norm, math.sqrt(sum(each**2 for each in engine.gradient_norms().values()))]
        return found

    try:
        found = steps(3)
        state = full_state(engine)
        kept = [copy.deepcopy(state)] if distributed.rank == 0 else [State({}, {}, 0)]
        torch.distributed.broadcast_object_list(kept)
        steps(1)
        load_state(engine, kept[0], [torch.zeros(1, 32, dtype=torch.long)])
        loaded = full_state(engine)
        assert all(torch.equal(loaded.parameters[name], kept[0].parameters[name]) for name in loaded.parameters)
        return found + steps(2)
    finally:
        engine.close()


def results(folder, distributed):
    """Return [configuration, stage, allowed difference, figures, figures without these keys] for all cases."""
    settings = Path(folder) / f"settings{os.getpid()}.yaml"
    settings.write_text(CONFIG)
    config = load_run_config(settings, ["training.micro_batch_size=2"])
    plain = {}
    for stages, precision, difference, keys in CASES:
        for stage in stages:
            if (stage, precision) not in plain:
                plain[stage, precision] = figures(
                    config, {"zero_optimization": {"stage": stage}}, precision, distributed
                )
            given = json.loads(json.dumps(keys).replace("FOLDER", str(folder)))
            given["zero_optimization"] = {"stage": stage, **given.get("zero_optimization", {})}
            yield given, stage, difference, figures(config, given, precision, distributed), plain[stage, precision]


if __name__ == "__main__":
    distributed = Distributed.join()
    found = list(results(sys.argv[1], distributed))
    distributed.on_rank_zero(lambda: (Path(sys.argv[1]) / "results.json").write_text(json.dumps(found)) and None)
    os._exit(0)
