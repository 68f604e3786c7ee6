"""Prepared data survives failures while it is made: kills, lost workers, full disks, concurrent commands."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.loading.window_plans import _new
from data_pipeline.preparation.workers import process_pool, result_of, submit
from data_pipeline.storage.atomic import WriteError, atomic_file, save_array, sha256_file

ROOT = Path(__file__).resolve().parents[2]

# scripts/preprocess.py with small units: many files, and so many moments at which to kill it.
PREPROCESS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from stlm.commands import preprocess, program
from data_pipeline.preparation import encoding
from data_pipeline.sources import files
from data_pipeline.sources import text_files as textfiles
files.SLICE = textfiles.SLICE = 20_000
encoding.SHARD_BYTES = 40_000
encoding.PIECE_BYTES = 5_000
if __name__ == "__main__":
    program.run(preprocess.main)
"""


@pytest.fixture
def command(tmp_path):
    """Return the command that prepares some text with two workers, without the output as its last argument."""
    rng = random.Random(1)
    words = ["the", "of", "and", "to", "in", "is", "was", "it", "for", "with", "he", "be", "are", "é😀", "\u2581"]
    paragraphs = [" ".join(rng.choices(words, k=rng.randint(5, 30))) for _ in range(3000)]
    (tmp_path / "a.txt").write_text("\n<eos>\n".join(paragraphs))
    (tmp_path / "small_pieces.py").write_text(PREPROCESS)
    options = ["--input", "a.txt", "--tokenizer", "sentencepiece:300", "--workers", "2", "--output"]
    return [sys.executable, str(tmp_path / "small_pieces.py"), *options]


def start(command, output, cwd):
    return subprocess.Popen(
        [*command, str(output)], cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run(command, output, cwd):
    process = start(command, output, cwd)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def hashes(directory):
    """Return the sha256 of every file except the report, which contains its folder's name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "report.html")
    return {str(path.relative_to(directory)): sha256_file(path) for path in files}


def await_file(process, path):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)


def test_killed_at_random_moments_and_repeated_it_ends_with_the_same_bytes(command, tmp_path):
    begin = time.monotonic()
    assert run(command, "whole", tmp_path)[0] == 0
    duration = time.monotonic() - begin
    rng = random.Random(time.time_ns())
    moments = []
    for _ in range(5):
        process = start(command, "killed", tmp_path)
        moments.append(rng.uniform(0.2, 1) * duration)
        time.sleep(moments[-1])
        # Alone, as when memory runs out, or with its workers, as a batch system does.
        (os.kill if rng.random() < 0.5 else os.killpg)(process.pid, signal.SIGKILL)
        process.communicate()
    assert run(command, "killed", tmp_path)[0] == 0
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole"), f"killed after {moments} s of {duration} s"


def test_killed_at_its_report_and_repeated_nothing_unfinished_is_left(command, tmp_path):
    assert run(command, "out", tmp_path)[0] == 0
    (tmp_path / "out/plans/.tmp-0000-best_fit-512").mkdir(parents=True)  # of another running process
    files = sorted(tmp_path.glob("out/**/*"))
    (tmp_path / "out/report.html").rename(tmp_path / "out/.tmp-0000-report.html")
    assert run(command, "out", tmp_path)[0] == 0
    assert sorted(tmp_path.glob("out/**/*")) == files


def test_ctrl_c_reaches_only_the_parent_while_its_workers_start():
    """Workers start with the signal blocked, before any of their own code could ignore it."""
    with process_pool(1) as pool:
        inherited = result_of(submit(pool, signal.pthread_sigmask, (signal.SIG_BLOCK, ())))
    assert signal.SIGINT in inherited
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_lost_worker_is_one_message_and_its_work_is_done_on_rerun(command, tmp_path):
    process = start(command, "out", tmp_path)
    await_file(process, tmp_path / "out" / "tokenizer" / "tokenizer.json")
    deadline = time.monotonic() + 60
    while not (workers := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    errors = [line for line in err.splitlines() if line.startswith(("error", "Traceback"))]
    assert process.returncode == 2 and len(errors) == 1 and "a worker process was killed" in errors[0], err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(command, "out", tmp_path)[0] == run(command, "whole", tmp_path)[0] == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_second_process_is_refused_until_the_first_has_ended(command, tmp_path):
    first = start(command, "out", tmp_path)
    await_file(first, tmp_path / "out" / ".preparing" / "settings.json")
    os.kill(first.pid, signal.SIGSTOP)
    try:
        code, out, err = run(command, "out", tmp_path)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    assert (code, out) == (2, "")
    assert err.startswith("error: another process is preparing data in out;") and len(err.splitlines()) == 1
    assert (tmp_path / "out" / ".preparing" / "lock").exists(), "a lock left behind binds nobody"
    assert run(command, "out", tmp_path)[0] == 0
    PreparedData.open(tmp_path / "out", verify=True)


@pytest.fixture
def disk(tmp_path):
    """Return a function that mounts a small disk with the given options, or changes them."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        what = ["-o", f"remount,{options}"] if os.path.ismount(folder) else ["-t", "tmpfs", "-o", options, "none"]
        result = subprocess.run(["mount", *what, str(folder)], capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"no small disk can be mounted here (needs root): {result.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def test_an_array_that_does_not_fit_names_the_limit(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(WriteError, match="would exceed the size allowed here"), atomic_file(tmp_path / "a") as file:
            save_array(file, np.zeros(1 << 21, np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    with atomic_file(tmp_path / "array.npy") as file:
        save_array(file, np.arange(10)[::2])
        save_array(file, np.zeros(0))
    with open(tmp_path / "array.npy", "rb") as file:
        assert np.load(file).tolist() == [0, 2, 4, 6, 8] and np.load(file).tolist() == []


def test_a_full_disk_is_one_message_and_the_work_resumes_when_there_is_space(command, tmp_path, disk):
    assert run(command, "whole", tmp_path)[0] == 0
    for size in ("24k", "120k", "300k"):
        folder = disk(f"size={size}")
        code, out, err = run(command, folder / "out", tmp_path)
        assert (code, out) == (2, ""), err
        errors = [line for line in err.splitlines() if line.startswith(("error", "Traceback"))]
        assert len(errors) == 1 and "no space is left on the device" in errors[0], err
        assert not (folder / "out" / "manifest.json").exists()
        assert not list((folder / "out").rglob(".tmp-*"))
    disk("size=10m")
    assert run(command, folder / "out", tmp_path)[0] == 0
    assert hashes(folder / "out") == hashes(tmp_path / "whole")


def test_a_plan_that_does_not_fit_is_an_error_and_not_a_signal(disk):
    with pytest.raises(OSError, match="No space left"):
        _new(disk("size=24k") / "plan.npy", np.dtype("<i8"), 100_000)


def test_a_read_only_target_is_one_message(command, tmp_path, disk):
    folder = disk("size=1m,ro")
    code, out, err = run(command, folder / "out", tmp_path)
    assert (code, out, err) == (2, "", f"error: cannot write {folder / 'out'}: the file system is read-only; "
                                       "choose another folder\n")  # fmt: skip


def test_verify_names_the_damage(command, tmp_path):
    assert run(command, "out", tmp_path)[0] == 0
    shards = sorted(str(p.relative_to(tmp_path).with_suffix("")) for p in (tmp_path / "out").rglob("*.idx"))
    verify = [*command[:2], "verify", "--workers", "2"]
    code, out, err = run(verify, "out", tmp_path)
    assert (code, out) == (0, f"out: {len(shards)} shards, every byte as written\n")

    def flip(path):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1 << 3
        path.write_bytes(raw)

    flip(tmp_path / f"{shards[1]}.bin")
    code, out, err = run(verify, "out", tmp_path)
    assert (code, out) == (2, "")
    told = err[err.index("error:") :].splitlines()
    assert told[0].startswith(f"error: {shards[1]}.bin is damaged")
    assert told[1].startswith(f"1 of {len(shards)} shards is wrong")
    flip(tmp_path / f"{shards[1]}.bin")
    assert run(verify, "out", tmp_path)[0] == 0

    flip(tmp_path / f"{shards[0]}.idx")
    (tmp_path / f"{shards[-1]}.bin").unlink()
    code, out, err = run(verify, "out", tmp_path)
    assert code == 2
    told = err[err.index("error:") :].splitlines()
    assert [line.split(" is ")[0] for line in told[:2]] == [f"error: {shards[0]}.idx", f"{shards[-1]}.bin"]
    assert told[2].startswith(f"2 of {len(shards)} shards are wrong")
