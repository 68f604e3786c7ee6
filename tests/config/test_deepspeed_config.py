"""The loader of ds_configs accepts DeepSpeed's own keys, and none that the run config owns."""

import json
from pathlib import Path

import pytest

from stlm.config import load_deepspeed_config
from stlm.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """Return a function that reads text as ds.json and returns the lines of its ConfigError."""
    monkeypatch.chdir(tmp_path)

    def problems(text):
        Path("ds.json").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as error:
            load_deepspeed_config("ds.json")
        return [line.strip() for line in str(error.value).splitlines() if not line.endswith("in the configuration:")]

    return problems


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    config = load_deepspeed_config(path)
    assert config == json.loads(path.read_text())
    assert path.stem != "zero2" or config["zero_optimization"]["stage"] == 2


def test_tabs_escapes_and_exponents_are_read_as_json(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        '{\t"zero_optimization":{"reduce_bucket_size":5e7,\n\t"stage":1},"tensorboard":{"job_name":"\\u00e9\\/"}}'
    )
    assert load_deepspeed_config(path) == {
        "zero_optimization": {"reduce_bucket_size": 5e7, "stage": 1},
        "tensorboard": {"job_name": "é/"},
    }


def test_misspelt_keys_are_named_with_the_nearest(problems):
    text = """\
{
  "gradient_clipp1ng": 1.0,
  "zero_optimization": {
    "stage": 2,
    "overlap_com": true,
    "offload_optimizer": {"devise": "cpu"}
  },
  "torch_autocast": {"enable": true},
  "stage": 3,
  "zzz": 1
}
"""
    got = problems(text)
    assert got[:5] == [
        "ds.json:2: gradient_clipp1ng: DeepSpeed has no such key; nearest: gradient_clipping",
        "ds.json:5: zero_optimization.overlap_com: DeepSpeed has no such key; nearest: overlap_comm",
        "ds.json:6: zero_optimization.offload_optimizer.devise: DeepSpeed has no such key; nearest: device",
        "ds.json:8: torch_autocast.enable: DeepSpeed has no such key; nearest: enabled",
        "ds.json:9: stage: DeepSpeed has no such key; nearest: zero_optimization.stage",
    ]
    assert got[5].startswith("ds.json:10: zzz: DeepSpeed has no such key; expected one of bf16, comm")


@pytest.mark.parametrize(
    ("text", "key", "owner"),
    [
        ('{"train_batch_size": 8}', "train_batch_size: got 8", "training.batch_size"),
        ('{"train_micro_batch_size_per_gpu": 8}', "train_micro_batch_size_per_gpu: got 8", "training.micro_batch_size"),
        ('{"gradient_accumulation_steps": 1}', "gradient_accumulation_steps: got 1", "training.batch_size and"),
        ('{"gradient_clipping": 1.0}', "gradient_clipping: got 1.0", "training.gradient_clipping"),
        ('{"optimizer": {"type": "AdamW"}}', "optimizer: got an object", "training.optimizer"),
        ('{"scheduler": {"type": "WarmupLR"}}', "scheduler: got an object", "training.schedule"),
        ('{"fp16": {"loss_scale": 128}}', "fp16.loss_scale: got 128", "training.precision"),
        ('{"bf16": {"check_grad_overflow": false}}', "bf16.check_grad_overflow: got false", "training.precision"),
    ],
)
def test_keys_of_the_run_config_may_only_be_auto(problems, text, key, owner, tmp_path):
    (problem,) = problems(text)
    assert problem.startswith(
        f'ds.json:1: {key}, expected "auto" or no such key: the run config decides it with {owner}'
    )

    def auto(value):
        return {name: auto(child) for name, child in value.items()} if isinstance(value, dict) else "auto"

    automatic = auto(json.loads(text))
    if key.partition(":")[0] in ("optimizer", "scheduler"):
        automatic = {key.partition(":")[0]: "auto"}
    (tmp_path / "auto.json").write_text(json.dumps(automatic))
    assert load_deepspeed_config(tmp_path / "auto.json") == automatic


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '{"log_level": "info",\n"log_level": "info"}',
            "ds.json:2: log_level: repeated key; it is already set in line 1",
        ),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}',
            'ds.json:1: zero_optimization.reduce_bucket_size: got "auto", expected a value: nothing here would fill it',
        ),
        (
            '{"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 10, "overlap_comm": false}}',
            "ds.json:1: zero_optimization.stage3_max_live_parameters: got 10, which has no effect at ZeRO stage 2, "
            "only at 3; leave it out",
        ),
        ('{"zero_optimization": {"overlap_comm": true}}', "ds.json:1: zero_optimization.overlap_comm: got true, which"),
        (
            '{"zero_allow_untested_optimizer": false}',
            "ds.json:1: zero_allow_untested_optimizer: got false, expected true or no such key",
        ),
        ('{"zero_optimization": true}', "ds.json:1: zero_optimization: got true, expected an object {…}"),
        ('{"zero_optimization": {"stage": 4}}', "ds.json:1: zero_optimization.stage: got 4, expected 0, 1, 2 or 3"),
        (
            '{"zero_optimization": {"stage": "2"}}',
            "ds.json:1: zero_optimization.stage: got the text '2', expected 0, 1",
        ),
        ('{"zero_optimization": {"stage": "auto"}}', "ds.json:1: zero_optimization.stage: got the text 'auto', expect"),
        ('{"steps_per_print": 1,}', "ds.json:1: not readable as JSON: "),
        ('{"steps_per_print": NaN}', "ds.json: not readable as JSON: NaN is no JSON number"),
        (
            '{"bf16": {"enabled": false}}',
            'ds.json:1: bf16.enabled: got false, expected true, "auto" or no such key: the run config decides it with',
        ),
        (
            '{"torch_autocast": {"dtype": "float32"}}',
            "ds.json:1: torch_autocast.dtype: got the text 'float32', expected the text 'bfloat16' or the text 'float",
        ),
        (
            '{"bf16": {"enabled": true}, "torch_autocast": {"enabled": true, "dtype": "float16"}}',
            "ds.json:1: got bf16.enabled (bf16) and torch_autocast.dtype (fp16), expected one precision",
        ),
        ("[1]", "ds.json: got a list, expected an object"),
        ("", "ds.json:1: not readable as JSON: "),
    ],
)
def test_invalid_files_are_refused(problems, text, problem):
    (got,) = problems(text)
    assert got.startswith(problem)


def test_a_missing_file_lists_the_existing_ones(tmp_path):
    (tmp_path / "zero2.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no such file.*zero2\.json"):
        load_deepspeed_config(tmp_path / "zero22.json")


# Every key that DeepSpeed 0.19 reads and this project refuses: a value, and the replacement that the message names.
REFUSED_KEYS = [
    ({"gradient_allreduce_op": "sum"}, "leave it out"),
    ({"prescale_gradients": True}, "leave it out"),
    ({"gradient_predivide_factor": 2.0}, "leave it out"),
    ({"managed_gradient_accumulation": False}, "training.micro_batch_size"),
    ({"disable_allgather": True}, "leave it out"),
    ({"disable_python_gc": True}, "leave it out"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "training.precision"),
    ({"sequence_parallel_size": 2}, "training.micro_batch_size"),
    ({"seq_parallel_communication_data_type": "bf16"}, "communication_data_type"),
    ({"data_parallel_size": 2}, "--num_accelerators"),
    ({"use_data_before_expert_parallelism": True}, "model.core.feed_forward"),
    ({"tensor_parallel": {"autotp_size": 2}}, "zero_optimization.stage=3"),
    ({"expert_parallel": {"enabled": True}}, "model.core.feed_forward"),
    ({"pipeline": {"stages": 2}}, "zero_optimization.stage=3"),
    ({"hybrid_engine": {"enabled": True}}, "scripts/generate.py"),
    ({"compile": {"deepcompile": True}}, "training.compile"),
    ({"activation_checkpointing": {"cpu_checkpointing": True}}, "training.activation_checkpointing"),
    ({"aio": {"queue_depth": 8}}, "use the device cpu"),
    ({"data_efficiency": {"enabled": True}}, "data.curriculum"),
    ({"dataloader_drop_last": True}, "leave it out"),
    ({"weight_quantization": {}}, "training.quantization_bits"),
    ({"checkpoint": {"load_universal": True}}, "training.save_every_steps"),
    ({"datastates_ckpt": {}}, "training.save_every_steps"),
    ({"vocabulary_size": 512}, "the tokenizer of the data"),
    ({"steps_per_print": 10}, "training.log_every_steps"),
    ({"timers": {"throughput": {"enabled": True}}}, "metrics.jsonl"),
    ({"comms_logger": {"enabled": True}}, "metrics.jsonl"),
    ({"memory_breakdown": True}, "metrics.jsonl"),
    ({"dump_state": True}, "environment.json"),
    ({"autotuning": {"enabled": True}}, "training.micro_batch_size"),
    ({"wandb": {"enabled": True}}, "training.wandb=true"),
    ({"comet": {"enabled": True}}, "training.wandb=true"),
    ({"elasticity": {"enabled": True}}, "training.batch_size"),
    ({"amp": {"enabled": True}}, "training.precision"),
    ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "clips by the norm"),
    ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "leave it out"),
    ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "leave it out"),
    ({"zero_optimization": {"stage": 1, "allgather_partitions": False}}, "leave it out"),
    ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, "leave it out"),
    ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "offload_optimizer.device=cpu"),
    ({"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 9}}, "leaf_module"),
    ({"zero_optimization": {"stage": 1, "load_from_fp32_weights": False}}, "training.save_every_steps"),
    ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "training.save_every_steps"),
    ({"zero_optimization": {"stage": 3, "pipeline_loading_checkpoint": True}}, "training.save_every_steps"),
    ({"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}, "save_every_steps"),
    ({"zero_optimization": {"stage": 3, "override_module_apply": False}}, "leave it out"),
    ({"zero_optimization": {"stage": 3, "memory_efficient_linear": True}}, "training.activation_checkpointing"),
    ({"zero_optimization": {"stage": 3, "save_muon_momentum_buffer_in_memory": True}}, "training.optimizer"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "stage 2"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "communication_data_type=bf16"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "offload_optimizer.device=cpu"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}, "training.optimizer"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "expected cpu or none"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"nvme_path": "/x"}}}, "use the device cpu"),
]


@pytest.mark.parametrize(("config", "instead"), REFUSED_KEYS, ids=lambda value: str(value)[:60])
def test_keys_that_cannot_work_are_refused_by_name(problems, config, instead):
    (problem,) = problems(json.dumps(config))
    assert "no such key" in problem or "expected cpu" in problem
    assert "DeepSpeed has no such key" not in problem and instead in problem, problem


def test_harmless_values_of_refused_keys_pass(tmp_path):
    """Files written for other programs often state default values explicitly."""
    config = {
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "compile": {"deepcompile": False},
        "wandb": {"enabled": False},
        "zero_optimization": {"stage": 1, "legacy_stage1": False, "compute_grad_norm": True},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert load_deepspeed_config(tmp_path / "ds.json") == config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"flops_profiler": {"profile_stap": 1}}, "flops_profiler.profile_stap: DeepSpeed has no such key; nearest: p"),
        ({"tensorboard": {"output": "x"}}, "tensorboard.output: DeepSpeed has no such key; nearest: output_path"),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"class": []}}}, "leaf_module.class: DeepSpeed has no such"),
        ({"flops_profiler": {"profile_step": 0}}, "profile_step: got 0, expected a number of 1 or more"),
        ({"communication_data_type": "int8"}, "expected fp32, bf16 or fp16"),
        ({"log_level": "loud"}, "expected debug, info, warning, error or critical"),
        ({"wall_clock_breakdown": "no"}, "expected true or false"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": 5e8 + 1}}, "expected an even number of elements"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 10**30}}, "expected a whole number of elements"),
        ({"csv_monitor": {"enabled": True, "output_path": f"{__file__}/x"}}, "expected a folder that can be written"),
        ({"flops_profiler": {"output_file": "/"}}, "expected the name of a file that can be written, or null"),
        ({"flops_profiler": {"output_file": f"{__file__}/x"}}, "expected the name of a file that can be written"),
    ],
)
def test_nested_keys_and_values_are_checked(problems, config, expected):
    (problem,) = problems(json.dumps(config))
    assert expected in problem
