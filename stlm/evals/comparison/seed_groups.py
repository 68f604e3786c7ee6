"""Groups of runs that have the same settings and different seeds."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stlm.config import load_run_config, to_dict
from stlm.errors import StlmError

Groups = dict[str, tuple[str, ...]]  # name → models


class Settings(NamedTuple):
    """The settings of a run without the seed, and the seed."""

    others: str
    seed: int


def groups_of(models: Sequence[str], named: Sequence[str]) -> Groups:
    """Put every model into one group: as listed in `named` (`NAME=RUN,RUN`), the others by equal settings.

    Runs with equal seeds are not grouped: they give no information about the spread over seeds. Raises StlmError where
    the groups of `named` overlap or are not valid.
    """
    groups: Groups = {}
    for text in named:
        name, runs = _named(text)
        if name in groups:
            raise StlmError(f"--group: got {name!r} twice; list all its runs at once: --group {name}=RUN,RUN")
        if twice := [model for model in runs if any(model in other for other in groups.values())]:
            raise StlmError(f"--group {name}: {twice[0]} is in another group too; a run belongs to one")
        groups[name] = runs
    grouped = {model for members in groups.values() for model in members}
    known: dict[Path, str] = {}
    for model in dict.fromkeys([*grouped, *models]):
        if (other := known.setdefault(Path(model).resolve(), model)) != model:
            raise StlmError(f"{other} and {model} are the same model; name each once")
    equal: dict[str, list[str]] = {}
    for model in models:
        if model not in grouped:
            settings = settings_of(model)
            equal.setdefault(model if settings is None else settings.others, []).append(model)
    for members in equal.values():
        seeds = {settings.seed for model in members if (settings := settings_of(model)) is not None}
        if len(members) > 1 and len(seeds) == len(members):
            name = _common_name(members)
            groups[name if name and name not in groups else f"{members[0]} and others"] = tuple(members)
        else:
            groups |= {model: (model,) for model in members}
    return groups


def settings_of(model: str) -> Settings | None:
    """Return the settings of the run that a model belongs to; None if there are none."""
    run = run_of(model)
    if run is None:
        return None
    settings: dict[str, Any] = to_dict(load_run_config(run))
    seed = settings.pop("seed")
    return Settings(json.dumps(settings, sort_keys=True, default=str), seed)


def run_of(model: str) -> Path | None:
    """Return the folder of the run of a run, checkpoint, model or file of results; None if there is none."""
    path = Path(model)
    if path.suffix == ".json":
        try:
            path = Path(json.loads(path.read_text(encoding="utf-8"))["model"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    folders = (path, *path.parents[:3])  # of a run, its checkpoints, a checkpoint or its model
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def _named(text: str) -> tuple[str, tuple[str, ...]]:
    """Parse one `--group` into its name and runs."""
    name, equals, listed = text.partition("=")
    if not equals or not name or not listed:
        raise StlmError(f"--group: got {text!r}, expected NAME=RUN,RUN; --group subword=runs/subword-* would work")
    members: list[str] = []
    for part in filter(None, listed.split(",")):
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        if not found:
            raise StlmError(f"--group {name}: no path matches {part!r} in {os.getcwd()}; name existing runs")
        members += found
    if len(set(members)) < len(members):
        raise StlmError(f"--group {name}: {max(members, key=members.count)} is named twice; name each run once")
    seeds: dict[int, str] = {}
    for model in members:
        settings = settings_of(model)
        if settings is not None and (other := seeds.setdefault(settings.seed, model)) != model:
            raise StlmError(
                f"--group {name}: {other} and {model} both have seed={settings.seed}, so they say "
                f"nothing about the spread over seeds; leave one out, or train it with seed={max(seeds) + 1}"
            )
    return name, tuple(members)


def _common_name(members: Sequence[str]) -> str:
    """Return the common prefix of names without the seed: runs/a-seed1 and runs/a-seed2 give runs/a."""
    shared = os.path.commonprefix(list(members))  # noqa: RUF071 (of their letters, not of their folders)
    folder, _, begin = shared.rpartition("/")
    name = re.sub(r"[-_.]*(seed|s)?[-_.]*\d*$", "", begin)
    return os.path.join(folder, name) if name else folder if begin else ""
