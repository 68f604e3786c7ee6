"""The loader of ds_configs: DeepSpeed's own keys, strictly; nothing that the run config owns."""

import json
from pathlib import Path

import pytest

from stlm.config import load_deepspeed_config
from stlm.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """problems(text) gives the lines of the ConfigError that reading the text as ds.json raises."""
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
    assert got[5].startswith("ds.json:10: zzz: DeepSpeed has no such key; expected one of activation_checkpointing, ")


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
def test_what_the_run_config_owns_may_only_be_auto(problems, text, key, owner, tmp_path):
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
        ('{"log_level": 1,\n"log_level": 2}', "ds.json:2: log_level: repeated key; it is already set in line 1"),
        ('{"aio": {"a": "auto"}}', 'ds.json:1: aio.a: got "auto", expected a value: nothing here would fill it'),
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
def test_refused(problems, text, problem):
    (got,) = problems(text)
    assert got.startswith(problem)


def test_missing_file_names_those_that_are_there(tmp_path):
    (tmp_path / "zero2.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no such file.*zero2\.json"):
        load_deepspeed_config(tmp_path / "zero22.json")
