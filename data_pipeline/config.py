"""The part of a run's configuration that concerns its data."""

from __future__ import annotations

from dataclasses import dataclass, field

PACKINGS = ("stream", "documents", "padded", "best_fit")
CURRICULA = ("length", "score")


@dataclass(frozen=True)
class MixturePart:
    """One of several prepared folders and its share of the windows."""

    dir: str = field(metadata={"help": "folder made by scripts/preprocess.py", "may_change": True})
    weight: float = field(
        default=1.0,
        metadata={
            "help": "share of the windows that come from it, relative to the other weights",
            "above": 0.0,
            "maximum": 1e6,
        },
    )


@dataclass(frozen=True)
class DataConfig:
    """The prepared data that a run reads, and its packing into windows."""

    dir: str | None = field(
        default=None,
        metadata={
            "help": "folder made by scripts/preprocess.py; null: the default corpus in data/default-TOKENIZER",
            "may_change": True,
        },
    )
    mixture: tuple[MixturePart, ...] = field(
        default=(),
        metadata={
            "help": "several folders instead of one, each {dir: FOLDER, weight: SHARE}; all of the same tokenizer",
            "may_change": True,  # the folders may have moved; what they hold and their weights are compared
        },
    )
    tokenizer: str = field(
        default="byte",
        metadata={"help": "byte, or sentencepiece:N with a vocabulary of N ids; must be that of the prepared data"},
    )
    packing: str = field(
        default="stream",
        metadata={
            "help": "contents of a window. stream: the next ids, across documents; documents: the same, but attention "
            "ends at documents' edges; padded: one document; best_fit: the whole documents that fill it "
            "best. The latter two need scripts/preprocess.py plan",
            "choices": PACKINGS,
        },
    )
    curriculum: str | None = field(
        default=None,
        metadata={
            "help": "order of the first epoch. length: short documents first; score: low scores first (preprocess.py "
            "--score-key); null: none, as in later epochs. Needs scripts/preprocess.py plan",
            "choices": CURRICULA,
        },
    )
    verify: bool | None = field(
        default=None,
        metadata={
            "help": "check the sha256 of every shard before training, not only its size; null: up to 256 MiB",
            "may_change": True,
        },
    )
