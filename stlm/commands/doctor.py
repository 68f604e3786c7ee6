"""Check that this machine can train, and how to fix problems; ends with a training run of two steps.

python scripts/doctor.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipeline.extras import how_to_install
from data_pipeline.plurals import number_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "deepspeed", "numpy", "datasets", "sentencepiece", "safetensors", "tensorboard", "pyyaml", "tqdm")
STALE_AFTER_S = 120.0  # compilation touches its lock more often
TRAINING_LIMIT_S = 300.0

TINY_RUN = """\
model: {context_length: 64, width: 32, core: {num_layers: 1, attention: {num_heads: 2}}}
training: {max_steps: 2, batch_size: 4, warmup_steps: 0, log_every_steps: 1, eval_every_steps: 2, save_every_steps: 2}
"""


class Finding(NamedTuple):
    """One row of the report. `status`: ok, note (not needed here) or problem; `advice`: how to fix it."""

    name: str
    found: str
    status: str = "ok"
    advice: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Check versions, compiler, devices and caches, and train for two steps in a temporary directory. "
        "Exit code 2 if something is wrong."
    )
    parser.parse_args(argv)

    findings = []
    for finding in check_everything():
        print(f"{finding.status:9}{finding.name:15}{finding.found}", flush=True)
        findings.append(finding)
    for finding in findings:
        if finding.advice:
            print(f"\n{finding.status}: {finding.name}: {finding.advice}")
    problems = sum(finding.status == "problem" for finding in findings)
    print(f"\n{problems or 'no'} problem{'s' * (problems != 1)}")
    return 2 if problems else 0


def check_everything() -> Iterator[Finding]:
    yield Finding("python", f"{sys.version.split()[0]}, {sys.executable}")
    packages = list(check_packages(tested_versions(ROOT / "constraints.txt")))
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
        if version.partition("+")[0] in tested[name]:  # 2.13.0+cpu is 2.13.0
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
    """Report stale locks. A killed build leaves a lock behind, on which every later build of that operator hangs."""
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


# The proof.


def check_training() -> Finding:
    """Prepare a small text and train on it for two steps, by the user's commands."""
    print("training for two steps …", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="stlm-doctor-") as directory:
        folder = Path(directory)
        (folder / "run.yaml").write_text(TINY_RUN)
        lines = (f"Step {number} of the doctor's walk is {number * number} paces long." for number in range(400))
        (folder / "text.txt").write_text("\n\n".join(lines))
        data, run_dir = folder / "data", folder / "run"
        start = time.monotonic()
        for command in (  # ZeRO 2, as in the documentation: stage 0 would not notice a DeepSpeed that is too old
            ["scripts/preprocess.py", "--input", folder / "text.txt", "--output", data],
            [
                "scripts/pretrain.py",
                "--ds_config",
                ROOT / "ds_configs" / "zero2.json",
                "--config",
                folder / "run.yaml",
                "--data",
                data,
                "--run",
                run_dir,
            ],
        ):
            failure = run_command([sys.executable, *map(str, command)])
            if failure:
                return Finding("two steps", f"{command[0]} failed", "problem", failure)
        if "ZeRO stage 2" not in (run_dir / "train.log").read_text(encoding="utf-8"):
            return Finding("two steps", "not with ZeRO 2", "problem", f"{run_dir}/train.log should say so")
        if not list(run_dir.glob("checkpoints/*2/COMPLETE")):
            return Finding("two steps", "no checkpoint", "problem", f"{run_dir} should hold one of step 2")
    return Finding("two steps", f"prepared, trained with ZeRO 2 and saved in {time.monotonic() - start:.0f} s")


def run_command(command: Iterable[str]) -> str:
    """Run a command, and return the last lines it printed if it failed, else an empty string."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        result = subprocess.run(
            list(command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TRAINING_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"no end after {TRAINING_LIMIT_S:.0f} s: something waits for what does not come"
    if result.returncode == 0:
        return ""
    last = "\n".join((result.stdout + result.stderr).strip().splitlines()[-12:])
    return f"exit code {result.returncode}; the last lines were\n{last}"
