"""Allowed DeepSpeed keys: training with each of them gives the same results as without."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import key_cases
import pytest
from tiny_run import ROOT, spawn

from stlm.config import load_deepspeed_config
from stlm.config.deepspeed import OWNED, OWNED_SECTIONS
from stlm.config.deepspeed_keys import SECTIONS, TOP_LEVEL
from stlm.errors import ConfigError
from stlm.training.deepspeed.internals import TESTED_VERSIONS

pytestmark = pytest.mark.deepspeed


def test_the_allowed_versions_are_those_tested():
    """The oldest is the minimum in setup.py, the newest is the pinned one; the installed one lies between them."""
    requirement = re.search(r'"deepspeed>=([0-9.]+),<0\.20"', (ROOT / "setup.py").read_text())
    pin = re.search(r"^deepspeed==([0-9.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert (requirement[1], pin[1]) == (TESTED_VERSIONS[0], TESTED_VERSIONS[-1])
    import deepspeed

    assert deepspeed.__version__.partition("+")[0] in TESTED_VERSIONS


def keys_of(config, path=""):
    for key, value in config.items():
        dotted = f"{path}.{key}" if path else key
        if dotted in SECTIONS:
            yield from keys_of(value, dotted)
        else:
            yield dotted


def test_every_allowed_key_is_tested(tmp_path):
    """The loader accepts all configurations used in these tests."""
    allowed = {key for key in TOP_LEVEL if key not in SECTIONS}
    allowed |= {f"{path}.{key}" for path, keys in SECTIONS.items() for key in keys if f"{path}.{key}" not in SECTIONS}
    allowed -= {key for key in allowed if key in OWNED or key.partition(".")[0] in OWNED_SECTIONS}
    tried = {key for *_, keys in key_cases.CASES for key in keys_of(keys)}
    assert allowed == tried | {"zero_optimization.stage"}
    for stages, *_, keys in key_cases.CASES:
        for stage in stages:
            keys["zero_optimization"] = keys.get("zero_optimization", {}) | {"stage": stage}
            (tmp_path / "ds.json").write_text(json.dumps(keys))
            load_deepspeed_config(tmp_path / "ds.json")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_allowed_keys_do_not_change_training(tmp_path, ranks):
    command = [sys.executable, str(Path(key_cases.__file__)), str(tmp_path)]
    processes = spawn(command, ranks)
    outputs = [process.communicate(timeout=400) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    for config, stage, difference, found, expected in json.loads((tmp_path / "results.json").read_text()):
        assert found == pytest.approx(expected, rel=difference), (config, stage)
        assert expected[-3] < expected[0] - 0.3  # training reduces the loss
    assert "Profile Summary at step" in (tmp_path / "flops.txt").read_text()
    assert list(tmp_path.glob("board/keys/events*"))
    assert (tmp_path / "csv/keys/Train_Samples_lr.csv").read_text().startswith("step,lr\n8,0.003\n16,0.003\n")
    printed = outputs[0][0] + outputs[0][1]
    assert "time (ms) | fwd:" in printed


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Lineal"]}}, r"got 'torch.nn.Lineal', which is"),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["Expert"]}}}, "the model has no Expert"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, "DeepSpeed cannot use the values of its"),
    ],
)
def test_values_that_deepspeed_cannot_use_are_refused(make_trainer, tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path / "run", deepspeed_config={"zero_optimization": {"stage": 2}} | keys)
    assert not (tmp_path / "run").exists()
