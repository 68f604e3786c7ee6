"""Tasks during training: the results of evaluate.py on the checkpoint of that step, and unaffected losses."""

from __future__ import annotations

import json

import pytest
from tiny_run import read_metrics, train

from stlm.checkpoints import checkpoints_of
from stlm.errors import StlmError
from stlm.evals import LoadedTask, Options, Subject, load_tasks
from stlm.evals.items.reading import sample_items
from stlm.evals.live import scalars

TASKS = "bits_per_byte,hellaswag,blimp"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Return settings that run tasks every four steps, some items longer than the context, and the folder of items."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = [["the cat sat on a mat", "tac eht"], ["of fish", "of cats, and of " + "many " * 20 + "others"]]
    items = [{"id": str(n), "context": f"The {n}th", "choices": choices[n % 3 == 0], "answer": n % 2} for n in range(9)]
    (folder / "hellaswag.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    pairs = [
        {"sentence_good": f"{n} cats sit.", "sentence_bad": f"{n} cats sits.", "UID": f"paradigm_{n % 2}",
         "linguistics_term": "agreement", "pairID": str(n)} for n in range(8)
    ]  # fmt: skip
    (folder / "blimp.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return [f"evals.tasks={TASKS}", f"evals.tasks_dir={folder}", "evals.every_steps=4", "evals.at_start=true",
            "training.save_every_steps=4",
            "training.keep_last=9"], folder  # fmt: skip


def expected(run_dir, data_dir, tasks_dir):
    """Return the results of evaluate.py by step, for each checkpoint."""
    tasks = load_tasks(TASKS, Options(tasks_dir))
    found = {}
    for checkpoint in checkpoints_of(run_dir):
        subject = Subject.open(checkpoint, data_dir)
        found[subject.progress["step"]] = {name: scalars(task(subject).values) for name, task in tasks.items()}
    return found


def told(run_dir):
    records = read_metrics(run_dir, "evals")
    return {record["step"]: {name: record[name] for name in TASKS.split(",")} for record in records}


@pytest.mark.parametrize(("stage", "more"), [(0, []), (2, ["training.ema_decay=0.9"]), (3, [])])
def test_scores_equal_those_of_checkpoints_and_losses_are_unaffected(
    make_trainer, tmp_path, data_dir, settings, stage, more
):
    asked, tasks_dir = settings
    losses = train(make_trainer(tmp_path / "asked", *asked, *more, stage=stage))
    scores = told(tmp_path / "asked")
    assert list(scores) == [0, 4, 8, 12]
    before = scores.pop(0)
    assert before["bits_per_byte"]["bits_per_byte"] > 7 and before["blimp"]["paradigm"].keys() == {
        "paradigm_0",
        "paradigm_1",
    }
    assert scores == expected(tmp_path / "asked", data_dir, tasks_dir)
    assert len({score["blimp"]["truth_probability"] for score in scores.values()}) == 3  # the model of that step
    assert losses == train(make_trainer(tmp_path / "alone", *more, stage=stage))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_share_the_items(pretrain, tmp_path, data_dir, settings, stage):
    asked, tasks_dir = settings
    output = pretrain(tmp_path / "run", "--set", *asked, ranks=2, stage=stage)
    scores = told(tmp_path / "run")
    del scores[0]
    for step, tasks in expected(tmp_path / "run", data_dir, tasks_dir).items():
        for name, values in tasks.items():
            for key, value in values.items():
                assert scores[step][name][key] == pytest.approx(value, rel=1e-6), (step, name, key)
    assert output.count("hellaswag ") == 4
    pretrain(tmp_path / "alone", ranks=2, stage=stage)
    assert read_metrics(tmp_path / "run", "train") == read_metrics(tmp_path / "alone", "train")


def test_a_restarted_run_evaluates_its_start_once(make_trainer, tmp_path, settings):
    for until in (1, 2):
        train(make_trainer(tmp_path / "run", *settings[0]), until)
    assert [record["step"] for record in read_metrics(tmp_path / "run", "evals")] == [0]


def test_a_sample_of_items_is_fixed_and_stated(make_trainer, tmp_path, settings, capsys):
    """Nothing runs before the first step unless requested, and the cost of the first evaluation is printed."""
    folder = settings[1]
    asked = (f"evals.tasks_dir={folder}", "evals.every_steps=6", "evals.tasks=hellaswag,blimp", "evals.items=4")
    train(make_trainer(tmp_path / "run", *asked))
    records = read_metrics(tmp_path / "run", "evals")
    assert [record["step"] for record in records] == [6, 12]
    assert [(record["blimp"]["items"], record["blimp"]["sampled_from"]) for record in records] == [(4, 8)] * 2
    printed = capsys.readouterr().out
    assert printed.count("(4 of 9 items)") == printed.count("(4 of 8 items)") == 2
    assert printed.count("with evals.every_steps = 6 that is done once more") == 1

    items = LoadedTask.read("hellaswag", folder, 0).items
    chosen = sample_items(items, 4)
    assert sorted(sample_items(items[::-1], 4), key=items.index) == chosen
    assert all(item in sample_items(items, 6) for item in chosen)
    assert sample_items(items, None) == sample_items(items, 99) == items


def test_invalid_tasks_are_refused_before_training(make_trainer, tmp_path):
    with pytest.raises(StlmError, match=r"evals\.tasks: got 'minimal_pears' \(nearest: minimal_pairs\)"):
        make_trainer(tmp_path / "run", "evals.tasks=minimal_pears", "evals.every_steps=4")
