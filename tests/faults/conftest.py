"""A tiny run on two ranks: its command, its data, and its uninterrupted result."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from launchpad import ROOT, Launchpad
from matrix import LOST, SAME, Fault, metrics_of

from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare

CONFIG = """
model:
  context_length: 32
  width: 32
  embedder: {kind: byte}
  core: {kind: transformer, num_layers: 1, attention: {num_heads: 2}}
  head: {kind: linear}
training:
  max_steps: 12
  batch_size: 8
  learning_rate: 3e-3
  warmup_steps: 3
  precision: fp32
  log_every_steps: 1
  eval_every_steps: 6
  save_every_steps: 4
"""


@pytest.fixture(scope="session")
def launchpad(tmp_path_factory):
    pad = Launchpad(tmp_path_factory.mktemp("launchpad"))
    yield pad
    pad.close()


class Stage:
    """Runs at one ZeRO stage: an uninterrupted one to compare with, and a stopped one from which faults start."""

    def __init__(self, launchpad: Launchpad, folder: Path, stage: int) -> None:
        self._launchpad = launchpad
        self._folder = folder
        self._stage = stage
        self.data = folder / "data"
        (folder / "tiny.yaml").write_text(CONFIG)
        draw = random.Random(5)
        words = ["the", "cat", "sat", "on", "a", "mat", "and", "thought", "of", "naïve", "fish"]
        texts = [" ".join(draw.choices(words, k=draw.randrange(5, 60))) for _ in range(80)]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare(PrepareConfig((str(folder / "text.jsonl"),), output=str(self.data), workers=1, validation_fraction=0.1))
        self.undisturbed, self.interrupted = folder / "undisturbed", folder / "interrupted"
        assert self._run(self.undisturbed, self.data).codes() == [0, 0]
        assert self._run(self.interrupted, self.data, fault="terminate_rank_1").codes() == [3, 3]

    def _run(self, run_dir, data, *settings, ranks=2, fault=None):
        arguments = [
            "--ds_config", str(ROOT / f"ds_configs/zero{self._stage}.json"),
            "--config", str(self._folder / "tiny.yaml"), "--data", str(data), "--run", str(run_dir), *settings,
        ]  # fmt: skip
        return self._launchpad.run(arguments, ranks, fault)

    def suffer(self, fault: Fault, folder: Path) -> None:
        """Put a run through a fault; fail if its outcome differs from the promise in the matrix."""
        run_dir, data = folder / "run", folder / "data"
        shutil.copytree(self.data, data)
        if fault.damage is not None:
            shutil.copytree(self.interrupted, run_dir)
            fault.damage(run_dir, data)
        run = self._run(run_dir, data, *fault.settings, fault=fault.inject)
        output = run.output()
        codes = run.codes()
        assert (tuple(codes) if codes is not None else (LOST,)) in fault.codes, f"{codes}\n{output}"
        assert re.search(fault.says, output), output
        for stacks in re.findall(r"stacks in (\S+)", output):
            assert "pretrain.py" in Path(stacks).read_text()
        if fault.codes != ((0, 0),):
            if fault.restore_data:
                shutil.rmtree(data)
                shutil.copytree(self.data, data)
            run = self._run(run_dir, data, *fault.settings, ranks=fault.ranks_after)
            assert run.codes() == [0] * fault.ranks_after, run.output()
        self._compare(fault, run_dir)

    def _compare(self, fault: Fault, run_dir: Path) -> None:
        last = "checkpoints/step_00000012"
        found, expected = metrics_of(run_dir), metrics_of(self.undisturbed)
        if fault.ends_as == SAME:
            assert found == expected
            weights = f"{last}/model/model.safetensors"
            assert (run_dir / weights).read_bytes() == (self.undisturbed / weights).read_bytes()
        elif fault.ranks_after == 1:
            assert [record["loss"] for record in found] == pytest.approx([r["loss"] for r in expected], abs=1e-5)
        else:  # until it happened and was reported
            untouched = [record for record in expected if record["step"] < 6]
            assert found[: len(untouched)] == untouched
            assert any(record["split"] == "recovery" for record in found)
        assert (run_dir / last / "COMPLETE").is_file()


@pytest.fixture(scope="module")
def stage(request, launchpad, tmp_path_factory):
    return Stage(launchpad, tmp_path_factory.mktemp(f"zero{request.module.STAGE}"), request.module.STAGE)
