"""The whole preparation: text in, a folder of prepared data out. `scripts/preprocess.py` runs it.

    OUTPUT/train/shard_00000.{bin,idx} …   OUTPUT/validation/…   OUTPUT/tokenizer/   OUTPUT/manifest.json, written last
    OUTPUT/.preparing/                     during the work: the lock, the gathered documents, the finished shards

The work is divided into pieces; each is done completely or not at all, and recorded. A preparation that was killed
resumes with the missing pieces and ends with the same bytes. The result does not depend on the number of processes or
machines.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError, TooFew
from data_pipeline.preparation.encoding import CHOICES, encode_piece, make_tokenizer, plan_shards, write_planned
from data_pipeline.preparation.existing import Existing
from data_pipeline.preparation.gathering import TEST, VALIDATION, Gathered, gather
from data_pipeline.preparation.options import PrepareConfig, default_data_dir
from data_pipeline.preparation.recognition import differences, recognised, with_hashes
from data_pipeline.preparation.scores import write_scores
from data_pipeline.preparation.settings import settings_of
from data_pipeline.preparation.split import Selection, select
from data_pipeline.preparation.statistics import SAMPLE_BYTES, describe_source
from data_pipeline.preparation.work_folder import SETTINGS_FILE, continue_or_begin, interrupted_settings, locked
from data_pipeline.preparation.workers import Team, Workers, call, run_all
from data_pipeline.report.summary import left_out_by_reading
from data_pipeline.sources.conversations import TEMPLATE
from data_pipeline.sources.encodings import codec_of
from data_pipeline.sources.files import Files
from data_pipeline.sources.limit import Limit
from data_pipeline.sources.plain_text import check_found, describe
from data_pipeline.sources.source import Source, SourceOptions, Unit, open_sources
from data_pipeline.sources.text_files import Problems
from data_pipeline.storage.atomic import write_errors_as
from data_pipeline.storage.manifest import MANIFEST_FILE, SPLITS, TOKENIZER_DIR, WORK_DIR, Manifest, ShardEntry
from data_pipeline.storage.source_spans import shares_of_sources
from data_pipeline.tokenizers import ByteTokenizer, find_tokenizer, load_tokenizer
from data_pipeline.tokenizers.base import TOKENIZER_FILE


def ensure_default_data(tokenizer_spec: str) -> Path:
    """Return the folder of the default corpus. If it is missing, prepare it, or wait for another process that does."""
    directory = default_data_dir(tokenizer_spec)
    if not (directory / MANIFEST_FILE).exists():
        prepare(PrepareConfig(tokenizer=tokenizer_spec), wait=True)
    return directory


def find_prepared(config: PrepareConfig) -> Manifest | None:
    """Return the manifest of the data that `config` describes; None if it is missing or unfinished.

    Raises DataError if the folder holds something else, or was prepared from other input or with other settings.
    """
    sources = open_inputs(config)
    return _find_prepared(config.directory, settings_of(config, sources), sources, Workers(1))


@write_errors_as(DataError)
def prepare(
    config: PrepareConfig, wait: bool = False, team: Team | None = None, after: Existing | None = None
) -> Manifest:
    """Prepare data, or resume an interrupted preparation; finished data is left unchanged.

    wait: if another process is preparing the same folder, wait for it instead of raising. team: the processes that
    share the work; none: `config.workers` processes. after: the data to which this will be added: see `appending`.

    Raises DataError for user errors: missing, empty or broken input, a folder that holds something else, a full disk.
    The folder then never looks finished.
    """
    sources, settings = find_source_settings(config)
    if after is not None:
        settings["after"] = after.manifest.fingerprint
    output = config.directory
    manifest = _find_prepared(output, settings, sources, Workers(1))
    if manifest is not None and not (output / WORK_DIR).exists():
        return manifest
    with locked(output, wait), nullcontext(team) if team else Workers(config.workers) as team:
        return _find_prepared(output, settings, sources, team) or _prepare(
            config, output, sources, settings, team, after
        )


def _prepare(
    config: PrepareConfig,
    output: Path,
    sources: list[Source],
    settings: dict[str, Any],
    team: Team,
    after: Existing | None,
) -> Manifest:
    work = output / WORK_DIR
    units = [unit for number, source in enumerate(sources) for unit in source.units(number)]
    if not units:
        left_out = [name for source in sources for names in source.problems.left_out.values() for name in names]
        raise DataError(
            f"the input is empty: there is no text in {', '.join(source.name for source in sources)}"
            + "".join(f"; left out: {name}" for name in left_out[:3])
        )
    if there := interrupted_settings(output):
        settings = recognised(there, settings, sources, team)
    if config.limit is None:  # else most of the input is never read
        settings = with_hashes(settings, sources, team)
    continue_or_begin(output, settings, units)
    team.check_shared(work / SETTINGS_FILE)

    units = within_limit(config, units, work)
    gathered, selection = gather_all(config, sources, units, work, team, after)
    divisions = _divisions(sources, units, gathered)

    tokenizer_dir = output / TOKENIZER_DIR
    if not (tokenizer_dir / TOKENIZER_FILE).exists():
        given = config.tokenizer_from
        tokenizer = make_tokenizer(config.tokenizer, gathered) if given is None else find_tokenizer(given)
        if config.conversations:
            tokenizer.chat_template = TEMPLATE
        tokenizer.save(tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)

    by_source = [
        tuple(place for unit, place in zip(units, gathered, strict=True) if unit.source == number)
        for number in range(len(sources))
    ]
    shards, statistics = _encode_and_describe(config, output, tokenizer_dir, gathered, by_source, team)

    if config.score_key is not None:
        write_scores(gathered, output, config.score_key)
    shares = shares_of_sources([unit.source for unit in units], len(sources), gathered, output, shards)
    manifest = Manifest(
        tokenizer={
            "spec": tokenizer.spec,
            "vocab_size": tokenizer.vocab_size,
            "dtype": tokenizer.dtype.name,
            "fingerprint": tokenizer.fingerprint,
        },
        splits={
            split: entries
            for split in SPLITS
            if (entries := [shard for shard in shards if shard.path.startswith(f"{split}/")]) or split != "test"
        },
        sources=[
            _describe(number, source, units, gathered) | divisions[number] | shares[number]
            for number, source in enumerate(sources)
        ],
        split_rule=_split_rule(config),
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


def _split_rule(config: PrepareConfig) -> dict[str, str]:
    """Describe the rule of the split for the manifest."""
    given = {
        split: " ".join(paths) for split, paths in (("validation", config.validation), ("test", config.test)) if paths
    }
    by_hash = {
        "hash": "first 8 bytes, little-endian, of blake2b-128 over the UTF-8 of the document",
        "validation": f"hash < {config.validation_fraction} * 2**64, in the order of the hashes, "
        "and about that share of the bytes: see data_pipeline/preparation/holdout.py",
    }
    return {"unit": "document", **({} if config.validation else by_hash), **given}


def roles_of(config: PrepareConfig) -> list[int | None]:
    """Return for each source the split that the user holds it back for; None for an input."""
    inputs: list[int | None] = [None] * max(len(config.inputs), 1)  # none: the default corpus
    return inputs + [VALIDATION] * len(config.validation) + [TEST] * len(config.test)


def within_limit(config: PrepareConfig, units: Sequence[Unit], work: Path) -> list[Unit]:
    """Return the units that are read under --limit, gathered in sequence, as each gets the rest of the limit."""
    if config.limit is None:
        return list(units)
    roles = roles_of(config)
    left, used = Limit.parse(config.limit), []
    for number, unit in enumerate(units):
        if roles[unit.source] is not None:
            break  # held-back sources follow the inputs, and are read whole
        place = Gathered(work / f"unit_{number:05d}")
        if not place.complete:
            gather(unit, place, config.cleaning, config.keep_removed is not None, left)
        counts = place.counts
        used.append(unit)
        left = left.without(counts["documents"], counts["bytes"])
        if counts["full"] or not left.allows(1, 1):
            break
    if not any(Gathered(work / f"unit_{number:05d}").counts["documents"] for number in range(len(used))):
        raise DataError(f"--limit {config.limit} leaves nothing: the first document is longer, or there is none")
    return used + [unit for unit in units if roles[unit.source] is not None]


def gather_all(
    config: PrepareConfig,
    sources: Sequence[Source],
    units: Sequence[Unit],
    work: Path,
    team: Team,
    after: Existing | None = None,
) -> tuple[list[Gathered], Selection]:
    """Gather all documents in a work folder, and choose a split for each or drop it; gathered units are kept."""
    gathered = [Gathered(work / f"unit_{number:05d}") for number in range(len(units))]
    pairs = zip(units, gathered, strict=True)
    of_sources = roles_of(config)
    roles = [of_sources[unit.source] for unit in units]
    missing = [
        (
            unit,
            place,
            *((config.cleaning, config.keep_removed is not None) if role is None else (config.cleaning_of_held,)),
        )
        for (unit, place), role in zip(pairs, roles, strict=True)
        if not place.complete
    ]
    run_all("reading", gather, missing, [unit.size for unit, *_ in missing], team)
    for split, choice in CHOICES.items():
        # By sources, because an empty source has no unit.
        if choice in of_sources and not any(
            len(place.index) for role, place in zip(roles, gathered, strict=True) if role == choice
        ):
            raise DataError(f"the files given with --{split} hold no text: {', '.join(getattr(config, split))}")
    try:
        selection = select(
            gathered,
            names=[sources[unit.source].name for unit in units],
            roles=roles,
            validation_fraction=config.validation_fraction,
            deduplicate=config.deduplicate,
            cleaning=config.cleaning,
            evaluation_files=config.decontaminate,
            output=work.parent,
            run=lambda what, function, jobs, sizes: run_all(what, function, jobs, sizes, team),
            removed_list=None if config.keep_removed is None else Path(config.keep_removed),
            existing=after.gathered(work, config.keep_ids, team) if after else (),
            before=after.share if after and "validation" not in after.manifest.settings else None,
        )
    except TooFew as error:
        _divisions(sources, units, gathered)  # raises if no text holds the separator, which is the reason then
        raise TooFew(f"{error}{_why_too_few(sources, units, gathered)}") from None
    return gathered, selection


def _why_too_few(sources: Sequence[Source], units: Sequence[Unit], gathered: Sequence[Gathered]) -> str:
    """Describe remedies for too few documents, and the input left out while it was read, as the end of a message."""
    text = any("text" in source.kinds for source in sources if isinstance(source, Files))
    divide = "; plain text is divided at blank lines by --documents paragraphs, and into lines by lines" if text else ""
    problems = [_problems_of(number, source, units, gathered) for number, source in enumerate(sources)]
    left_out = left_out_by_reading(problems)
    return divide + (f"; while it was read: {left_out}" if left_out else "")


def _encode_and_describe(
    config: PrepareConfig,
    output: Path,
    tokenizer_dir: Path,
    gathered: list[Gathered],
    by_source: list[tuple[Gathered, ...]],
    team: Team,
) -> tuple[list[ShardEntry], list[dict[str, Any]]]:
    """Write the shards of all splits; return their entries and the statistics of each source."""
    work = output / WORK_DIR
    plans = [plan for split in SPLITS for plan in plan_shards(gathered, split)]
    stored_as_ids = config.keep_ids or (config.tokenizer == ByteTokenizer.spec and not config.conversations)
    missing, jobs = [], []
    for plan in plans:
        done = work / f"{plan.name}.json"
        pieces = [] if stored_as_ids or done.exists() else plan.pieces()
        paths = [work / f"{plan.name}_{number:05d}.ids" for number in range(len(pieces))]
        missing += [
            (piece, tokenizer_dir, path, config.conversations)
            for piece, path in zip(pieces, paths, strict=True)
            if not path.exists()
        ]
        jobs.append((plan, paths, output, tokenizer_dir, done, config.keep_ids, config.conversations))
    run_all("encoding", encode_piece, missing, [piece.stored_bytes for piece, *_ in missing], team)
    # Together, so that no process is idle while the last shard is written.
    together: list[tuple[Any, ...]] = [(write_planned, *job) for job in jobs]
    together += [(describe_source, places, tokenizer_dir, config.keep_ids) for places in by_source]
    sizes = [plan.stored_bytes for plan in plans] + [SAMPLE_BYTES] * len(by_source)
    results = run_all("writing", call, together, sizes, team)
    return results[: len(plans)], results[len(plans) :]


def find_source_settings(config: PrepareConfig) -> tuple[list[Source], dict[str, Any]]:
    """Return the sources of a preparation, and all settings that determine its bytes."""
    sources = open_inputs(config)
    return sources, settings_of(config, sources)


def open_inputs(config: PrepareConfig) -> list[Source]:
    """Return the sources that a preparation reads. Raises DataError if one is missing or not readable."""
    options = SourceOptions(
        text_key=config.text_key,
        score_key=config.score_key,
        conversations=config.conversations,
        on_error=config.on_error,
        hub_split=config.hub_split,
        hub_streaming=config.hub_streaming,
        input_tokenizer=config.input_tokenizer,
        keep_ids=config.keep_ids,
        stdin_format=config.stdin_format,
        spool=config.directory.parent,
        documents=config.documents,
        encoding="" if config.encoding is None else codec_of(config.encoding),
        quoting=config.quoting,
    )
    return open_sources(config.inputs, options, config.validation, config.test)


def _describe(number: int, source: Source, units: list[Unit], gathered: list[Gathered]) -> dict[str, Any]:
    """Describe the text read from a source, for the manifest."""
    counts = [place.counts for unit, place in zip(units, gathered, strict=True) if unit.source == number]
    problems = _problems_of(number, source, units, gathered)
    return {
        "name": source.name,
        **source.describe(),
        "documents": sum(count["documents"] for count in counts),
        "text_bytes": sum(count["bytes"] for count in counts),
        "problems": dict(problems.counts),
        "examples": problems.examples[:10],
        **({"left_out": problems.left_out} if problems.left_out else {}),
    }


def _problems_of(number: int, source: Source, units: Sequence[Unit], gathered: Sequence[Gathered]) -> Problems:
    """Return the problems met while a source was searched and read."""
    problems = Problems(examples=[*source.problems.examples])
    problems.add(source.problems)
    for unit, place in zip(units, gathered, strict=True):
        if unit.source == number:
            count = place.counts
            problems.add(Problems(Counter(count["problems"]), left_out=count["left_out"]))
            problems.examples += count["examples"]
    return problems


def _divisions(sources: Sequence[Source], units: Sequence[Unit], gathered: Sequence[Gathered]) -> list[dict[str, Any]]:
    """Describe the division of each source's plain text, for the manifest. Raises DataError if no text holds the
    separator.
    """
    counts: list[Counter[str]] = [Counter() for _ in sources]
    for unit, place in zip(units, gathered, strict=True):
        counts[unit.source].update(place.counts["division"])
    division = next((source.reading().division for source in sources if isinstance(source, Files)), None)
    if division is None:
        return [{} for _ in sources]
    check_found(division, sum(counts, Counter()))
    return [{"division": {"text": describe(division, count), **count}} if count else {} for count in counts]


def _find_prepared(output: Path, settings: dict[str, Any], sources: Sequence[Source], team: Team) -> Manifest | None:
    elsewhere = "choose another folder with --output"
    if not (output / MANIFEST_FILE).exists():
        if output.exists() and not output.is_dir():
            raise DataError(f"{output} is a file, expected a folder; {elsewhere}")
        if output.exists() and not (output / WORK_DIR).exists() and (names := sorted(os.listdir(output))):
            raise DataError(f"{output} holds something else ({', '.join(names[:5])}); {elsewhere}")
        return None
    manifest = Manifest.load(output)
    there = dict(manifest.settings)
    if "keep_removed" not in settings:  # a list outside the data does not change it
        there.pop("keep_removed", None)
    if different := differences(there, recognised(there, settings, sources, team)):
        raise DataError(
            f"{output} holds data that was prepared otherwise:\n"
            + "\n".join(f"  {sentence}" for sentence in different)
            + f"\n{elsewhere}, or delete {output}"
        )
    manifest.check(output)
    if (removed_list := settings.get("keep_removed")) and not Path(removed_list).exists():
        raise DataError(f"{output} is prepared already, but {removed_list} is gone; delete {output} to have both again")
    return manifest
