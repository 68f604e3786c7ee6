"""Appending text to finished data, with the same tokenizer and the same rule for holding documents back.

    DIR/.appending/    the new text, prepared like any other, but compared with the existing documents

When that is finished, its shards are moved after those of DIR, and a new manifest.json replaces the old one; until then
DIR is unchanged. If the command is killed at any moment, rerunning it resumes the work.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.cleaning.decontamination import REMOVED_FILE
from data_pipeline.errors import DataError
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import Preparation
from data_pipeline.preparation.settings import differences, recognised
from data_pipeline.preparation.work_folder import locked
from data_pipeline.preparation.workers import Team, Workers
from data_pipeline.sources.plain_text import AUTO
from data_pipeline.storage.atomic import fsync_dir, write_errors_as, write_text, writing
from data_pipeline.storage.cleaning_record import Record
from data_pipeline.storage.manifest import MANIFEST_FILE, SPLITS, Manifest
from data_pipeline.storage.shards import bin_path, given_path, idx_path

APPENDING_DIR = ".appending"

_KEPT = ("tokenizer", "validation_fraction", "deduplicate", "clean", "languages", "cleaning_limits", "decontaminate")
_REFUSED = ("validation", "test", "tokenizer_from", "conversations", "score_key")


def append_config(options: dict[str, Any], given: Set[str]) -> PrepareConfig:
    """Return the preparation of the text that is added to the folder `output` of the options.

    given: the options that the user set; the others are taken from the folder. Raises DataError if one would change a
    setting that must stay.
    """
    directory = options["output"]
    if directory is None or not options["inputs"]:
        raise DataError("--append adds text to finished data: name the text with --input, and the folder with --output")
    settings = Manifest.load(directory).settings
    if settings.get("conversations") or settings.get("score_key") is not None:
        raise DataError(
            f"{directory} holds {'conversations' if settings.get('conversations') else 'documents with scores'}, to "
            "which nothing can be added: prepare the new ones separately, and train on both with data.mixture"
        )
    if refused := [name for name in _REFUSED if name in given]:
        raise DataError(f"--{refused[0].replace('_', '-')} cannot be used with --append, which adds training text")
    limits = {
        name: ",".join(map(str, value)) if isinstance(value, list) else value
        for name, value in settings.get("cleaning_limits", {}).items()
    }
    there = {
        **{name: settings[name] for name in ("tokenizer", "validation_fraction", "deduplicate")},
        **{name: tuple(settings.get(name, ())) for name in ("clean", "languages")},
        "cleaning_limits": tuple(f"{name}={value}" for name, value in limits.items()),
        "decontaminate": tuple(one["path"] for one in settings.get("decontaminate", ())),
    }
    for name in _KEPT:
        if name in given and options[name] != there[name]:
            raise DataError(
                f"--{name.replace('_', '-')}: {directory} was prepared with {_shown(there[name])}, which cannot "
                "change when text is added; leave the option out"
            )
    rules = [source["documents"] for source in settings["input"] if "documents" in source]
    reading = {name: settings[name] for name in ("text_key", "on_error")}
    reading |= {"documents": rules[0] if rules else AUTO, "quoting": settings.get("quoting", "auto")}
    reading = {name: value for name, value in reading.items() if name not in given}
    output = str(Path(directory) / APPENDING_DIR)
    there |= reading | {"tokenizer_from": directory, "output": output, "taken_over": tuple(reading)}
    return PrepareConfig(**(options | there))


@write_errors_as(DataError)
def append(config: PrepareConfig, team: Team | None = None) -> tuple[Manifest, bool]:
    """Add the inputs of an `append_config`. Return the manifest of the whole, and whether anything was added."""
    work = config.directory
    directory = work.parent
    with locked(directory, wait=False):
        _finish(directory, work)
        there = Manifest.load(directory)
        there.check(directory)
        preparation = Preparation(config, after=there)
        if _is_there(preparation, there):
            shutil.rmtree(work, ignore_errors=True)  # left by a command killed while removing it
            return there, False
        preparation.run(team)
        _finish(directory, work)
        return Manifest.load(directory), True


def _is_there(preparation: Preparation, manifest: Manifest) -> bool:
    """Return whether these inputs have been added before, to whatever the data was then."""
    return any(
        not differences(
            record | {"after": preparation.settings["after"]},
            recognised(record, preparation.settings, preparation.sources, Workers(1)),
        )
        for record in manifest.settings.get("appended", [])
    )


def _finish(directory: Path, work: Path) -> None:
    """Move completely prepared text into the data, and remove its folder."""
    if not (work / MANIFEST_FILE).exists():
        return
    there, new = Manifest.load(directory), Manifest.load(work)
    if new.settings["after"] == there.fingerprint and new.settings not in there.settings.get("appended", []):
        _take_over(directory, there, work, new)
    with writing(work):
        (work / MANIFEST_FILE).unlink()  # first, so that an incomplete folder never looks finished
        shutil.rmtree(work)


def _take_over(directory: Path, there: Manifest, work: Path, new: Manifest) -> None:
    splits = {}
    for split in SPLITS:
        before = there.splits.get(split, [])
        added = []
        for number, entry in enumerate(new.splits.get(split, []), start=len(before)):
            path = f"{split}/shard_{number:05d}"
            with writing(directory / path):
                (directory / split).mkdir(exist_ok=True)
                for file in (bin_path, idx_path, given_path):
                    if file(work / entry.path).exists():  # else an interrupted run has moved it
                        os.replace(file(work / entry.path), file(directory / path))
            added.append(replace(entry, path=path))
        if before or added or split != "test":
            splits[split] = [*before, *added]
        if added:
            fsync_dir(directory / split)
    appended = [*there.settings.get("appended", []), new.settings]
    record = Record.from_json(there.cleaning)
    record.add(Record.from_json(new.cleaning))
    decontamination = there.cleaning["decontamination"]
    if "list" in new.cleaning["decontamination"]:
        lists = [directory / decontamination.get("list", REMOVED_FILE), work / new.cleaning["decontamination"]["list"]]
        name = f"{Path(REMOVED_FILE).stem}_{len(appended)}.jsonl"
        write_text(directory / name, "".join(path.read_text(encoding="utf-8") for path in lists if path.is_file()))
        decontamination = decontamination | {"list": name}
    duplicates = {name: number + new.duplicates[name] for name, number in there.duplicates.items()}
    dataclasses.replace(
        there,
        splits=splits,
        sources=[*there.sources, *new.sources],
        duplicates=duplicates,
        settings=there.settings | {"appended": appended},
        cleaning={**there.cleaning, **record.to_json(), "decontamination": decontamination},
        statistics=[*there.statistics, *new.statistics],
    ).save(directory)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
