"""The doctor finds problems, names remedies, and performs a real training run of two steps."""

import os
import subprocess
import sys
import time
from pathlib import Path

from data_pipeline.extras import how_to_install
from stlm.training import doctor

ROOT = Path(__file__).parents[2]


def test_healthy_machine_and_a_stale_lock(tmp_path):
    """One call: the training run succeeds, and a lock that a killed build left behind is still named."""
    lock = tmp_path / "cache" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "doctor.py"], cwd=tmp_path, capture_output=True, text=True, timeout=400,
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = {line.split()[1]: line.split()[0] for line in result.stdout.split("\n\n")[0].splitlines()}
    assert {name for name, status in rows.items() if status == "problem"} == {"stale"}, result.stdout
    assert {"python", "torch", "deepspeed", "processor", "precision", "compiler", "ninja", "mpi", "two"} <= set(rows)
    assert (
        f"problem: stale lock: whatever loads this operator hangs; if nothing is being built: rm {lock}"
        in result.stdout
    )
    assert "prepared, trained with ZeRO 2 and saved" in result.stdout
    assert result.returncode == 2
    assert not list(tmp_path.glob("runs*")) and not list(tmp_path.glob("data*"))


def test_a_young_lock_is_a_build_at_work(tmp_path):
    (tmp_path / "fused_adam").mkdir()
    (tmp_path / "fused_adam" / "lock").touch()
    (tmp_path / "fused_adam" / "fused_adam.so").touch()
    (finding,) = doctor.check_operator_cache(tmp_path)
    assert finding.status == "ok" and "fused_adam in" in finding.found


def test_packages_that_are_missing_or_other_than_tested(tmp_path, monkeypatch):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(
        '# pins\ntorch==2.13.0\nnumpy==2.4.6 ; python_version >= "3.11"\nnumpy==2.2.6\nPyYAML==6.0.3\n'
    )
    tested = doctor.tested_versions(constraints)
    assert tested == {"torch": {"2.13.0"}, "numpy": {"2.4.6", "2.2.6"}, "pyyaml": {"6.0.3"}}

    installed = {"torch": "2.13.0+cpu", "numpy": "2.2.6", "pyyaml": "6.0.2"}

    def version(name):
        if name not in installed:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "numpy", "pyyaml", "tqdm"))
    findings = list(doctor.check_packages(tested | {"tqdm": {"4"}}))
    assert [finding.status for finding in findings] == ["ok", "ok", "note", "problem"]
    assert findings[2].advice.startswith("tested with 6.0.3: ")
    assert findings[3].advice == how_to_install("tqdm")


def test_every_package_is_pinned():
    assert set(doctor.PACKAGES) <= set(doctor.tested_versions(ROOT / "constraints.txt"))


def test_a_command_that_fails_is_quoted(monkeypatch, tmp_path):
    failure = doctor.run_command(
        [sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"], tmp_path
    )
    assert failure == "exit code 3; the last lines were\nthe reason"
    assert doctor.run_command([sys.executable, "-c", ""], tmp_path) == ""
    monkeypatch.setattr(doctor, "TRAINING_LIMIT_S", 0.2)
    assert "no end after" in doctor.run_command([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path)
