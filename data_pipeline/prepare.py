"""Text in, a folder of prepared data out: the whole road of `scripts/preprocess.py`.

    OUTPUT/train/shard_00000.{bin,idx} …   OUTPUT/validation/…   OUTPUT/tokenizer/   OUTPUT/manifest.json, written last
    OUTPUT/.preparing/                     while the work lasts: the lock, the gathered documents, which shards are done

The work is divided into pieces, each of which is done completely or not at all and recorded. Killed at any moment and
started again, a preparation goes on with the pieces that are missing and ends with the same bytes; who shares the work,
processes or machines, changes nothing either.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.atomic import TEMPORARY_PREFIX, write_text, writing
from data_pipeline.cleaning import decontamination, near_duplicates
from data_pipeline.cleaning.documents import NEAR_DUPLICATES, STEPS, Cleaning, parse_steps
from data_pipeline.encoding import encode_piece, make_tokenizer, plan_shards, write_planned
from data_pipeline.errors import DataError
from data_pipeline.formats import COMPRESSED
from data_pipeline.gathering import Gathered, gather
from data_pipeline.manifest import MANIFEST_FILE, SPLITS, TOKENIZER_DIR, WORK_DIR, Manifest, ShardEntry
from data_pipeline.scores import write_scores
from data_pipeline.selection import Selection, select
from data_pipeline.shares import shares_of_sources
from data_pipeline.sources import Source, SourceOptions, Unit, open_sources
from data_pipeline.statistics import describe_source
from data_pipeline.stdin import STDIN, check_stdin_format
from data_pipeline.textfiles import ON_ERROR
from data_pipeline.tokenizers import ByteTokenizer, build_tokenizer, load_tokenizer, parse_spec
from data_pipeline.tokenizers.base import TOKENIZER_FILE
from data_pipeline.workers import Team, Workers, run_all

SETTINGS_FILE = "settings.json"  # of the preparation that is under way

# Raised when the same input and settings begin to give other documents or shards.
_PREPARATION_VERSION = 1


def _option(help: str) -> dict[str, str]:
    return {"help": help}


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how."""

    inputs: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            "files of text, HTML, JSON Lines, CSV or Parquet, also with .gz, .xz or .zst behind; folders; quoted "
            "patterns; - for the standard input; ids of Hugging Face data sets, also ID:CONFIGURATION; folders of "
            "save_to_disk; MMIDIDX files (.bin with .idx). None: the default corpus"
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
        default=None, metadata=_option("folder for the prepared data; none: data/NAME-TOKENIZER, NAME after the inputs")
    )
    workers: int | None = field(default=None, metadata=_option("processes; none: one per core. Changes no byte"))
    on_error: str = field(
        default="stop", metadata=_option("what to do at a broken line or unreadable file: stop, or skip and count it")
    )
    text_key: str = field(
        default="text", metadata=_option("key or column of the text in JSON Lines, CSV, Parquet and data sets")
    )
    validation_fraction: float = field(
        default=0.01, metadata=_option("share of the documents that is held back, chosen by hash; 0 < share < 1")
    )
    hub_split: str = field(default="train", metadata=_option("split of a Hugging Face data set that is read"))
    hub_streaming: bool = field(
        default=False, metadata=_option("read hub data sets as they come, without a copy in the library's cache")
    )
    input_tokenizer: str | None = field(
        default=None,
        metadata=_option(
            "tokenizer that made the ids of MMIDIDX inputs: byte, sentencepiece:FILE or hf:DIR. Where it is the same "
            "as --tokenizer the ids are kept as they are"
        ),
    )
    deduplicate: bool = field(default=True, metadata=_option("leave out exact duplicates of documents"))
    score_key: str | None = field(
        default=None,
        metadata=_option("key of a number in JSON Lines by which a curriculum may order documents, low ones first"),
    )
    clean: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            f"cleaning steps that are on, separated by commas, of: {', '.join(STEPS)}; none: text as it is"
        ),
    )
    languages: tuple[str, ...] = field(
        default=(), metadata=_option("codes of the languages that the step `language` keeps: en,de; none: en")
    )
    decontaminate: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            "evaluation files, text or JSON Lines: documents that share 13 words in a row with one of them are left out"
        ),
    )

    stdin_format: str = field(
        default="txt", metadata=_option("format of the standard input, as the suffix of a file: txt, jsonl.gz, csv")
    )

    def __post_init__(self) -> None:
        check_stdin_format(self.stdin_format)
        parse_spec(self.tokenizer)
        if self.on_error not in ON_ERROR:
            raise DataError(f"on_error must be one of {', '.join(ON_ERROR)}, got {self.on_error!r}")
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        if self.workers is not None and self.workers < 1:
            raise DataError(f"workers must be at least 1, got {self.workers}")
        if NEAR_DUPLICATES in self.cleaning.steps:
            near_duplicates.check_library()
        if self.languages and "language" not in self.clean:
            raise DataError(
                "languages are named, but the cleaning step that keeps them is off: add `language` to clean"
            )
        if self.keep_ids and (self.clean or self.decontaminate):
            raise DataError(
                "ids that are kept as they are cannot be cleaned: leave clean and decontaminate out, or name another "
                "tokenizer than the input's"
            )

    @property
    def cleaning(self) -> Cleaning:
        """The cleaning steps that are on. DataError for one that does not exist or lacks its library."""
        steps = parse_steps(self.clean)
        return Cleaning(steps, (self.languages or ("en",)) if "language" in steps else ())

    @property
    def keep_ids(self) -> bool:
        """Whether the ids of the input, made by the tokenizer that is asked for, are kept as they are."""
        return self.input_tokenizer == self.tokenizer

    @property
    def directory(self) -> Path:
        """Where the prepared data goes."""
        if self.output is not None:
            return Path(self.output)
        if not self.inputs:
            return default_data_dir(self.tokenizer)
        name = "+".join(_name_of(name) for name in self.inputs)[:80]
        return Path("data", f"{name}-{_in_a_path(self.tokenizer)}")


def default_data_dir(tokenizer_spec: str) -> Path:
    """Where the default corpus is prepared: data/default-byte, data/default-sentencepiece-4096, …"""
    parse_spec(tokenizer_spec)
    return Path("data", f"default-{_in_a_path(tokenizer_spec)}")


def ensure_default_data(tokenizer_spec: str) -> Path:
    """The folder of the default corpus. If it is missing it is prepared, or awaited where another process is at it."""
    directory = default_data_dir(tokenizer_spec)
    if not (directory / MANIFEST_FILE).exists():
        prepare(PrepareConfig(tokenizer=tokenizer_spec), wait=True)
    return directory


def find_prepared(config: PrepareConfig) -> Manifest | None:
    """The manifest of what `config` asks for, if it is there already; None if there is nothing, or unfinished work.

    Raises DataError if the folder holds something else, or was prepared from other input or with other settings.
    """
    sources = open_inputs(config)
    return _find_prepared(config.directory, _settings(config, sources))


def prepare(config: PrepareConfig, wait: bool = False, team: Team | None = None) -> Manifest:
    """Prepare data, or go on with what was interrupted; if it is there already, nothing is done.

    wait: if another process is preparing the same folder, wait for it instead of refusing.
    team: who shares the work; none: `config.workers` processes.

    Raises DataError for whatever a user can mend: input that is missing, empty or broken, a folder that holds something
    else, a full disk. Nothing that looks finished is left behind then.
    """
    sources = open_inputs(config)
    settings = _settings(config, sources)
    output = config.directory
    manifest = _find_prepared(output, settings)
    if manifest is not None and not (output / WORK_DIR).exists():
        return manifest
    with _locked(output, wait), nullcontext(team) if team else Workers(config.workers) as team:
        return _find_prepared(output, settings) or _prepare(config, output, sources, settings, team)


def _prepare(
    config: PrepareConfig, output: Path, sources: list[Source], settings: dict[str, Any], team: Team
) -> Manifest:
    work = output / WORK_DIR
    units = [unit for number, source in enumerate(sources) for unit in source.units(number)]
    if not units:
        raise DataError(f"the input is empty: there is no text in {', '.join(source.name for source in sources)}")
    _continue_or_begin(output, settings, units)
    team.check_shared(work / SETTINGS_FILE)

    gathered, selection = gather_all(config, sources, units, work, team)

    tokenizer_dir = output / TOKENIZER_DIR
    if not (tokenizer_dir / TOKENIZER_FILE).exists():
        make_tokenizer(config.tokenizer, gathered).save(tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)

    shards = _encode(config, output, tokenizer_dir, gathered, team)

    by_source = [
        tuple(place for unit, place in zip(units, gathered, strict=True) if unit.source == number)
        for number in range(len(sources))
    ]
    jobs_by_source = [(places, tokenizer_dir, config.keep_ids) for places in by_source]
    sizes = [sum(place.counts["bytes"] for place in places) for places in by_source]
    statistics = run_all("describing", describe_source, jobs_by_source, sizes, team)

    if config.score_key is not None:
        write_scores(gathered, output, config.score_key)
    shares = shares_of_sources([unit.source for unit in units], gathered, output, shards)
    manifest = Manifest(
        tokenizer={
            "spec": tokenizer.spec,
            "vocab_size": tokenizer.vocab_size,
            "dtype": tokenizer.dtype.name,
            "fingerprint": tokenizer.fingerprint,
        },
        splits={split: [shard for shard in shards if shard.path.startswith(f"{split}/")] for split in SPLITS},
        sources=[_describe(number, source, units, gathered) | shares[number] for number, source in enumerate(sources)],
        split_rule={
            "unit": "document",
            "hash": "first 8 bytes, little-endian, of blake2b-128 over the UTF-8 of the document",
            "validation": f"hash < {config.validation_fraction} * 2**64",
        },
        duplicates=selection.duplicates,
        settings=settings,
        cleaning={
            "steps": list(config.cleaning.steps),
            **selection.record.to_json(),
            "decontamination": selection.decontamination,
        },
        statistics=[{"name": source.name, **values} for source, values in zip(sources, statistics, strict=True)],
    )
    manifest.save(output)
    return manifest


def gather_all(
    config: PrepareConfig, sources: Sequence[Source], units: Sequence[Unit], work: Path, team: Team
) -> tuple[list[Gathered], Selection]:
    """All documents in a work folder, each chosen for a split or dropped; what is there already is not read again."""
    gathered = [Gathered(work / f"unit_{number:05d}") for number in range(len(units))]
    pairs = zip(units, gathered, strict=True)
    missing = [(unit, place, config.cleaning) for unit, place in pairs if not place.complete]
    run_all("reading", gather, missing, [unit.size for unit, _, _ in missing], team)
    selection = select(
        gathered,
        names=[sources[unit.source].name for unit in units],
        validation_fraction=config.validation_fraction,
        deduplicate=config.deduplicate,
        compare=NEAR_DUPLICATES in config.cleaning.steps,
        evaluation_files=config.decontaminate,
        output=work.parent,
        run=lambda what, function, jobs, sizes: run_all(what, function, jobs, sizes, team),
    )
    return gathered, selection


def _encode(
    config: PrepareConfig, output: Path, tokenizer_dir: Path, gathered: list[Gathered], team: Team
) -> list[ShardEntry]:
    """The shards of all splits, written."""
    work = output / WORK_DIR
    plans = [plan for split in SPLITS for plan in plan_shards(gathered, split)]
    stored_as_ids = config.keep_ids or config.tokenizer == ByteTokenizer.spec
    missing, jobs = [], []
    for plan in plans:
        done = work / f"{plan.name}.json"
        pieces = [] if stored_as_ids or done.exists() else plan.pieces()
        paths = [work / f"{plan.name}_{number:05d}.ids" for number in range(len(pieces))]
        missing += [
            (piece, tokenizer_dir, path) for piece, path in zip(pieces, paths, strict=True) if not path.exists()
        ]
        jobs.append((plan, paths, output, tokenizer_dir, done, config.keep_ids))
    run_all("encoding", encode_piece, missing, [piece.stored_bytes for piece, _, _ in missing], team)
    return run_all("writing", write_planned, jobs, [plan.stored_bytes for plan in plans], team)


def open_inputs(config: PrepareConfig) -> list[Source]:
    """The sources that a preparation reads. DataError if one is not there or nothing readable."""
    return open_sources(
        config.inputs,
        SourceOptions(
            text_key=config.text_key,
            score_key=config.score_key,
            on_error=config.on_error,
            hub_split=config.hub_split,
            hub_streaming=config.hub_streaming,
            input_tokenizer=config.input_tokenizer,
            keep_ids=config.keep_ids,
            stdin_format=config.stdin_format,
            spool=config.directory.parent,
        ),
    )


def _settings(config: PrepareConfig, sources: list[Source]) -> dict[str, Any]:
    """All that decides about the bytes of the result. Values are as JSON gives them back."""
    return {
        "version": _PREPARATION_VERSION,
        "input": [source.describe() for source in sources],
        "tokenizer": config.tokenizer,
        "tokenizer_fingerprint": build_tokenizer(config.tokenizer).fingerprint
        if _has_files(config.tokenizer)
        else None,
        "text_key": config.text_key,
        "score_key": config.score_key,
        "on_error": config.on_error,
        "validation_fraction": config.validation_fraction,
        "deduplicate": config.deduplicate,
        # What is off is not mentioned, so data prepared before there was such a step is still up to date.
        **({"clean": list(config.cleaning.steps)} if config.clean else {}),
        **({"languages": sorted(config.cleaning.languages)} if config.cleaning.languages else {}),
        **({"decontaminate": decontamination.describe(config.decontaminate)} if config.decontaminate else {}),
    }


def _describe(number: int, source: Source, units: list[Unit], gathered: list[Gathered]) -> dict[str, Any]:
    """What was read from a source, for the manifest."""
    counts = [place.counts for unit, place in zip(units, gathered, strict=True) if unit.source == number]
    problems: Counter[str] = Counter()
    for count in counts:
        problems.update(count["problems"])
    if skipped := getattr(source, "skipped_files", 0):
        problems["files_of_other_formats"] = skipped
    return {
        "name": source.name,
        **source.describe(),
        "documents": sum(count["documents"] for count in counts),
        "text_bytes": sum(count["bytes"] for count in counts),
        "problems": dict(problems),
        "examples": [example for count in counts for example in count["examples"]][:10],
    }


def _find_prepared(output: Path, settings: dict[str, Any]) -> Manifest | None:
    elsewhere = "choose another folder with --output"
    if not (output / MANIFEST_FILE).exists():
        if output.exists() and not output.is_dir():
            raise DataError(f"{output} is a file, expected a folder; {elsewhere}")
        if output.exists() and not (output / WORK_DIR).exists() and (names := sorted(os.listdir(output))):
            raise DataError(f"{output} holds something else ({', '.join(names[:5])}); {elsewhere}")
        return None
    manifest = Manifest.load(output)
    if differences := _differences(manifest.settings, settings):
        raise DataError(
            f"{output} holds data that was prepared otherwise:\n"
            + "\n".join(differences)
            + f"\n{elsewhere}, or delete {output}"
        )
    manifest.check(output)
    return manifest


def _differences(there: Any, wanted: Any, key: str = "") -> list[str]:
    """The settings that differ, one line each: those of the input by name, those within them too."""
    if there == wanted:
        return []
    if isinstance(there, dict) and isinstance(wanted, dict):
        names = [*wanted, *(name for name in there if name not in wanted)]
        return [
            line
            for name in names
            for line in _differences(there.get(name), wanted.get(name), f"{key}.{name}" if key else name)
        ]
    if isinstance(there, list) and isinstance(wanted, list) and len(there) == len(wanted):
        return [line for a, b in zip(there, wanted, strict=True) for line in _differences(a, b, key)]
    return [f"  {key}: {json.dumps(there)} there, {json.dumps(wanted)} asked for"]


@contextmanager
def _locked(output: Path, wait: bool) -> Iterator[None]:
    """Be the only process that works on `output`.

    The lock is the kernel's, so it ends with the process, however that ends; file systems that nodes share pass it on.
    """
    work = output / WORK_DIR
    while True:
        with writing(output):
            work.mkdir(parents=True, exist_ok=True)
            lock = open(work / "lock", "ab")  # noqa: SIM115 - closed below, with the lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise DataError(
                f"another process is preparing data in {output}; wait for it, or choose another folder with --output"
            ) from None
        except OSError as error:
            lock.close()
            raise DataError(
                f"the file system of {output} cannot lock a file ({error.strerror}), so a second preparation of the "
                f"same folder would not be noticed; choose a folder on another file system with --output"
            ) from None
        if _is_there(work / "lock", lock.fileno()):
            break
        lock.close()  # the process before has finished and removed the work folder
    try:
        yield
    finally:
        begun = (work / SETTINGS_FILE).exists()
        finished = (output / MANIFEST_FILE).exists() or not begun
        if finished:
            for path in sorted(work.iterdir(), key=lambda path: path.name == "lock"):  # the lock is the last to go
                path.unlink()
        lock.close()
        if finished:
            # Not under the lock: NFS keeps a name for a file that is open. Another process may have moved in.
            with suppress(OSError):
                work.rmdir()
                if not begun:
                    output.rmdir()


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _continue_or_begin(output: Path, settings: dict[str, Any], units: list[Unit]) -> None:
    """Keep the pieces of an interrupted preparation if it was exactly this one; remove them if it was another."""
    work = output / WORK_DIR
    record = work / SETTINGS_FILE
    state = {"settings": settings, "units": hashlib.sha256(repr(units).encode()).hexdigest()}
    if record.exists() and json.loads(record.read_bytes()) == state:
        for path in output.rglob(f"{TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)  # a worker of the killed process may have been at its last rename
        return
    record.unlink(missing_ok=True)
    for folder in (*SPLITS, TOKENIZER_DIR):
        shutil.rmtree(output / folder, ignore_errors=True)
    for name in (decontamination.REMOVED_FILE, "report.html"):
        (output / name).unlink(missing_ok=True)
    for path in work.iterdir():
        if path.name != "lock":
            path.unlink()
    write_text(record, json.dumps(state))


def _has_files(spec: str) -> bool:
    """Whether a tokenizer is given by files, which may change behind the name of their folder."""
    return parse_spec(spec)[0] == "hf"


def _name_of(source: str) -> str:
    """What an input is called in the name of a folder: without suffixes, and without what makes a pattern."""
    if source == STDIN:
        return "stdin"
    stem = re.sub(rf"({'|'.join(map(re.escape, COMPRESSED))})$", "", Path(source).name)
    return _in_a_path(Path(stem).stem).strip("-.") or "input"


def _in_a_path(spec: str) -> str:
    return re.sub(r"[^\w.-]+", "-", spec)
