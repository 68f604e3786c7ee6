"""Text in, a folder of prepared data out: the whole road of `scripts/preprocess.py`.

    OUTPUT/train/shard_00000.{bin,idx} …   OUTPUT/validation/…   OUTPUT/tokenizer/   OUTPUT/manifest.json, written last
    OUTPUT/.preparing/                     while the work lasts: the lock, the gathered documents, which shards are done

The work is divided into pieces, each of which is done completely or not at all and recorded. Killed at any moment and
started again, a preparation goes on with the pieces that are missing and ends with the same bytes; the number of
workers changes nothing either.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.atomic import TEMPORARY_PREFIX, write_text, writing
from data_pipeline.encoding import encode_shard, make_tokenizer, plan_shards
from data_pipeline.errors import DataError
from data_pipeline.gathering import Gathered, gather, select
from data_pipeline.manifest import MANIFEST_FILE, SPLITS, TOKENIZER_DIR, WORK_DIR, Manifest
from data_pipeline.sources import Source, Unit, open_sources
from data_pipeline.textfiles import ON_ERROR
from data_pipeline.tokenizers import load_tokenizer, parse_spec
from data_pipeline.tokenizers.base import TOKENIZER_FILE
from data_pipeline.workers import available_cores, run_jobs

# Raised when the same input and settings begin to give other documents or shards.
_PREPARATION_VERSION = 1

_WORTH_A_PROCESS = 16 << 20  # bytes of input; starting one takes half a second


def _option(help: str) -> dict[str, str]:
    return {"help": help}


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how."""

    inputs: tuple[str, ...] = field(
        default=(),
        metadata=_option(
            "text files, folders, .jsonl files or ids of Hugging Face data sets; none: the default corpus"
        ),
    )
    tokenizer: str = field(default="byte", metadata=_option("byte, or sentencepiece:N, trained on the input"))
    output: str | None = field(
        default=None, metadata=_option("folder for the prepared data; none: data/NAME-TOKENIZER, NAME after the inputs")
    )
    workers: int | None = field(
        default=None, metadata=_option("processes; none: as many as pay off, one per core at most. Changes no byte")
    )
    on_error: str = field(
        default="stop", metadata=_option("what to do at a broken line or unreadable file: stop, or skip and count it")
    )
    text_key: str = field(default="text", metadata=_option("key of the text in .jsonl files and hub data sets"))
    validation_fraction: float = field(
        default=0.01, metadata=_option("share of the documents that is held back, chosen by hash; 0 < share < 1")
    )
    hub_split: str = field(default="train", metadata=_option("split of a Hugging Face data set that is read"))
    deduplicate: bool = field(default=True, metadata=_option("leave out exact duplicates of documents"))

    def __post_init__(self) -> None:
        parse_spec(self.tokenizer)
        if self.on_error not in ON_ERROR:
            raise DataError(f"on_error must be one of {', '.join(ON_ERROR)}, got {self.on_error!r}")
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        if self.workers is not None and self.workers < 1:
            raise DataError(f"workers must be at least 1, got {self.workers}")

    @property
    def directory(self) -> Path:
        """Where the prepared data goes."""
        if self.output is not None:
            return Path(self.output)
        if not self.inputs:
            return default_data_dir(self.tokenizer)
        name = "+".join(Path(name).stem or "input" for name in self.inputs)[:80]
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
    sources = open_sources(config.inputs, config.text_key, config.on_error, config.hub_split)
    return _find_prepared(config.directory, _settings(config, sources))


def prepare(config: PrepareConfig, wait: bool = False) -> Manifest:
    """Prepare data, or go on with what was interrupted; if it is there already, nothing is done.

    wait: if another process is preparing the same folder, wait for it instead of refusing.

    Raises DataError for whatever a user can mend: input that is missing, empty or broken, a folder that holds something
    else, a full disk. Nothing that looks finished is left behind then.
    """
    sources = open_sources(config.inputs, config.text_key, config.on_error, config.hub_split)
    settings = _settings(config, sources)
    output = config.directory
    manifest = _find_prepared(output, settings)
    if manifest is not None and not (output / WORK_DIR).exists():
        return manifest
    with _locked(output, wait):
        return _find_prepared(output, settings) or _prepare(config, output, sources, settings)


def _prepare(config: PrepareConfig, output: Path, sources: list[Source], settings: dict[str, Any]) -> Manifest:
    work = output / WORK_DIR
    units = [unit for number, source in enumerate(sources) for unit in source.units(number)]
    if not units:
        raise DataError(f"the input is empty: there is no text in {', '.join(source.name for source in sources)}")
    _continue_or_begin(output, settings, units)

    gathered = [Gathered(work / f"unit_{number:05d}") for number in range(len(units))]
    missing = [(unit, place) for unit, place in zip(units, gathered, strict=True) if not place.complete]
    _run("reading", gather, missing, [unit.size for unit, _ in missing], config.workers)
    duplicates = select(gathered, config.validation_fraction, config.deduplicate)

    tokenizer_dir = output / TOKENIZER_DIR
    if not (tokenizer_dir / TOKENIZER_FILE).exists():
        make_tokenizer(config.tokenizer, gathered).save(tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)

    plans = [plan for split in SPLITS for plan in plan_shards(gathered, split)]
    jobs = [(plan, output, tokenizer_dir, work / f"{plan.split}_{plan.number:05d}.json") for plan in plans]
    shards = _run("encoding", encode_shard, jobs, [plan.stored_bytes for plan in plans], config.workers)

    manifest = Manifest(
        tokenizer={
            "spec": tokenizer.spec,
            "vocab_size": tokenizer.vocab_size,
            "dtype": tokenizer.dtype.name,
            "fingerprint": tokenizer.fingerprint,
        },
        splits={split: [shard for shard in shards if shard.path.startswith(f"{split}/")] for split in SPLITS},
        sources=[_describe(number, source, units, gathered) for number, source in enumerate(sources)],
        split_rule={
            "unit": "document",
            "hash": "first 8 bytes, little-endian, of blake2b-128 over the UTF-8 of the document",
            "validation": f"hash < {config.validation_fraction} * 2**64",
        },
        duplicates=asdict(duplicates),
        settings=settings,
    )
    manifest.save(output)
    return manifest


def _run(
    what: str, function: Callable[..., Any], jobs: Sequence[Any], sizes: list[int], workers: int | None
) -> list[Any]:
    """The results of all jobs, in their order, with a bar that counts the bytes of their input."""
    results: list[Any] = [None] * len(jobs)
    if workers is None:
        workers = min(available_cores(), 1 + sum(sizes) // _WORTH_A_PROCESS)
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=what, delay=1, leave=False) as bar:
        for index, result in run_jobs(function, jobs, workers):
            results[index] = result
            bar.update(sizes[index])
    return results


def _settings(config: PrepareConfig, sources: list[Source]) -> dict[str, Any]:
    """All that decides about the bytes of the result. Values are as JSON gives them back."""
    return {
        "version": _PREPARATION_VERSION,
        "input": [source.describe() for source in sources],
        "tokenizer": config.tokenizer,
        "text_key": config.text_key,
        "on_error": config.on_error,
        "validation_fraction": config.validation_fraction,
        "deduplicate": config.deduplicate,
    }


def _describe(number: int, source: Source, units: list[Unit], gathered: list[Gathered]) -> dict[str, Any]:
    """What was read from a source, for the manifest."""
    counts = [place.counts for unit, place in zip(units, gathered, strict=True) if unit.source == number]
    problems = Counter(source.problems.counts)
    for count in counts:
        problems.update(count["problems"])
    examples = [*source.problems.examples, *(example for count in counts for example in count["examples"])]
    return {
        "name": source.name,
        **source.describe(),
        "documents": sum(count["documents"] for count in counts),
        "text_bytes": sum(count["bytes"] for count in counts),
        "problems": dict(problems),
        "examples": examples[:10],
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

    The lock is the kernel's, so it ends with the process, however that ends.
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
        if _is_there(work / "lock", lock.fileno()):
            break
        lock.close()  # the process before has finished and removed the work folder
    try:
        yield
    finally:
        begun = any(work.glob("*.json"))
        if (output / MANIFEST_FILE).exists() or not begun:
            shutil.rmtree(work)
        if not begun and not any(output.iterdir()):
            output.rmdir()
        lock.close()


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _continue_or_begin(output: Path, settings: dict[str, Any], units: list[Unit]) -> None:
    """Keep the pieces of an interrupted preparation if it was exactly this one; remove them if it was another."""
    work = output / WORK_DIR
    record = work / "settings.json"
    state = {"settings": settings, "units": hashlib.sha256(repr(units).encode()).hexdigest()}
    if record.exists() and json.loads(record.read_bytes()) == state:
        for path in output.rglob(f"{TEMPORARY_PREFIX}*"):
            path.unlink()
        return
    record.unlink(missing_ok=True)
    for folder in (*SPLITS, TOKENIZER_DIR):
        shutil.rmtree(output / folder, ignore_errors=True)
    for path in work.iterdir():
        if path.name != "lock":
            path.unlink()
    write_text(record, json.dumps(state))


def _in_a_path(spec: str) -> str:
    return re.sub(r"[^\w.-]+", "-", spec)
