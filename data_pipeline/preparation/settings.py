"""The settings that determine the bytes of prepared data: as the manifest records them, and compared with later ones.

Files are the same if their bytes are, regardless of location, name and time. Paths, sizes and times are compared first,
so contents are read only if these differ.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.cleaning import decontamination, words
from data_pipeline.cleaning.documents import LIBRARIES, NEAR_DUPLICATES
from data_pipeline.errors import DataError
from data_pipeline.plurals import number_of
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.workers import Team, run_all
from data_pipeline.sources.encodings import codec_of
from data_pipeline.sources.source import Source
from data_pipeline.storage.atomic import sha256_file
from data_pipeline.tokenizers import build_tokenizer, find_tokenizer, parse_spec

INPUTS = ("input", "validation", "test")  # the settings that describe sources, in the order of the sources
_PLACE = ("path", "state")  # keys that describe location, not contents

# Increased when the same input and settings begin to give other documents or shards.
_PREPARATION_VERSION = 1


def settings_of(config: PrepareConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """Return all settings that determine the bytes of the result, as JSON would return them."""
    described = [source.describe() for source in sources]
    first, last = len(sources) - len(config.validation) - len(config.test), len(sources) - len(config.test)
    return {
        "version": _PREPARATION_VERSION,
        "input": described[:first],
        "tokenizer": config.tokenizer,
        "tokenizer_fingerprint": _fingerprint(config),
        "text_key": config.text_key,
        "score_key": config.score_key,
        "on_error": config.on_error,
        "validation_fraction": config.validation_fraction,
        "deduplicate": config.deduplicate,
        # Steps that are off are omitted, so data prepared before such a step existed is still up to date.
        **({"validation": described[first:last]} if config.validation else {}),
        **({"test": described[last:]} if config.test else {}),
        **({"limit": config.limit} if config.limit is not None else {}),
        **({"encoding": codec_of(config.encoding)} if config.encoding is not None else {}),
        **({"quoting": config.quoting} if config.quoting != "auto" else {}),
        **({"conversations": True} if config.conversations else {}),
        **({"clean": list(config.cleaning.steps)} if config.clean else {}),
        **({"libraries": libraries} if (libraries := _libraries(config)) else {}),
        **({"words": words.VERSION} if config.decontaminate or NEAR_DUPLICATES in config.cleaning.steps else {}),
        **({"languages": sorted(config.cleaning.languages)} if config.cleaning.languages else {}),
        **({"cleaning_limits": limits} if (limits := _changed_limits(config)) else {}),
        **({"keep_removed": str(Path(config.keep_removed).resolve())} if config.keep_removed is not None else {}),
        **({"decontaminate": decontamination.describe(config.decontaminate)} if config.decontaminate else {}),
    }


def with_hashes(settings: dict[str, Any], sources: Sequence[Source], team: Team) -> dict[str, Any]:
    """Return the settings with the sha256 of the contents of every source that consists of files."""
    described = [one for key in INPUTS for one in settings.get(key, [])]
    missing = [number for number, one in enumerate(described) if "state" in one and "sha256" not in one]
    files = [(number, path, size) for number in missing for path, size in sources[number].contents()]
    jobs = [(path, os.stat(path).st_mtime_ns) for _, path, _ in files]
    hashes = run_all("checking the input", _sha256, jobs, [size for *_, size in files], team)
    for number in missing:
        digest = hashlib.sha256()
        for (owner, path, size), one in zip(files, hashes, strict=True):
            if owner == number:
                digest.update(f"{sources[number].kind_of(path)} {size} {one}\n".encode())
        described[number] = described[number] | {"sha256": digest.hexdigest()}
    return _replaced(settings, described)


def recognised(there: dict[str, Any], wanted: dict[str, Any], sources: Sequence[Source], team: Team) -> dict[str, Any]:
    """Return `wanted` with everything that is unchanged described as in `there`."""
    if there.get("tokenizer_fingerprint") and there["tokenizer_fingerprint"] == wanted.get("tokenizer_fingerprint"):
        wanted = wanted | {"tokenizer": there["tokenizer"]}  # the same tokenizer in another folder hf:DIR
    same_number = [key for key in INPUTS if key in wanted and len(there.get(key, [])) == len(wanted[key])]
    pairs = [pair for key in same_number for pair in zip(there[key], wanted[key], strict=True)]
    if any(_holds_other(old, new) and "sha256" in old for old, new in pairs):
        wanted = with_hashes(wanted, sources, team)
    for key in same_number:
        pairs = list(zip(there[key], wanted[key], strict=True))
        wanted = wanted | {key: [new if _holds_other(old, new) else old for old, new in pairs]}
    listed = "decontaminate"
    if [one["sha256"] for one in there.get(listed, [])] == [one["sha256"] for one in wanted.get(listed, [])]:
        wanted = wanted | ({listed: there[listed]} if listed in there else {})
    return wanted


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Describe the differences between two settings, one sentence each."""
    found: list[str] = []
    implied: list[str] = []  # differences that follow from a step that is on in one of them only, which is found too
    for key in [*wanted, *(name for name in there if name not in wanted)]:
        old, new = there.get(key), wanted.get(key)
        if old == new:
            continue
        if key in ("version", "words"):
            (found if old and new else implied).append(
                "an earlier version of this project made it, which prepares text differently"
            )
        elif key in INPUTS:
            found += _differing_inputs(key, old or [], new or [])
        elif key == "appended":
            names = [_names(record["input"]) for record in old or []]
            found.append(f"{', '.join(names)} was added to it by --append")
        elif key == "tokenizer_fingerprint":
            if there["tokenizer"] == wanted["tokenizer"]:
                found.append(f"the files of --tokenizer {wanted['tokenizer']} have changed since")
        elif key == "decontaminate":
            found.append("the evaluation files of --decontaminate differ, or have changed since")
        elif key == "libraries":
            for name in sorted({*(old or {}), *(new or {})}):
                was, is_now = (old or {}).get(name), (new or {}).get(name)
                if was != is_now:
                    sentence = f"the library {name} had version {was or 'none'}, now it has {is_now or 'none'}"
                    (found if was and is_now else implied).append(sentence)
        else:
            if key == "deduplicate":
                key, old, new = "keep_duplicates", not old, not new
            option = "--" + key.replace("_", "-")
            found.append(f"{option} was {_in_words(old)}, now it is {_in_words(new)}")
    return found or implied


@functools.cache  # a command first looks for prepared data, then prepares it
def _sha256(path: str, mtime_ns: int) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _replaced(settings: dict[str, Any], described: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings with other descriptions of the sources."""
    left = iter(described)
    return settings | {key: [next(left) for _ in settings[key]] for key in INPUTS if key in settings}


def _holds_other(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return False if two descriptions are known to have the same contents, else True."""
    if "state" in new and old.get("state") == new["state"]:
        new = new | {name: old[name] for name in ("sha256", *_PLACE) if name in old}
    elif "sha256" in new and old.get("sha256") == new["sha256"]:
        new = new | {name: old[name] for name in _PLACE if name in old}
    return old != new


def _differing_inputs(key: str, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    option = f"--{key}"
    if len(old) != len(new):
        return [f"{option} was {_names(old)}, now it is {_names(new)}"]
    found = []
    for before, now in zip(old, new, strict=True):
        if before == now:
            continue
        rest = [name for name in {**before, **now} if name not in (*_PLACE, "sha256", "bytes", "number", "packages")]
        changed = [name for name in rest if before.get(name) != now.get(name)]
        versions = before.get("packages", {}), now.get("packages", {})
        for name in changed:
            words = _in_words(before.get(name)), _in_words(now.get(name))
            found.append(f"{option} {_name(now)}: {name.replace('_', ' ')} was {words[0]}, now it is {words[1]}")
        for package in sorted({*versions[0], *versions[1]}):
            if versions[0].get(package) != versions[1].get(package):
                was, is_now = (_in_words(one.get(package)) for one in versions)
                found.append(f"the package {package} of the default corpus had version {was}, now it has {is_now}")
        if changed or versions[0] != versions[1]:
            continue
        if _name(before) != _name(now):
            found.append(f"{option} was {_name(before)}, now it is {_name(now)}, which holds other text")
        elif before.get("bytes") != now.get("bytes") or before.get("number") != now.get("number"):
            found.append(f"{option} {_name(now)} has changed since: it had {_size(before)}, now it has {_size(now)}")
        else:
            found.append(
                f"{option} {_name(now)} has changed since: the same number of bytes, but other ones, or in "
                "another order"
            )
    return found


def _names(described: list[dict[str, Any]]) -> str:
    return ", ".join(map(_name, described)) or "none"


def _name(described: dict[str, Any]) -> str:
    return str(described.get("path") or described.get("id") or described["kind"])


def _size(described: dict[str, Any]) -> str:
    size = f"{number_of(described['bytes'], 'byte')}" if "bytes" in described else "other files"
    return f"{number_of(described['number'], 'file')} of {size}" if described.get("number", 1) != 1 else size


def _in_words(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, dict):
        return " ".join(f"{name}={_in_words(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return str(value)


def _changed_limits(config: PrepareConfig) -> dict[str, Any]:
    """Return the limits of cleaning rules that differ from the defaults, by step and name."""
    steps = config.cleaning.limits.items()
    return {f"{step}.{name}": value for step, limits in steps for name, value in limits.changed.items()}


def _libraries(config: PrepareConfig) -> dict[str, str]:
    """Return the version of each library that a selected cleaning step uses for its decisions."""
    from importlib import metadata

    steps = config.cleaning.steps
    return {library: metadata.version(library) for step, library in LIBRARIES.items() if step in steps}


def _fingerprint(config: PrepareConfig) -> str | None:
    """Return the fingerprint of a tokenizer given by files, which may change while their folder keeps its name."""
    if config.tokenizer_from is not None:
        return find_tokenizer(config.tokenizer_from).fingerprint
    return build_tokenizer(config.tokenizer).fingerprint if parse_spec(config.tokenizer)[0] == "hf" else None
