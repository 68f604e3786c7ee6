"""The options of a preparation, and the folder of its result."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from data_pipeline.cleaning import near_duplicates
from data_pipeline.cleaning.documents import NEAR_DUPLICATES, NORMALIZE, STEPS, Cleaning, parse_steps
from data_pipeline.cleaning.language import language_codes
from data_pipeline.cleaning.limits import parse_limits
from data_pipeline.cleaning.removed import check_list
from data_pipeline.errors import DataError
from data_pipeline.sources.encodings import codec_of
from data_pipeline.sources.folders import grouped
from data_pipeline.sources.formats import COMPRESSED
from data_pipeline.sources.limit import Limit
from data_pipeline.sources.plain_text import AUTO, ENOUGH, KNOWN_SEPARATORS, PIECE, Rule
from data_pipeline.sources.source import SourceOptions
from data_pipeline.sources.stdin import STDIN, check_stdin_format
from data_pipeline.sources.text_files import ON_ERROR, QUOTING
from data_pipeline.tokenizers import find_tokenizer, parse_spec


def _option(help: str) -> dict[str, str]:
    return {"help": help}


@dataclass(frozen=True)
class PrepareConfig:
    """The options of a preparation: its inputs, and how they are read, cleaned, split and encoded."""

    inputs: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            "files of text, HTML, JSON (Lines), CSV or Parquet, also compressed (.gz, .bz2, .xz, .zst); folders; "
            "quoted patterns; - for the standard input; ids of Hugging Face data sets, also ID:CONFIGURATION; folders "
            "of save_to_disk; MMIDIDX files (.bin with .idx) (default: the default corpus)"
        ),
    )
    tokenizer: str = field(
        default="byte",
        metadata=_option(
            "byte; sentencepiece:N (unigram) or sentencepiece-bpe:N, trained on the input; or hf:DIR, a folder with "
            "tokenizer.json"
        ),
    )
    output: str | None = field(
        default=None,
        metadata=_option("folder for the prepared data (default: data/NAME-TOKENIZER, with NAME from the inputs)"),
    )
    workers: int | None = field(
        default=None,
        metadata=_option(
            "processes; the result does not depend on it (default: as many as are worthwhile, at most one per core)"
        ),
    )
    on_error: str = field(
        default="stop", metadata=_option("at a broken line or unreadable file: stop, or skip and count it")
    )
    text_key: str = field(
        default="text",
        metadata=_option("key or column of the text in JSON, CSV, Parquet and data sets; meta.text: `text` in `meta`"),
    )
    documents: str = field(
        default=AUTO,
        metadata=_option(
            "how plain text is divided into documents: auto, file, separator=TEXT (at lines that hold only TEXT), "
            "paragraphs (at blank lines), lines. auto: lines that hold only "
            f"{', '.join(KNOWN_SEPARATORS[:-1])} or {KNOWN_SEPARATORS[-1]} separate documents, otherwise a file is "
            f"one; where that gives fewer than {ENOUGH}, those above {PIECE >> 10} KiB are cut at blank lines"
        ),
    )
    encoding: str | None = field(
        default=None,
        metadata=_option(
            "encoding of all files, such as gb18030, shift_jis, koi8-r or utf-16 (default: UTF-8; other text is "
            "refused, and an HTML page is decoded as it declares)"
        ),
    )
    quoting: str = field(
        default="auto",
        metadata=_option(
            "quotes in tables: minimal (they enclose cells), none (they are text), or auto, minimal for CSV and none "
            "for TSV"
        ),
    )
    validation_fraction: float = field(
        default=0.01,
        metadata=_option(
            "fraction of the documents, and of their bytes, held back for validation, chosen by hash; between 0 and 1"
        ),
    )
    limit: str | None = field(
        default=None,
        metadata=_option(
            "read only the first documents of the inputs: a number of them, 1000 or 10k, or an amount of text, 10MB "
            "or 1GiB"
        ),
    )
    validation: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            "your own validation text, given like inputs and kept whole; nothing of the inputs is held back then, and "
            "copies of its documents are removed from the training text. Of a Hugging Face data set its split "
            "`validation` is read"
        ),
    )
    test: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            "your own test text, likewise; training never reads it, evaluate.py --split test does. Of a Hugging Face "
            "data set its split `test` is read"
        ),
    )
    hub_split: str = field(default="train", metadata=_option("split of Hugging Face data sets to read"))
    hub_streaming: bool = field(
        default=False, metadata=_option("stream Hugging Face data sets, without a copy in the library's cache")
    )
    input_tokenizer: str | None = field(
        default=None,
        metadata=_option(
            "tokenizer that made the ids of MMIDIDX inputs: byte, sentencepiece:FILE or hf:DIR. If --tokenizer is the "
            "same, the ids are kept unchanged"
        ),
    )
    deduplicate: bool = field(default=True, metadata=_option("leave out exact duplicates of documents"))
    score_key: str | None = field(
        default=None,
        metadata=_option("key of a number in JSON Lines by which a curriculum may order documents, low ones first"),
    )
    tokenizer_from: str | None = field(
        default=None,
        metadata=_option(
            "prepared data, a model, a checkpoint or a run, whose tokenizer is used unchanged; instead of --tokenizer"
        ),
    )
    conversations: bool = field(
        default=False,
        metadata=_option(
            'records of JSON hold conversations, {"messages": [{"role": …, "content": …}, …]}, those of ShareGPT or '
            "Alpaca, or a prompt and its completion; only what the assistant says, or the completion, counts in the "
            "loss"
        ),
    )
    clean: tuple[str, ...] = field(
        default=(),
        metadata=_option(f"cleaning steps, separated by commas: {', '.join(STEPS)} (default: none)"),
    )
    languages: tuple[str, ...] = field(
        default=(),
        metadata=_option("languages that the step `language` keeps, by code or name: en,de or english (default: en)"),
    )
    cleaning_limits: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            "limits of the rules of cleaning steps, such as gopher.min_words=20 c4.min_sentences=1; docs/data.md lists "
            "them all"
        ),
    )
    keep_removed: str | None = field(
        default=None,
        metadata=_option(
            "write every document that cleaning, decontamination and the search for duplicates leave out to this file, "
            "one line of JSON each: source, rule, text"
        ),
    )
    decontaminate: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            "evaluation files, text, JSON, JSON Lines, CSV, TSV or Parquet, also compressed: documents that share 13 "
            "words in a row with one of them are left out"
        ),
    )

    stdin_format: str = field(
        default="txt", metadata=_option("format of the standard input, as the suffix of a file: txt, jsonl.gz, csv")
    )
    # Names of options that the folder has to which text is added, and that apply where they can; not an option itself.
    taken_over: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("inputs", "validation", "test"):
            object.__setattr__(self, name, grouped(getattr(self, name)))
        check_stdin_format(self.stdin_format)
        if self.limit is not None:
            Limit.parse(self.limit)
        if Rule.parse(self.documents).kind != AUTO and not (self.inputs or self.validation or self.test):
            raise DataError("--documents divides plain text, which the default corpus is not: name files with --input")
        parse_spec(self.tokenizer)
        if self.tokenizer_from is not None and (spec := find_tokenizer(self.tokenizer_from).spec) != self.tokenizer:
            raise DataError(f"the tokenizer of {self.tokenizer_from} is {spec}, but {self.tokenizer} is asked for")
        if self.encoding is not None:
            codec_of(self.encoding)
        if self.quoting not in QUOTING:
            raise DataError(f"quoting must be one of {', '.join(QUOTING)}, got {self.quoting!r}")
        if self.on_error not in ON_ERROR:
            raise DataError(f"on_error must be one of {', '.join(ON_ERROR)}, got {self.on_error!r}")
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        if self.validation and self.validation_fraction != _default(self, "validation_fraction"):
            raise DataError(
                "--validation-fraction has no effect with --validation, which names all text that is held back for "
                "validation: leave one of the two out"
            )
        if self.workers is not None and self.workers < 1:
            raise DataError(f"workers must be at least 1, got {self.workers}")
        if NEAR_DUPLICATES in self.cleaning.steps:
            near_duplicates.check_library()
        if self.conversations and (self.clean or self.decontaminate or not self.inputs):
            unwanted = "input" if not self.inputs else "clean" if self.clean else "decontaminate"
            raise DataError(
                "conversations are read from JSON Lines: name some with --input"
                if not self.inputs
                else f"conversations are kept unchanged, and {unwanted} is for prose: leave it out"
            )
        if self.languages and "language" not in self.clean:
            raise DataError(
                "languages are named, but the cleaning step `language`, which keeps them, is off: add it to clean "
                "(--clean language)"
            )
        if self.keep_removed is not None:
            check_list(self.keep_removed, self.inputs)
        if self.keep_ids and self.keep_removed is not None:
            raise DataError("ids that are kept unchanged cannot be written as text: leave keep_removed out")
        if self.keep_ids and (self.clean or self.decontaminate):
            raise DataError(
                "ids that are kept unchanged cannot be cleaned: leave clean and decontaminate out, or name another "
                "tokenizer than the input's"
            )

    @property
    def source_options(self) -> SourceOptions:
        """The options for finding and reading the inputs."""
        return SourceOptions(
            text_key=self.text_key,
            score_key=self.score_key,
            conversations=self.conversations,
            on_error=self.on_error,
            hub_split=self.hub_split,
            hub_streaming=self.hub_streaming,
            input_tokenizer=self.input_tokenizer,
            keep_ids=self.keep_ids,
            stdin_format=self.stdin_format,
            spool=self.directory.parent,
            documents=self.documents,
            encoding="" if self.encoding is None else codec_of(self.encoding),
            quoting=self.quoting,
            taken_over=self.taken_over,
        )

    @property
    def cleaning(self) -> Cleaning:
        """The selected cleaning steps. Raises DataError for one that does not exist or lacks its library."""
        steps = parse_steps(self.clean)
        limits: Any = parse_limits(self.cleaning_limits, Cleaning().limits)
        if off := [limit for limit in self.cleaning_limits if limit.partition(".")[0] not in steps]:
            raise DataError(f"limits of a cleaning step that is off: {', '.join(off)}; name the step in clean")
        return Cleaning(steps, language_codes(self.languages or ("en",)) if "language" in steps else (), **limits)

    @property
    def cleaning_of_held(self) -> Cleaning:
        """The steps for validation and test files: their text is normalized like the input, and no document is left
        out.
        """
        return Cleaning(tuple(step for step in self.cleaning.steps if step == NORMALIZE))

    @property
    def keep_ids(self) -> bool:
        """True if the input's ids are kept unchanged, because the requested tokenizer made them."""
        return self.input_tokenizer == self.tokenizer

    @property
    def directory(self) -> Path:
        """The folder for the prepared data."""
        if self.output is not None:
            return Path(self.output)
        if not self.inputs:
            return default_data_dir(self.tokenizer)
        name = "+".join(_name_of(name) for name in self.inputs)[:80]
        return Path("data", f"{name}-{_in_a_path(self.tokenizer)}")


def _default(config: PrepareConfig, name: str) -> Any:
    return next(one.default for one in fields(config) if one.name == name)


def default_data_dir(tokenizer_spec: str) -> Path:
    """Return the folder of the prepared default corpus: data/default-byte, data/default-sentencepiece-4096, …"""
    parse_spec(tokenizer_spec)
    return Path("data", f"default-{_in_a_path(tokenizer_spec)}")


def _name_of(source: str) -> str:
    """Return the name of an input for use in a folder name: without suffixes and pattern characters."""
    if source == STDIN:
        return "stdin"
    stem = re.sub(rf"({'|'.join(map(re.escape, COMPRESSED))})$", "", Path(source).name)
    return _in_a_path(Path(stem).stem).strip("-.") or "input"


def _in_a_path(spec: str) -> str:
    return re.sub(r"[^\w.-]+", "-", spec)
