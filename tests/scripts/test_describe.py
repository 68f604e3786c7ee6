"""describe.py describes presets and runs, and reports errors in one line."""

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from data_pipeline.loading.loaders import open_data
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation.pipeline import PrepareConfig, prepare
from stlm.config import dump_run_config, list_presets, load_run_config
from stlm.stlm import STLM
from stlm.training.loaders import build_loaders

ROOT = Path(__file__).parents[2]
TINY = ["model={context_length: 32, width: 32, core: {num_layers: 1, attention: {num_heads: 2}}}",
        "training={batch_size: 4, max_steps: 9, warmup_steps: 1}"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Make a run of two saved steps on prepared data, as far as describe.py reads it."""
    folder = tmp_path_factory.mktemp("described")
    (folder / "text.txt").write_text("\n<eos>\n".join(f"Line {n} of a text, {n % 7} words long." for n in range(200)))
    config = PrepareConfig(inputs=(str(folder / "text.txt"),), output=str(folder / "data"), workers=1)
    prepare(dataclasses.replace(config, validation_fraction=0.1))
    config = load_run_config("quickstart", [*TINY, f"data.dir={folder / 'data'}"])
    checkpoint = folder / "run" / "checkpoints" / "step_00000002"
    STLM.from_config(config.model, PreparedData.open(folder / "data").tokenizer).save(checkpoint / "model")
    (checkpoint / "state.json").write_text(json.dumps({"step": 2, "bytes_seen": 256}))
    (checkpoint / "COMPLETE").write_text('{"files": {}}')
    (folder / "run" / "config.yaml").write_text(dump_run_config(config))
    records = [
        {"step": 2, "split": "train", "bits_per_byte": 7.5},
        {"step": 2, "split": "recovery", "skipped": 3, "rollbacks": 1},
    ]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "run"


@pytest.fixture
def describe(monkeypatch, capsys):
    """Return a function that runs the script in this process and returns its output, or the expected error."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run_script(*arguments, expect=0):
        monkeypatch.setattr(sys, "argv", ["describe.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / "scripts" / "describe.py"), run_name="__main__")
        captured = capsys.readouterr()
        assert ending.value.code == expect, captured.err
        return captured.err if expect else captured.out

    return run_script


def test_a_run_in_json_and_in_words(run, describe):
    facts = json.loads(describe(run, "--json", "--set", "model.core.num_layers=2"))
    assert facts["parameters"] == 256 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 96 + 2 * 32) + 32
    assert facts["run"]["step"] == 2 and facts["run"]["checkpoints"] == [2]
    text = describe(run, "--ranks", "1")
    assert "step 2 of 9, 256 bytes read; checkpoints of steps 2" in text
    assert "steps without an update: 3; returns to a checkpoint: 1" in text
    assert "train: 7.5000 bits per byte at step 2" in text and "ZeRO 3" in text


def test_help_lists_the_presets(describe):
    assert list_presets() in describe("--help")


def test_the_share_of_time_of_each_phase(run, describe):
    """Figures come from the newest record that has them."""
    before = describe(run)
    assert "(MFU)" not in before and "before clipping" not in before
    path = run / "metrics.jsonl"
    kept = path.read_text()
    timing = {
        "bytes_per_second": 12_300.0, "seconds_per_step": 0.5, "phases": {"data": 0.125, "forward": 0.375},
        "flops_per_second": 2e9, "mfu": 0.25, "slowest_rank": {"rank": 3, "seconds_per_step": 0.25},
        "memory_bytes": 70_000_000, "joules_per_step": 21.0, "joules_per_megabyte": 4200.0,
    }  # fmt: skip
    record = {"step": 3, "split": "train", "bits_per_byte": 7.0, "gradient_norm": 5.0, "timing": timing}
    record["gradient_norm_of"] = {"embedder": 3.0, "core.stack.blocks.0": 4.0}
    path.write_text(kept + json.dumps(record) + '\n{"step": 4, "spl')  # a record that is still being written
    lines = [" ".join(line.split()) for line in describe(run).splitlines()]
    path.write_text(kept)
    for expected in (
        "up to step 3 ms share", "data 125.00 25.0%", "forward 375.00 75.0%", "a step 500.00 100.0%",
        "12.3 kB/s; 2.0 GFLOP/s, 25.0% of the measured peak (MFU)",
        "the others wait for rank 3: 250.00 ms a step without communication",
        "largest memory of a rank so far: 70.0 MB", "energy: 21.0 J a step, 4,200 J/MB",
        "gradient before clipping norm share", "embedder 3.0000 36.0%", "core.stack.blocks.0 4.0000 64.0%",
        "all 5.0000 100.0%",
    ):  # fmt: skip
        assert expected in lines


def test_the_text_of_a_step(run, describe):
    config = load_run_config(run)
    data = open_data(config.data)
    ids = build_loaders(config, data).train.rows(3, 1, 3).ids
    lines = describe(run, "--step", "3", "--rows", "1-2").splitlines()
    assert lines == [f"{row}  32 ids  {data.tokenizer.decode(ids[row - 1])!r}" for row in (1, 2)]


def test_the_text_of_a_step_of_a_run_whose_batch_size_changed(run, describe, tmp_path):
    """Step 1 had two rows, so step 3 begins at row 6 of the order."""
    shutil.copytree(run, tmp_path / "run")
    state = {"step": 2, "bytes_seen": 256, "batch_sizes": [[0, 2], [1, 4]]}
    (tmp_path / "run/checkpoints/step_00000002/state.json").write_text(json.dumps(state))
    assert len(describe(tmp_path / "run", "--step", "1").splitlines()) == 2
    changed = describe(tmp_path / "run", "--step", "3", "--rows", "2-3").splitlines()
    unchanged = describe(run, "--step", "3", "--rows", "0-1").splitlines()  # rows 8 and 9
    assert [line[1:] for line in changed] == [line[1:] for line in unchanged]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["10m-bite"], "nearest: 10m-byte"),
        (["RUN", "--step", "10"], "--step: got 10, expected a step of the run, 1 to 9"),
        (["RUN", "--step", "3", "--rows", "2-4"], "--rows: got '2-4', expected rows of a step within 0-3"),
        (["EMPTY"], "without a complete checkpoint"),
    ],
)
def test_user_errors_are_one_message(run, describe, tmp_path, arguments, message):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    places = {"RUN": run, "EMPTY": tmp_path}
    error = describe(*(places.get(argument, argument) for argument in arguments), expect=2)
    first, *rest = error.splitlines()
    assert message in first and rest == (list_presets().splitlines() if "bite" in first else [])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "0-1"], "--rows: got 0-1 without --step S"),
        (["--step", "3", "--json"], "--json: no effect with --step"),
        (["--step", "3", "--ranks", "2"], "--ranks: no effect with --step"),
    ],
)
def test_options_without_effect_are_refused(run, describe, arguments, message):
    assert message in describe(run, *arguments, expect=2)


def test_a_run_is_described_for_the_ranks_that_it_has(run, describe, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    assert "MB of each of 2 ranks" in describe(tmp_path / "run")  # the record does not state them
    (tmp_path / "run/environment.json").write_text('{"starts": [{"ranks": 4}, {"ranks": 1}]}')
    assert "MB of one rank" in describe(tmp_path / "run")
    assert "MB of each of 3 ranks" in describe(tmp_path / "run", "--ranks", "3", "--set", "training.batch_size=6")
