"""What decides about the bytes of prepared data, as its manifest records it: see `recognition`."""

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

# Raised when the same input and settings begin to give other documents or shards.
_PREPARATION_VERSION = 1


def settings_of(config: PrepareConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """All that decides about the bytes of the result. Values are as JSON gives them back."""
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
        # What is off is not mentioned, so data prepared before there was such a step is still up to date.
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
    """The limits of cleaning rules that are not the default ones, by step and name."""
    steps = config.cleaning.limits.items()
    return {f"{step}.{name}": value for step, limits in steps for name, value in limits.changed.items()}


def _libraries(config: PrepareConfig) -> dict[str, str]:
    """The version of each library that decides what a cleaning step leaves out, of the steps that are on."""
    from importlib import metadata

    steps = config.cleaning.steps
    return {library: metadata.version(library) for step, library in LIBRARIES.items() if step in steps}


def _fingerprint(config: PrepareConfig) -> str | None:
    """That of a tokenizer which is given by files, because these may change behind the name of their folder."""
    if config.tokenizer_from is not None:
        return find_tokenizer(config.tokenizer_from).fingerprint
    return build_tokenizer(config.tokenizer).fingerprint if parse_spec(config.tokenizer)[0] == "hf" else None
