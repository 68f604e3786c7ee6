"""Checks of the machine: versions, devices, compiler, caches, and a training run of two steps."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from data_pipeline.extras import how_to_install
from data_pipeline.plurals import number_of

PACKAGES = ("torch", "deepspeed", "numpy", "datasets", "sentencepiece", "safetensors", "tensorboard", "pyyaml", "tqdm")
ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"  # the tested versions; in a clone only
STALE_AFTER_S = 120.0  # compilation touches its lock more often
TRAINING_LIMIT_S = 300.0

TINY_RUN = """\
model: {context_length: 64, width: 32, core: {num_layers: 1, attention: {num_heads: 2}}}
training: {max_steps: 2, batch_size: 4, warmup_steps: 0, log_every_steps: 1, eval_every_steps: 2, save_every_steps: 2}
"""
ZERO_2 = '{"zero_optimization": {"stage": 2}}'  # as in the documentation; stage 0 works with any DeepSpeed


class Finding(NamedTuple):
    """One row of the report. `status`: ok, note (not needed here) or problem; `advice`: how to fix it."""

    name: str
    found: str
    status: str = "ok"
    advice: str = ""


def check_machine() -> Iterator[Finding]:
    """Yield the findings in order. Only the packages are checked if one of them is missing."""
    yield Finding("python", f"{sys.version.split()[0]}, {sys.executable}")
    packages = list(check_packages(tested_versions(CONSTRAINTS) if CONSTRAINTS.is_file() else {}))
    yield from packages
    if any(package.status == "problem" for package in packages):
        return  # the other checks would fail for the same reason
    yield from check_devices()
    yield from check_tools()
    yield from check_operator_cache(operator_cache())
    yield from check_mpi()
    yield check_training()


# Versions.


def check_packages(tested: Mapping[str, set[str]]) -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "problem", how_to_install(name))
            continue
        if version.partition("+")[0] in tested.get(name, {version.partition("+")[0]}):  # 2.13.0+cpu is 2.13.0
            yield Finding(name, version)
        else:
            yield Finding(
                name, version, "note", f"tested with {' or '.join(sorted(tested[name]))}: {how_to_install(name)}"
            )


def tested_versions(constraints: Path) -> dict[str, set[str]]:
    """Return package → versions that constraints.txt pins, for all Python versions."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", constraints.read_text(encoding="utf-8"), re.MULTILINE):
        versions.setdefault(name.lower(), set()).add(version)
    return versions


# The machine.


def check_devices() -> Iterator[Finding]:
    import torch

    from stlm.training.deepspeed.precision import choose_precision

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("processor", f"{number_of(cores or 1, 'core')}, {memory:.1f} GiB of memory")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding(f"gpu {index}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB of memory")
    if not torch.cuda.is_available():
        yield Finding("gpu", "none that torch can use: training runs on the processor")
    precision = choose_precision("auto")
    yield Finding("precision", f"{precision.name}: {precision.reason}")


def check_tools() -> Iterator[Finding]:
    compiler = os.environ.get("CXX", "c++")
    unneeded = "training here compiles nothing; DeepSpeed's own operators would need it"
    for name, command, install in (
        ("compiler", compiler, "apt-get install g++"),
        ("ninja", "ninja", how_to_install("ninja")),
    ):
        path = shutil.which(command) or shutil.which(command, path=str(Path(sys.executable).parent))
        if path:
            version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
            yield Finding(name, f"{path}, {version}")
        else:
            yield Finding(name, "none", "note", f"{unneeded}: {install}")


def operator_cache() -> Path:
    """Return the folder in which torch keeps the operators that DeepSpeed compiles, by torch's own rules."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    device = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(given) if given else Path(get_default_build_root(), f"{python}_{device}")


def check_operator_cache(cache: Path) -> Iterator[Finding]:
    """Report stale locks. A killed build leaves a lock, on which every later build of that operator hangs."""
    built = sorted(path.parent.name for path in cache.glob("*/*.so"))
    yield Finding("operators", f"{', '.join(built) or 'none built'} in {cache}")
    for lock in sorted(cache.glob("*/lock")):
        age = time.time() - lock.stat().st_mtime
        if age > STALE_AFTER_S:
            found = f"{lock}, {age / 60:.0f} minutes old"
            advice = f"whatever loads this operator hangs; if nothing is being built: rm {lock}"
            yield Finding("stale lock", found, "problem", advice)


def check_mpi() -> Iterator[Finding]:
    path = shutil.which("mpirun")
    yield Finding("mpi", path or "no mpirun", "ok" if path else "note", "" if path else "only to start ranks by mpirun")


# Training.


def check_training() -> Finding:
    """Prepare a small text and train on it for two steps, by the commands that users type."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stlm-doctor-") as directory:
        folder = Path(directory)
        (folder / "run.yaml").write_text(TINY_RUN)
        (folder / "zero2.json").write_text(ZERO_2)
        lines = (f"The square of {number} is {number * number}, and so on." for number in range(400))
        (folder / "text.txt").write_text("\n\n".join(lines))
        preprocess = "preprocess --input text.txt --output data"
        pretrain = "pretrain --ds_config zero2.json --config run.yaml --data data --run run"
        for command in (preprocess, pretrain):
            failure = run_command([sys.executable, "-m", "stlm", *command.split()], folder)
            if failure:
                return Finding("two steps", f"stlm {command.split()[0]} failed", "problem", failure)
        if "ZeRO stage 2" not in (folder / "run" / "train.log").read_text(encoding="utf-8"):
            return Finding("two steps", "not with ZeRO 2", "problem", "expected ZeRO stage 2 in the run's train.log")
        if not list(folder.glob("run/checkpoints/*2/COMPLETE")):
            return Finding("two steps", "no checkpoint", "problem", "expected a checkpoint of step 2")
    return Finding("two steps", f"prepared, trained with ZeRO 2 and saved in {time.monotonic() - start:.0f} s")


def run_command(command: Iterable[str], folder: Path) -> str:
    """Run a command in a folder. If it fails, return its exit code and last lines, else an empty string."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        result = subprocess.run(
            list(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=TRAINING_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"no end after {TRAINING_LIMIT_S:.0f} s"
    if result.returncode == 0:
        return ""
    last = "\n".join((result.stdout + result.stderr).strip().splitlines()[-12:])
    return f"exit code {result.returncode}; the last lines were\n{last}"
