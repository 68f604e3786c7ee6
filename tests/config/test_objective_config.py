"""The setting training.objective: a name, or a section with a kind and settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from stlm.config import RunConfig, dump_run_config, load_run_config, to_dict
from stlm.config.objectives import NextTokenConfig, ObjectiveConfig
from stlm.config.yaml.fields import Conflict, register, setting
from stlm.errors import ConfigError


@dataclass(frozen=True)
class MaskedConfig(ObjectiveConfig):
    share: float = setting(0.15, "share of ids that are masked", above=0.0, below=1.0)

    def check(self, run):
        if run.model.head.tied:
            yield Conflict("training.objective.share", "does not go with a tied head", ("model.head.tied",))


@pytest.fixture(autouse=True)
def masked(monkeypatch):
    monkeypatch.setattr(ObjectiveConfig, "kinds", dict(ObjectiveConfig.kinds))
    register("masked")(MaskedConfig)


def load(path: Path, text: str, *overrides: str) -> RunConfig:
    path.write_text(text, encoding="utf-8")
    return load_run_config(path, ["model.head.tied=false", *overrides])


def test_a_name_is_a_section_with_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    for text in ("training: {objective: masked}", "training: {objective: {kind: masked}}"):
        assert load(file, text).training.objective == MaskedConfig()
        assert load(file, text, "training.objective.share=0.5").training.objective == MaskedConfig(0.5)
        assert load(file, text, "training.objective=next_token").training.objective == NextTokenConfig()
    assert load(file, "", "training.objective=masked", "training.objective.share=0.3").training.objective.share == 0.3
    (tmp_path / "base.yaml").write_text("training: {objective: masked}")
    merged = load(file, "base: base.yaml\ntraining: {objective: {share: 0.2}}")
    assert merged.training.objective == MaskedConfig(0.2)


def test_an_objective_without_settings_is_saved_as_its_name(tmp_path):
    assert to_dict(RunConfig())["training"]["objective"] == "next_token"
    config = load(tmp_path / "config.yaml", "training: {objective: {kind: masked, share: 0.4}}")
    assert to_dict(config)["training"]["objective"] == {"kind": "masked", "share": 0.4}
    for each in (config, RunConfig()):
        (tmp_path / "config.yaml").write_text(dump_run_config(each), encoding="utf-8")
        assert load_run_config(tmp_path / "config.yaml") == each


@pytest.mark.parametrize(
    "text, message",
    [
        ("objective: next_tokens", "training.objective.kind: got the text 'next_tokens', expected one of next_token, "
         "masked; nearest: next_token"),
        ("objective: 3", "training.objective: got 3, expected a name such as next_token"),
        ("objective: {kind: masked, share: 2}", "training.objective.share: got 2, expected a number above 0.0"),
        ("objective: {share: 0.5}", "kind 'next_token' has no such key, only 'masked'"),
    ],
)  # fmt: skip
def test_errors_name_a_value_that_works(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "config.yaml", f"training:\n  {text}")
    assert message in str(error.value) and "config.yaml:2" in str(error.value)


def test_an_objective_may_contradict_other_sections(tmp_path):
    with pytest.raises(ConfigError, match=r"training\.objective\.share: does not go with a tied head"):
        load(tmp_path / "config.yaml", "training: {objective: masked}", "model.head.tied=true")
