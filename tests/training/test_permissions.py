"""Permissions of written files follow the umask, whatever temporary name they had before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny_run import train

from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.storage.atomic import atomic_directory, current_umask
from stlm.export.conversion import convert_to
from stlm.training.deepspeed.formats import write_deepspeed
from stlm.training.distributed.connection import Distributed


@pytest.fixture(params=[0o022, 0o077, 0o002])
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def others(folder: Path, mask: int) -> list[str]:
    """Return the files without the permissions that a plain `open` or `mkdir` gives."""
    found = []
    for path in [folder, *folder.rglob("*")]:
        executable = path.is_dir() or path.name.startswith("zero_to_")  # programs of DeepSpeed's
        expected = (0o777 if executable else 0o666) & ~mask
        if path.stat().st_mode & 0o777 != expected:
            found.append(f"{path.relative_to(folder)}: {path.stat().st_mode & 0o777:o}, expected {expected:o}")
    return found


def test_data_runs_and_exports_follow_the_umask(mask, make_trainer, data_dir, tmp_path):
    assert current_umask() == mask
    text = tmp_path / "text"
    text.mkdir()
    for name in ("a.txt", "b.txt"):
        (text / name).write_text(" ".join(["the cat sat on the mat"] * 100 + [name]))
    prepare(PrepareConfig((str(text),), output=str(tmp_path / "data"), workers=1, validation_fraction=0.5))
    assert others(tmp_path / "data", mask) == []

    train(make_trainer(tmp_path / "run", "training.max_steps=2", stage=2))
    assert (tmp_path / "run/checkpoints/step_00000002/model/model.safetensors").is_file()
    assert others(tmp_path / "run", mask) == []

    convert_to("safetensors", tmp_path / "run", tmp_path / "model")
    assert others(tmp_path / "model", mask) == []
    write_deepspeed(
        "deepspeed", tmp_path / "run", tmp_path / "deepspeed", {"zero_optimization": {"stage": 2}}, Distributed.join()
    )
    assert others(tmp_path / "deepspeed", mask) == []


def test_a_folder_keeps_its_inherited_group(tmp_path):
    """The folder's files belong to its group."""
    (tmp_path / "shared").mkdir()
    os.chmod(tmp_path / "shared", 0o2775)
    with atomic_directory(tmp_path / "shared/new") as folder:
        (folder / "inner").mkdir(mode=0o700)
        (folder / "run.sh").touch(mode=0o700)
        shutil.copy(__file__, folder / "inner")
    assert (tmp_path / "shared/new").stat().st_mode & 0o2000
    assert (tmp_path / "shared/new/run.sh").stat().st_mode & 0o777 == 0o777 & ~current_umask()
