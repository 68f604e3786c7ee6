"""The run that a command asks for, read and checked without torch, so that user errors are reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.storage.manifest import Manifest
from stlm.config import RunConfig, data_folder, following, load_deepspeed_config, load_run_config
from stlm.errors import ConfigError
from stlm.training.distributed.ranks import BatchSplit


@dataclass(frozen=True)
class RunRequest:
    """The settings of a run, and what is not part of them."""

    config: RunConfig
    deepspeed_config: dict[str, Any] | None
    name: str  # of the preset, the config file, or the run whose config it is
    followed: tuple[str, ...]  # overrides that adapt the config to its data
    profiled: tuple[int, int] | None  # first and last step to record

    @classmethod
    def read(
        cls, source: str | None, overrides: Sequence[str], *, data: str | None, ds_config: str | None,
        profile: str | None, world_size: int,
    ) -> RunRequest:  # fmt: skip
        """Read `source`, a preset, YAML file or run, with `overrides`.

        `source` None: the run of training.init_from where that is set, else the preset quickstart. `data`: a folder
        that replaces the data of the config. Raises StlmError with all problems of the config at once.
        """
        chosen = source or initial_run(overrides) or "quickstart"
        followed = _follow_data(chosen, overrides, data, preset_is_chosen=source is not None)
        config = load_run_config(chosen, [*followed, *overrides])
        deepspeed_config = load_deepspeed_config(ds_config) if ds_config else None
        BatchSplit.of(config.training, world_size)
        profiled = _steps_to_profile(profile, config.training.max_steps)
        if data:
            config = replace(config, data=replace(config.data, dir=data, mixture=()))
        return cls(config, deepspeed_config, run_name(chosen), followed, profiled)


def initial_run(overrides: Sequence[str]) -> str | None:
    """Return the run that holds the model of training.init_from, whose settings fit the model; None if not set."""
    for override in reversed(overrides):
        key, _, value = override.partition("=")
        if key.strip() == "training.init_from":
            places = [Path(value), *Path(os.path.abspath(value)).parents]
            return next((str(place) for place in places[:4] if (place / "config.yaml").is_file()), None)
    return None


def run_name(source: str) -> str:
    """Return the name of a run: that of its preset, its config file, or the run whose config it has."""
    path = Path(os.path.abspath(source))
    return path.name if path.is_dir() else path.stem


def _follow_data(source: str, overrides: Sequence[str], data: str | None, preset_is_chosen: bool) -> tuple[str, ...]:
    """Return overrides for tokenizer, embedder and head that fit the data, where the user has not chosen others."""
    folder = data or data_folder(source, overrides)
    try:
        tokenizer = Manifest.load(folder).tokenizer["spec"] if folder else None
    except DataError:  # reported when the data is opened
        return ()
    if tokenizer is None:
        return ()
    followed = following(tokenizer, source, overrides, preset_is_chosen=preset_is_chosen)
    return tuple(f"{key}={value}" for key, value in followed.items())


def _steps_to_profile(text: str | None, max_steps: int) -> tuple[int, int] | None:
    """Parse "10:12" as (10, 12), "10" as (10, 10). Raises ConfigError where these are not steps of the run."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= max_steps:
        works = f"{min(3, max_steps)}:{min(5, max_steps)}"
        raise ConfigError(
            f"--profile: got {text!r}, expected FIRST:LAST, steps of the run from 1 to {max_steps}; {works} would work"
        )
    return first, last
