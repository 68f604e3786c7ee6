"""The folder OUTPUT/.preparing of work in progress: one process at a time uses it, and resumes interrupted work."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.cleaning import decontamination
from data_pipeline.errors import DataError
from data_pipeline.preparation.settings import differences
from data_pipeline.sources.source import Unit
from data_pipeline.storage.atomic import TEMPORARY_PREFIX, write_text, writing
from data_pipeline.storage.manifest import LOCK_FILE, MANIFEST_FILE, SPLITS, TOKENIZER_DIR, WORK_DIR

SETTINGS_FILE = "settings.json"  # of the preparation in progress


@contextmanager
def locked(output: Path, wait: bool) -> Iterator[None]:
    """Lock `output` for this process alone; remove temporary files left by a killed one.

    The kernel holds the lock, so it ends with the process in any case; shared file systems pass it on to other nodes.
    """
    work = output / WORK_DIR
    while True:
        with writing(output):
            work.mkdir(parents=True, exist_ok=True)
            lock = open(work / LOCK_FILE, "ab")  # noqa: SIM115 - closed below, with the lock
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
        if _is_there(work / LOCK_FILE, lock.fileno()):
            break
        lock.close()  # the previous process has finished and removed the work folder
    os.register_at_fork(after_in_child=lock.close)  # a worker that outlives a killed process must not hold its lock
    for path in output.rglob(f"{TEMPORARY_PREFIX}*"):
        if path.is_file():  # a folder may be a plan being written: see `window_plans`
            path.unlink(missing_ok=True)  # such a worker may be renaming it
    try:
        yield
    finally:
        begun = (work / SETTINGS_FILE).exists()
        finished = (output / MANIFEST_FILE).exists() or not begun
        if finished:
            for path in sorted(work.iterdir(), key=lambda path: path.name == LOCK_FILE):  # the lock file last
                path.unlink()
        lock.close()
        if finished:
            # Not under the lock: NFS keeps a name for an open file. Another process may already use the folder.
            with suppress(OSError):
                work.rmdir()
                if not begun:
                    output.rmdir()


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def interrupted_settings(output: Path) -> dict[str, Any] | None:
    """Return the settings of the preparation that was interrupted here; None if there is none."""
    record = output / WORK_DIR / SETTINGS_FILE
    return json.loads(record.read_bytes())["settings"] if record.exists() else None


def resume_or_begin(output: Path, settings: dict[str, Any], units: Sequence[Unit]) -> None:
    """Keep the pieces of an interrupted preparation of the same settings and units; say that others are removed.

    Units are compared by a hash of their `repr`, which names their classes and fields: renaming one discards the
    preparations that an earlier version began.
    """
    work = output / WORK_DIR
    record = work / SETTINGS_FILE
    state = {"settings": settings, "units": hashlib.sha256(repr(units).encode()).hexdigest()}
    if record.exists():
        interrupted = json.loads(record.read_bytes())
        if interrupted == state:
            return
        reasons = differences(interrupted["settings"], settings) or ["an earlier version of this project began it"]
        tqdm.write(f"{output}: discarding an interrupted preparation: {'; '.join(reasons)}", file=sys.stderr)
    record.unlink(missing_ok=True)
    for folder in (*SPLITS, TOKENIZER_DIR):
        shutil.rmtree(output / folder, ignore_errors=True)
    for name in (decontamination.REMOVED_FILE, "report.html"):
        (output / name).unlink(missing_ok=True)
    for path in work.iterdir():
        if path.name != LOCK_FILE:
            path.unlink()
    write_text(record, json.dumps(state))
