"""The part of a run's configuration that concerns its data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """Which prepared data a run reads."""

    dir: str | None = field(
        default=None,
        metadata={
            "help": "folder made by scripts/preprocess.py; null: the default corpus in data/default-TOKENIZER",
            "may_change": True,
        },
    )
    tokenizer: str = field(
        default="byte",
        metadata={
            "help": "byte, or sentencepiece:N with N the size of the vocabulary; must agree with the prepared data"
        },
    )
