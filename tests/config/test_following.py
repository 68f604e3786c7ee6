"""Tokenizer, embedder and head follow the data unless the user has chosen others."""

from __future__ import annotations

from pathlib import Path

import pytest

from stlm.config import data_folder, following, load_run_config
from stlm.errors import ConfigError

SP = "sentencepiece:2048"
TOKENS = {"data.tokenizer": f'"{SP}"', "model.embedder": "{kind: token}", "model.head": "{kind: linear}"}


def followed(source: str | Path, tokenizer: str, *overrides: str, chosen: bool = False) -> dict[str, str]:
    found = following(tokenizer, source, overrides, chosen)
    config = load_run_config(source, [*(f"{key}={value}" for key, value in found.items()), *overrides])
    assert config.data.tokenizer == tokenizer or not found
    return found


def test_the_default_preset_follows_data_of_any_tokenizer() -> None:
    assert followed("quickstart", "byte") == {}
    assert followed("quickstart", SP) == TOKENS
    assert followed("quickstart", SP, "model.width=96", "training.max_steps=3") == TOKENS
    assert followed("quickstart", "hf:/a folder: of #1")["data.tokenizer"] == '"hf:/a folder: of #1"'
    config = load_run_config("quickstart", [f"{key}={value}" for key, value in TOKENS.items()])
    assert (config.model.embedder.kind, config.model.head.kind) == ("token", "linear")
    assert config.model.core == load_run_config("quickstart").model.core


def test_a_preset_that_reads_any_ids_follows_the_tokenizer_alone() -> None:
    assert followed("10m-token", SP, chosen=True) == {"data.tokenizer": f'"{SP}"'}
    assert followed("10m-token", "byte", chosen=True) == {"data.tokenizer": '"byte"'}


def test_a_file_that_names_no_embedder_follows(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {dir: data/sp}\nmodel: {width: 64}\n")
    assert followed(path, SP, chosen=True) == {"data.tokenizer": f'"{SP}"', "model.embedder": "{kind: token}"}
    assert data_folder(path) == "data/sp"
    assert data_folder(path, ["data.mixture=[{dir: a}]", "data.dir=null"]) == "a"
    assert data_folder("quickstart") is None


@pytest.mark.parametrize(
    ("source", "overrides", "chosen"),
    [
        ("quickstart", ["model.embedder.kind=byte_patch"], False),
        ("quickstart", ["model.embedder.window=16"], False),
        ("quickstart", ["model.head.num_layers=1"], False),
        ("quickstart", [], True),
        ("10m-byte", [], True),
        ("base: quickstart\nmodel: {embedder: {window: 16}}\n", [], True),
    ],
)
def test_a_chosen_embedder_that_does_not_fit_is_an_error(
    tmp_path: Path, source: str, overrides: list[str], chosen: bool
) -> None:
    if "\n" in source:
        (tmp_path / "mine.yaml").write_text(source)
        source = str(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match=r"got 'byte.*', which reads bytes, but the data was prepared with 'sentence"):
        following(SP, source, overrides, chosen)


def test_chosen_components_are_kept(tmp_path: Path) -> None:
    assert following(SP, "quickstart", ["data.tokenizer=sentencepiece:512"], False) == {}
    assert followed("quickstart", SP, "model.embedder={kind: token}", "model.head={kind: linear}") == {
        "data.tokenizer": f'"{SP}"'
    }
    assert following(SP, "nowhere.yaml") == {}
    assert following(SP, "quickstart", ["nonsense"]) == {}
