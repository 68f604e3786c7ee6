"""Verification of every byte of prepared data against the hashes recorded when it was written."""

from __future__ import annotations

import os
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.loading.prepared_data import check_tokenizer
from data_pipeline.loading.window_plans import plan_files
from data_pipeline.plurals import number_of
from data_pipeline.preparation.workers import Team, run_all
from data_pipeline.storage.manifest import Manifest, WrittenFile, how_to_repair


def verify(directory: str | os.PathLike[str], team: Team) -> int:
    """Check every shard, the tokenizer and the plans; return the number of shards.

    Raises one DataError that names every file that differs.
    """
    manifest = Manifest.load(directory)
    check_tokenizer(directory, manifest)
    files = manifest.files(directory)
    plans = plan_files(Path(directory))
    jobs = [(file,) for file in [*files, *plans]]
    problems = run_all("verifying", _problem, jobs, [file.size for (file,) in jobs], team)
    shards = sum(map(len, manifest.splits.values()))
    if any(problems):
        wrong = len({file.path.with_suffix("") for file, problem in zip(files, problems, strict=False) if problem})
        are = "is" if wrong == 1 else "are"
        counted = [f"{wrong} of {number_of(shards, 'shard')} {are} wrong: {how_to_repair(directory)}"]
        if any(problems[len(files) :]):
            counted.append("plans are made again with preprocess.py plan")
        raise DataError("\n".join([*filter(None, problems), *counted]))
    return shards


def _problem(file: WrittenFile) -> str | None:
    return file.problem(hashes=True)
