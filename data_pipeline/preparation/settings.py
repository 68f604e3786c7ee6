"""The settings that determine the bytes of prepared data, as its manifest records them: see `recognition`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.cleaning import decontamination, words
from data_pipeline.cleaning.documents import LIBRARIES, NEAR_DUPLICATES
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.sources.encodings import codec_of
from data_pipeline.sources.source import Source
from data_pipeline.tokenizers import build_tokenizer, find_tokenizer, parse_spec

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
