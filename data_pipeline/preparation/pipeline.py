"""The whole preparation: text in, a folder of prepared data out. `preprocess.py` runs it.

    OUTPUT/train/shard_00000.{bin,idx} …   OUTPUT/validation/…   OUTPUT/tokenizer/   OUTPUT/manifest.json, written last
    OUTPUT/.preparing/                     during the work: the lock, the gathered documents, the finished shards

The work is divided into pieces; each is done completely or not at all, and recorded. A preparation that was killed
resumes with the missing pieces and ends with the same bytes. The result does not depend on the number of processes or
machines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError, TooFew
from data_pipeline.preparation.description import check_separator, describe_sources, split_rule, why_too_few
from data_pipeline.preparation.encoding import ShardPlan, encode_piece, make_tokenizer, plan_shards, write_planned
from data_pipeline.preparation.gathering import gather, gather_finished
from data_pipeline.preparation.holdout import HeldBack
from data_pipeline.preparation.options import PrepareConfig, default_data_dir
from data_pipeline.preparation.scores import write_scores
from data_pipeline.preparation.settings import differences, recognised, settings_of, with_hashes
from data_pipeline.preparation.split import LeftOut, split_documents
from data_pipeline.preparation.statistics import SAMPLE_BYTES, describe_source
from data_pipeline.preparation.work_folder import SETTINGS_FILE, interrupted_settings, locked, resume_or_begin
from data_pipeline.preparation.workers import Team, Workers, call, run_all
from data_pipeline.sources.conversations import TEMPLATE
from data_pipeline.sources.limit import Limit
from data_pipeline.sources.source import Unit, open_sources
from data_pipeline.storage.atomic import write_errors_as
from data_pipeline.storage.documents import CHOICES, TEST, VALIDATION, Gathered
from data_pipeline.storage.manifest import MANIFEST_FILE, SPLITS, TOKENIZER_DIR, WORK_DIR, Manifest, ShardEntry
from data_pipeline.tokenizers import ByteTokenizer, Tokenizer, find_tokenizer, load_tokenizer
from data_pipeline.tokenizers.base import TOKENIZER_FILE


def ensure_default_data(tokenizer_spec: str) -> Path:
    """Return the folder of the default corpus. If it is missing, prepare it, or wait for another process that does."""
    directory = default_data_dir(tokenizer_spec)
    if not (directory / MANIFEST_FILE).exists():
        Preparation(PrepareConfig(tokenizer=tokenizer_spec)).run(wait=True)
    return directory


def prepare(config: PrepareConfig, team: Team | None = None) -> Manifest:
    """Open the inputs of a preparation and run it: see `Preparation`."""
    return Preparation(config).run(team)


class Preparation:
    """One preparation of data: its inputs, opened once, and the folder of the result.

    config: the options. after: the manifest of the data in the folder above `config.directory`, to which this text will
    be added: see `appending`. All methods raise DataError for user errors: missing, empty or broken input, a folder
    that holds something else, a full disk.
    """

    def __init__(self, config: PrepareConfig, after: Manifest | None = None) -> None:
        self.config = config
        self.output = config.directory
        self.work = self.output / WORK_DIR
        self.sources = open_sources(config.inputs, config.source_options, config.validation, config.test)
        inputs = len(self.sources) - len(config.validation) - len(config.test)
        # For each source the split that the user holds it back for; None for an input.
        self.roles = [None] * inputs + [VALIDATION] * len(config.validation) + [TEST] * len(config.test)
        self._after = after

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings that determine the bytes of the result."""
        after = {"after": self._after.fingerprint} if self._after else {}
        return settings_of(self.config, self.sources) | after

    def existing(self, team: Team | None = None) -> Manifest | None:
        """Return the manifest of the finished data; None if it is missing or unfinished.

        Raises DataError if the folder holds something else, or was prepared from other input or with other settings.
        """
        output, elsewhere = self.output, "choose another folder with --output"
        if not (output / MANIFEST_FILE).exists():
            if output.exists() and not output.is_dir():
                raise DataError(f"{output} is a file, expected a folder; {elsewhere}")
            if output.exists() and not self.work.exists() and (names := sorted(os.listdir(output))):
                raise DataError(f"{output} holds something else ({', '.join(names[:5])}); {elsewhere}")
            return None
        manifest, removed_list = Manifest.load(output), self.config.keep_removed
        there = dict(manifest.settings)
        if removed_list is None:  # a list outside the data does not change it
            there.pop("keep_removed", None)
        if different := differences(there, recognised(there, self.settings, self.sources, team or Workers(1))):
            raise DataError(
                f"{output} holds data prepared from other input or with other settings:\n"
                + "\n".join(f"  {sentence}" for sentence in different)
                + f"\n{elsewhere}, or delete {output}"
            )
        manifest.check(output)
        if removed_list is not None and not Path(removed_list).exists():
            raise DataError(
                f"{output} is already prepared, but {Path(removed_list).resolve()} is missing; delete {output} and "
                "repeat the command to get both"
            )
        return manifest

    @write_errors_as(DataError)
    def run(self, team: Team | None = None, wait: bool = False) -> Manifest:
        """Prepare the data, or resume an interrupted preparation; finished data is left unchanged.

        team: the processes that share the work; None: `config.workers` processes. wait: if another process is preparing
        the same folder, wait for it instead of raising. After an error the folder never looks finished.
        """
        manifest = self.existing()
        if manifest is not None and not self.work.exists():
            return manifest
        with locked(self.output, wait), nullcontext(team) if team else Workers(self.config.workers) as team:
            return self.existing(team) or self._prepare(team)

    def _prepare(self, team: Team) -> Manifest:
        """Do the work from beginning to end; every step skips what is done already."""
        units = self.units()
        settings = self._begin(units, team)
        gathered = self.read(units, self.work, team)
        left_out = self.split(gathered, self.work, team)
        tokenizer = self._tokenizer(gathered)
        plans = [plan for split in SPLITS for plan in plan_shards(gathered, split)]
        encoded = self._encode(plans, team)
        shards, statistics = self._write(plans, encoded, gathered, team)
        if self.config.score_key is not None:
            write_scores(gathered, self.output, self.config.score_key)
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
            sources=describe_sources(self.sources, gathered, self.output, shards),
            split_rule=split_rule(self.config),
            duplicates=left_out.duplicates,
            settings=settings,
            cleaning={
                "steps": list(self.config.cleaning.steps),
                **left_out.record.to_json(),
                "decontamination": left_out.decontamination,
            },
            statistics=statistics,
        )
        manifest.save(self.output)
        return manifest

    def units(self) -> list[Unit]:
        """Return the units of all sources. Raises DataError if there are none."""
        units = [unit for number, source in enumerate(self.sources) for unit in source.units(number)]
        if not units:
            names = ", ".join(source.name for source in self.sources)
            left_out = [
                path for source in self.sources for paths in source.problems.left_out.values() for path in paths
            ]
            examples = "".join(f"; left out: {path}" for path in left_out[:3])
            raise DataError(f"the input is empty: there is no text in {names}{examples}")
        return units

    def _begin(self, units: Sequence[Unit], team: Team) -> dict[str, Any]:
        """Make the work folder, or take over that of an interrupted preparation; return the settings to record."""
        settings = self.settings
        if there := interrupted_settings(self.output):
            settings = recognised(there, settings, self.sources, team)
        if self.config.limit is None:  # else most of the input is never read
            settings = with_hashes(settings, self.sources, team)
        resume_or_begin(self.output, settings, units)
        team.check_shared(self.work / SETTINGS_FILE)
        return settings

    def read(self, units: Sequence[Unit], work: Path, team: Team) -> list[Gathered]:
        """Read and clean all documents into a work folder; units that were read before an interruption are kept."""
        if self.config.limit is not None:
            units = self._within_limit(units, work)
        gathered = [Gathered(work / f"unit_{number:05d}", unit.source) for number, unit in enumerate(units)]
        config, missing = self.config, []
        for unit, place in zip(units, gathered, strict=True):
            is_input = self.roles[unit.source] is None  # text that is held back is normalized only
            cleaning = config.cleaning if is_input else config.cleaning_of_held
            if not place.complete:
                missing.append((unit, place, cleaning, is_input and config.keep_removed is not None))
        run_all("reading", gather, missing, [unit.size for unit, *_ in missing], team)
        for split, choice in CHOICES.items():
            # By sources, because an empty source has no unit.
            if choice in self.roles and not any(
                len(place.index) for place in gathered if self.roles[place.source] == choice
            ):
                raise DataError(f"the files given with --{split} hold no text: {', '.join(getattr(config, split))}")
        check_separator(self.sources, gathered)
        return gathered

    def _within_limit(self, units: Sequence[Unit], work: Path) -> list[Unit]:
        """Return the units that are read under --limit, gathered in sequence, as each gets the rest of the limit."""
        assert self.config.limit is not None
        left, used, documents = Limit.parse(self.config.limit), [], 0
        for number, unit in enumerate(units):
            if self.roles[unit.source] is not None:
                break  # held-back sources follow the inputs, and are read whole
            place = Gathered(work / f"unit_{number:05d}", unit.source)
            if not place.complete:
                gather(unit, place, self.config.cleaning, self.config.keep_removed is not None, left)
            counts = place.counts
            used.append(unit)
            documents += counts["documents"]
            left = left.without(counts["documents"], counts["bytes"])
            if counts["full"] or not left.allows(1, 1):
                break
        if not documents:
            raise DataError(
                f"--limit {self.config.limit} leaves nothing: the first document is longer, or there is none"
            )
        return used + [unit for unit in units if self.roles[unit.source] is not None]

    def split(self, gathered: Sequence[Gathered], work: Path, team: Team) -> LeftOut:
        """Choose a split for every gathered document, or leave it out; return what was left out."""
        after, names = self._after, [source.name for source in self.sources]
        finished = gather_finished(self.output.parent, after, work, self.config.keep_ids, team) if after else ()
        held_before = HeldBack.of(after) if after and "validation" not in after.settings else None
        try:
            return split_documents(gathered, names, self.roles, self.config, work.parent, team, finished, held_before)
        except TooFew as error:
            raise TooFew(f"{error}{why_too_few(self.sources, gathered)}") from None

    def _tokenizer(self, gathered: Sequence[Gathered]) -> Tokenizer:
        """Make the tokenizer, trained on the training text if need be, and save it; return it as it is read back."""
        directory, given = self.output / TOKENIZER_DIR, self.config.tokenizer_from
        if not (directory / TOKENIZER_FILE).exists():
            tokenizer = make_tokenizer(self.config.tokenizer, gathered) if given is None else find_tokenizer(given)
            if self.config.conversations:
                tokenizer.chat_template = TEMPLATE
            tokenizer.save(directory)
        return load_tokenizer(directory)

    def _encode(self, plans: Sequence[ShardPlan], team: Team) -> list[list[Path]]:
        """Encode the documents of every unfinished shard into files of its pieces, and return the files by shard.

        There are none where ids are stored as they are, or are bytes: those shards are written at once.
        """
        config, jobs, files = self.config, [], []
        stored_as_ids = config.keep_ids or (config.tokenizer == ByteTokenizer.spec and not config.conversations)
        for plan in plans:
            pieces = [] if stored_as_ids or self._record_of(plan).exists() else plan.pieces()
            paths = [self.work / f"{plan.name}_{number:05d}.ids" for number in range(len(pieces))]
            jobs += [
                (piece, self.output / TOKENIZER_DIR, path, config.conversations)
                for piece, path in zip(pieces, paths, strict=True)
                if not path.exists()
            ]
            files.append(paths)
        run_all("encoding", encode_piece, jobs, [piece.stored_bytes for piece, *_ in jobs], team)
        return files

    def _write(
        self, plans: Sequence[ShardPlan], encoded: Sequence[list[Path]], gathered: Sequence[Gathered], team: Team
    ) -> tuple[list[ShardEntry], list[dict[str, Any]]]:
        """Write all shards, and describe the text of every source: together, so that no process is idle while the last
        shard is written. Return the entries of the shards, and the statistics.
        """
        config, tokenizer_dir = self.config, self.output / TOKENIZER_DIR
        jobs: list[tuple[Any, ...]] = [
            (write_planned, plan, paths, self.output, tokenizer_dir, self._record_of(plan), config.keep_ids,
             config.conversations)
            for plan, paths in zip(plans, encoded, strict=True)
        ]  # fmt: skip
        for number in range(len(self.sources)):
            mine = tuple(place for place in gathered if place.source == number)
            jobs.append((describe_source, mine, tokenizer_dir, config.keep_ids))
        sizes = [plan.stored_bytes for plan in plans] + [SAMPLE_BYTES] * len(self.sources)
        results = run_all("writing", call, jobs, sizes, team)
        shards, statistics = results[: len(plans)], results[len(plans) :]
        return shards, [
            {"name": source.name, **numbers} for source, numbers in zip(self.sources, statistics, strict=True)
        ]

    def _record_of(self, plan: ShardPlan) -> Path:
        """Return the file that records a finished shard."""
        return self.work / f"{plan.name}.json"
