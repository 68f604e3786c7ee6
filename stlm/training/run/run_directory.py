"""The run directory: locked by one job at a time, with its config and environment, and the checkpoint to resume from.

    runs/NAME/
        config.yaml        all settings of the run, enough to repeat it
        environment.json   versions, machine and ranks of every start
        metrics.jsonl      one line per logged step and validation
        train.log          the printed lines, with the time
        tensorboard/
        checkpoints/       see checkpoint.py

Only rank 0 writes here.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_pipeline.storage.atomic import WriteError, write_errors_as, write_text
from stlm.checkpoints import checkpoints_of, newest_checkpoint
from stlm.config import (
    ON_REQUEST,
    RunConfig,
    TrainingConfig,
    changed_keys,
    dump_run_config,
    load_run_config,
    value_at,
    written,
)
from stlm.config.schema import LimitsConfig
from stlm.errors import CheckpointError, ConfigError, StlmError
from stlm.stlm import STLM
from stlm.training.optim.limits import used_up
from stlm.training.run.checkpoint import (
    check_checkpoint,
    checkpoint_path,
    prune_checkpoints,
    read_progress,
    refuse_other_model,
    write_checkpoint,
)
from stlm.training.run.state import State

PACKAGES = ("stlm", "torch", "deepspeed", "numpy", "safetensors")


class Start(NamedTuple):
    """Starting point of a job."""

    checkpoint: Path | None  # None: at the beginning
    notes: list[str]  # warnings for the log
    changed: dict[str, list[Any]]  # settings that differ from those of the job before: key → old and new value


def choose_run_directory(
    name: str, resume: str, root: Path = Path("runs"), obstacle: Callable[[Path], str | None] = lambda run_dir: ""
) -> tuple[Path, str]:  # fmt: skip
    """Return root/NAME if it is new or unfinished, else the first of root/NAME-2, root/NAME-3 … that is unfinished.
    Where all existing ones are finished, the newest is extended if `obstacle` returns None for it (see
    `why_not_extended`), else a new one is chosen. Also returns a line for people on the choice.

    With resume "never", returns the first that does not exist, with "must" the last that does.
    """
    candidates = [root / name, *(root / f"{name}-{number}" for number in range(2, 10_000))]
    new = next(number for number, path in enumerate(candidates) if not path.exists())
    if resume == "never":
        return candidates[new], ""
    if resume == "must":
        return candidates[max(new - 1, 0)], ""
    for path in candidates[:new]:
        if not is_finished(path):
            return path, ""
    if new == 0:
        return candidates[0], ""
    newest = candidates[new - 1]
    reason = obstacle(newest)
    if reason is None:
        return newest, f"{newest} is finished; this command extends it"
    return candidates[new], f"{newest} is finished{reason}; starting a new run"


def why_not_extended(run_dir: Path, config: RunConfig, fingerprint: str, allow_change: bool) -> str | None:
    """Return why a command with `config`, on data with `fingerprint`, does not extend a finished run, as the end of a
    sentence. Returns None where it does: it allows more steps, ids, bytes or seconds and changes nothing else.
    """
    newest = newest_checkpoint(run_dir)
    assert newest is not None, "a finished run without a checkpoint"
    made, training = read_progress(newest), config.training
    at = f" at step {made['step']:,}"
    reached = _limits_reached(training, made)
    if reached:
        return f"{at}; to extend it, raise {' and '.join(reached)}"
    changed = changed_keys(load_run_config(run_dir), config, (True, ON_REQUEST) if allow_change else (True,))
    if changed:
        return f"{at} with different settings: {', '.join(changed)}"
    return None if made["data_fingerprint"] in (None, fingerprint) else f"{at} on different data"


def _limits_reached(training: TrainingConfig, made: Mapping[str, Any]) -> list[str]:
    """Return the settings that allow no further step."""
    seen = made["step"], made["ids_seen"], made["bytes_seen"], made.get("seconds") or 0.0
    alone = {"training.max_steps": replace(training, limits=LimitsConfig())}
    for name, value in dataclasses.asdict(training.limits).items():
        only = {name: value}
        alone[f"training.limits.{name}"] = replace(training, max_steps=2**62, limits=LimitsConfig(**only))
    return [key for key, one in alone.items() if used_up(one, *seen) > 1]


def is_finished(run_dir: Path) -> bool:
    """Return True if a run has a checkpoint of the last step that its own config allows."""
    if not (run_dir / "config.yaml").is_file():
        return False
    training = load_run_config(run_dir).training
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return False
    try:
        made = read_progress(newest)
        if made.get("pending"):  # interrupted in its last validation
            return False
        return used_up(training, made["step"], made["ids_seen"], made["bytes_seen"], made.get("seconds") or 0.0) > 1
    except (OSError, ValueError, KeyError):  # damaged: opening the folder reports it
        return False


def begin_run(
    config: RunConfig, model: STLM, folder: Path, state: State | None = None, progress: Mapping[str, Any] | None = None
) -> None:  # fmt: skip
    """Write the folder of a run that resumes from `model`: config, tokenizer, and a checkpoint.

    The checkpoint is of step 0 with the model's weights, unless a `state` from elsewhere and the known parts of its
    `progress` are given. Where the data is unknown, the run may resume with any data prepared with the tokenizer.
    """
    parameters = {name: parameter.detach().float().cpu() for name, parameter in model.named_parameters()}
    counts = dict.fromkeys(("step", "ids_seen", "bytes_seen", "sequences_seen"), 0)
    whole = {
        **counts,
        "seed": config.seed,
        "data_fingerprint": None,
        "tokenizer_fingerprint": model.tokenizer.fingerprint,
        "validation_bits_per_byte": None,
        **(progress or {}),
        "scheduled": True,  # even if the source's checkpoint was not: the run may roll back to this one
    }
    write_text(folder / "config.yaml", dump_run_config(config))
    model.tokenizer.save(folder / "tokenizer")
    path = checkpoint_path(folder, whole["step"])
    write_checkpoint(path, config.model, model.tokenizer, state or State(parameters, {}, 0), whole)


class RunDirectory:
    """The folder of one run, locked while it is open."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self.saved: RunConfig | None = None  # the config of the job before

    def open(self, config: RunConfig, fingerprint: str, resume: str, allow_change: bool = False) -> Start:
        """Lock the folder, check that the run may resume as `resume` says, and write its config.

        `fingerprint`: of the data. `allow_change`: settings that may change on request may differ. Raises ConfigError
        or CheckpointError where the run cannot begin or resume.
        """
        if resume == "must" and not self.path.exists():
            raise self._nothing_to_resume()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_folder()
            if (self.path / "config.yaml").is_file():
                self._refuse_changes(config, resume, allow_change)
            start = self._find_start(resume)._replace(changed=self._changes_to(config))
            if start.checkpoint is not None:
                refuse_other_model(start.checkpoint, config.model)
                self._refuse_other_data(start.checkpoint, config, fingerprint)
                self._refuse_passed_limits(start.checkpoint, config)
            write_text(self.path / "config.yaml", dump_run_config(config))
            prune_checkpoints(self.path, config.training)
        except OSError as error:
            self.close()
            reason = error if isinstance(error, WriteError) else f"{error.strerror} ({error.filename})"
            raise CheckpointError(
                f"cannot use {self.path} as a run directory: {reason}; choose another folder with --run"
            ) from error
        except StlmError:
            self.close()
            raise
        return start

    def check_shared(self) -> None:
        """Raise CheckpointError if this rank does not see the folder. Every rank calls it after rank 0's `open`."""
        if not (self.path / "config.yaml").is_file():
            raise CheckpointError(
                f"{self.path} does not exist here, but rank 0 created it; choose a shared folder with --run"
            )

    @write_errors_as(CheckpointError)
    def record_start(self, step: int, details: dict[str, Any]) -> None:
        """Add this start to environment.json."""
        path = self.path / "environment.json"
        try:
            starts = list(json.loads(path.read_text(encoding="utf-8"))["starts"]) if path.is_file() else []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error!r}); delete it: the run does not need it") from None
        starts.append(
            {
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "step": step,
                "command": shlex.join(sys.argv).replace("'stlm pretrain'", "stlm pretrain", 1),
                "host": socket.gethostname(),
                "platform": platform.platform(),
                "python": platform.python_version(),
                "packages": {name: _version(name) for name in PACKAGES},
                **details,
            }
        )
        write_text(path, json.dumps({"starts": starts}, indent=1, default=str) + "\n")

    def close(self) -> None:
        """Release the lock, so that another job can use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _lock_folder(self) -> None:
        """Lock the folder. The kernel releases the lock when the process ends in any way, so no lock becomes stale."""
        lock = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise CheckpointError(
                f"{self.path} is in use by {holder}; wait for it, stop it, or choose another folder with --run"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock

    def _find_start(self, resume: str) -> Start:
        found = checkpoints_of(self.path)
        notes: list[str] = []
        for path in found:
            problem = check_checkpoint(path)
            if problem is None:
                return Start(path, notes, {})
            if resume == "must":
                raise CheckpointError(
                    f"{path} is damaged: {problem}; delete it, or use --resume auto, which tries the one before"
                )
            aside = path.with_name(f"damaged_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            notes.append(f"{path} is damaged: {problem}; moved to {aside.name}; trying the checkpoint before")
        if resume == "must":
            raise self._nothing_to_resume()
        return Start(None, notes, {})

    def _nothing_to_resume(self) -> CheckpointError:
        return CheckpointError(f"{self.path} has no checkpoint to resume from, expected checkpoints/step_…")

    def _refuse_changes(self, config: RunConfig, resume: str, allow_change: bool) -> None:
        if resume == "never":
            raise CheckpointError(
                f"{self.path} already holds a run, which --resume never would overwrite; choose another --run"
            )
        self.saved = saved = load_run_config(self.path)
        changed = changed_keys(saved, config, (True, ON_REQUEST) if allow_change else (True,))
        if changed:
            values = [(key, written(value_at(saved, key)), written(value_at(config, key))) for key in changed]
            lines = [f"  {key}: was {was}, now {now}" for key, was, now in values]
            refused = changed_keys(saved, config, (True, ON_REQUEST))
            requested = [key for key in changed if key not in refused]
            request = f"With --allow-change, which keeps weights and moments, also: {', '.join(requested)}. "
            raise ConfigError(
                f"{self.path} was started with different settings, and a run resumes with its own:\n"
                + "\n".join(lines)
                + f"\nSettings that may change: {', '.join(_changeable(config))}. "
                + (request if requested else "")
                + "For a new run choose another folder with --run."
            )

    def _changes_to(self, config: RunConfig) -> dict[str, list[Any]]:
        if self.saved is None:
            return {}
        keys = changed_keys(self.saved, config, ())
        return {key: [value_at(self.saved, key), value_at(config, key)] for key in keys}

    def _refuse_other_data(self, checkpoint: Path, config: RunConfig, fingerprint: str) -> None:
        progress = read_progress(checkpoint)
        if progress["data_fingerprint"] not in (None, fingerprint):  # None: converted, not trained here
            self._refuse_other_mixture_weights(config)
            raise CheckpointError(
                f"{self.path} was trained on data with the fingerprint {progress['data_fingerprint'][:12]}, and this "
                f"data has {fingerprint[:12]}; use the same data with --data, or another folder with --run"
            )

    def _refuse_passed_limits(self, checkpoint: Path, config: RunConfig) -> None:
        """Raise ConfigError where a new limit is below the run's progress, or `init_from` is set after its start."""
        made, training = read_progress(checkpoint), config.training
        before = (self.saved or config).training
        if made["step"] > training.max_steps:
            raise ConfigError(
                f"training.max_steps: got {training.max_steps}, but {self.path} is already at step "
                f"{made['step']}; expected at least {made['step']}"
            )
        for name, key in {"ids": "ids_seen", "bytes": "bytes_seen", "wall_time_s": "seconds"}.items():
            limit, taken = getattr(training.limits, name), made.get(key) or 0
            if limit not in (None, getattr(before.limits, name)) and taken > limit:
                took = f"trained for {taken:.3g} s" if name == "wall_time_s" else f"seen {taken:,}"
                raise ConfigError(
                    f"training.limits.{name}: got {limit}, but {self.path} has already {took}; expected no less"
                )
        if training.init_from is not None and before.init_from is None:
            raise ConfigError(
                f"training.init_from: got {training.init_from!r}, which has no effect on {self.path}: it resumes "
                "with its own weights; remove it, or start another run with --run"
            )

    def _refuse_other_mixture_weights(self, config: RunConfig) -> None:
        """Raise ConfigError where the data differ from the run's only in the weights of a mixture."""
        before, now = (each.data.mixture for each in (self.saved or config, config))
        folders = [[part.dir for part in mixture] for mixture in (before, now)]
        if before and folders[0] == folders[1] and before != now:
            assert self.saved is not None
            raise ConfigError(
                f"data.mixture: {self.path} was trained on {_mixed(self.saved)}, now it is {_mixed(config)}; a run "
                "keeps the weights of its mixture: use the same ones, or start another run with --run and "
                f"training.init_from={self.path}"
            )


def _mixed(config: RunConfig) -> str:
    return ", ".join(f"{part.weight:g} of {part.dir}" for part in config.data.mixture)


def _changeable(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys that may differ whenever a run is resumed."""
    for field in dataclasses.fields(config):
        if field.metadata.get("may_change") is True:
            yield prefix + field.name
        elif dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from _changeable(value, f"{prefix}{field.name}.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"
