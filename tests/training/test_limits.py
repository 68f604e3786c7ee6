"""Runs limited by ids, bytes or time: the step, the schedule, and the same after a stop."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from tiny_run import read_metrics, train

from stlm.config import TrainingConfig
from stlm.config.schema import LimitsConfig
from stlm.training.optim.limits import used_up
from stlm.training.optim.schedules import learning_rate_at
from stlm.training.run.run_directory import is_finished

MANY = ("training.max_steps=1000", "training.save_every_steps=3", "training.log_every_steps=1")


def test_the_closest_limit_ends_the_run():
    training = TrainingConfig(max_steps=10, limits=LimitsConfig(ids=100, bytes=90, wall_time_s=5.0))
    assert used_up(training, 0, 0, 0, 0.0) == 0.1  # no limit has a rate yet
    assert used_up(training, 4, 40, 20, 1.0) == 0.5
    assert used_up(training, 4, 56, 20, 1.0) == 0.7
    assert used_up(training, 4, 40, 72, 1.0) == 1.0  # the next step is the last
    assert used_up(training, 4, 40, 20, 4.4) == pytest.approx(1.1)
    assert used_up(training, 10, 0, 0, 0.0) > 1


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_schedule_ends_with_the_limit(schedule):
    """At a tenth of 1,000 steps: the decay follows the limit, the warm-up counts steps."""
    training = TrainingConfig(max_steps=1000, warmup_steps=20, schedule=schedule, decay_steps=200 * (schedule == "wsd"))
    rates = [learning_rate_at(step, training, step / 100) for step in range(1, 101)]
    assert rates[:15] == [learning_rate_at(step, training) for step in range(1, 16)]
    assert rates[-1] == learning_rate_at(1000, training) == pytest.approx(1e-4)
    assert rates[49] == learning_rate_at(500, training)
    assert all(later <= earlier for earlier, later in pairwise(rates[20:]))


@pytest.mark.parametrize("limit", ["ids=1800", "bytes=1750"])
def test_a_run_ends_at_a_limit_of_ids_or_bytes(make_trainer, tmp_path, limit):
    """The last step is reported, validated and saved as such; a resumed run ends like an uninterrupted one."""
    overrides = (*MANY, f"training.limits.{limit}")
    whole = make_trainer(tmp_path / "whole", *overrides)
    train(whole)
    last = whole.step
    size, allowed = limit.split("=")
    seen = getattr(whole.progress, f"{size}_seen")
    assert seen <= int(allowed) + 5 < seen * (last + 1) / last + 5
    metrics = read_metrics(tmp_path / "whole")
    assert [r["step"] for r in metrics if r["split"] == "validation"] == sorted({6, last})
    assert metrics[-2]["learning_rate"] < 0.15 * 3e-3
    assert is_finished(tmp_path / "whole")

    train(make_trainer(tmp_path / "parts", *overrides), until=4)
    assert not is_finished(tmp_path / "parts")
    train(make_trainer(tmp_path / "parts", *overrides))
    assert read_metrics(tmp_path / "parts") == metrics
    assert train(make_trainer(tmp_path / "whole", *overrides)) == []
    assert len(train(make_trainer(tmp_path / "whole", *MANY, "training.max_steps=9"))) == 9 - last


def test_a_run_ends_at_a_time_limit(make_trainer, tmp_path, monkeypatch):
    """A step takes 0.1 s; the time of an earlier start counts."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def build():
        trainer = make_trainer(tmp_path / "run", *MANY, "training.limits.wall_time_s=2.05")
        make_step = trainer.train_step

        def train_step(step):
            now[0] += 0.1
            return make_step(step)

        trainer.train_step = train_step
        return trainer

    train(build(), until=6)
    now[0] += 1000  # no training in this time
    trainer = build()
    assert (trainer.step, trainer.progress.seconds) == (6, pytest.approx(0.5))  # as known when step 6 began
    train(trainer)
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "run", "train")]
    assert 19 <= trainer.step <= 22 and is_finished(tmp_path / "run")
    assert rates[-1] < 0.15 * max(rates)
    assert [record["step"] for record in read_metrics(tmp_path / "run", "validation")][-1] == trainer.step
