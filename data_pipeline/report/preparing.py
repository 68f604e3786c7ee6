"""Prepare text, or add text to prepared data; then summarize the data and write its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.preparation.appending import append
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import Preparation
from data_pipeline.preparation.workers import Team
from data_pipeline.report.page import REPORT_FILE, write_report
from data_pipeline.report.plots import PlotsMissing
from data_pipeline.report.summary import summary
from data_pipeline.storage.manifest import MANIFEST_FILE

Log = Callable[[str], None]


def prepare_and_report(config: PrepareConfig, team: Team | None, log: Log) -> None:
    """Prepare data, unless it is there; `log` takes the summary and the place of the report."""
    start = time.monotonic()
    preparation = Preparation(config)
    new = preparation.existing() is None
    if not new:
        log(f"{config.directory} is already prepared; nothing to do\n")
    log(summary(preparation.run(team), config.directory))
    if config.keep_removed is not None:
        log(f"removed documents: {config.keep_removed}")
    _update_report(config.directory, new, log)
    log(f"done in {time.monotonic() - start:.1f} s")


def append_and_report(config: PrepareConfig, team: Team | None, log: Log) -> None:
    """Add text to prepared data, unless it is there: see `append_config`."""
    start = time.monotonic()
    manifest, new = append(config, team=team)
    directory = config.directory.parent
    if not new:
        log(f"{directory} already holds this text; nothing to do\n")
    log(summary(manifest, directory))
    _update_report(directory, new, log)
    log(f"done in {time.monotonic() - start:.1f} s")


def _update_report(directory: Path, new: bool, log: Log) -> None:
    """Write the report of new data, or of data whose command was killed between manifest and report."""
    report, manifest = directory / REPORT_FILE, directory / MANIFEST_FILE
    if not new and report.exists() and report.stat().st_mtime_ns >= manifest.stat().st_mtime_ns:
        return
    try:
        log(f"report: {write_report(directory)}")
    except PlotsMissing as error:
        log(f"no report: {error}; then python scripts/preprocess.py report {directory}")
