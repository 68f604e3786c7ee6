"""Spikes and numbers that are not finite: skipped steps, returns to a checkpoint, and the same after a stop."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from test_training import Explosive
from tiny_run import read_metrics, train, update

from stlm.checkpoints import checkpoints_of, step_of
from stlm.config import RunConfig, from_dict
from stlm.config.schema import RecoveryConfig
from stlm.errors import NonFinite, Stopped
from stlm.training.deepspeed.state_transfer import full_state
from stlm.training.recovery import Recovery, nan_gradient_unless_finite

NAN, INF = float("nan"), float("inf")
EVERY_TWO = ("training.save_every_steps=2", "training.eval_every_steps=100", "training.keep_last=9")


def spoil(trainer, steps, kind):
    """Make the loss or gradient of some steps infinite, or the loss high, from outside the trainer."""
    forward, where = trainer.engine.forward, {}
    rows = trainer.train_loader.rows

    def watched_rows(step, first, last):
        where["step"] = step
        return rows(step, first, last)

    def spoilt_forward(*inputs, **named):
        output = forward(*inputs, **named)
        if where.get("step") not in steps or not torch.is_grad_enabled():
            return output
        logits = output.logits
        spoilt = {"loss": logits * torch.nan, "gradient": Explosive.apply(logits), "spike": logits * -50}[kind]
        return output._replace(logits=spoilt)

    trainer.train_loader.rows, trainer.engine.forward = watched_rows, spoilt_forward
    return trainer


def train_until_asked(trainer, step=None):
    """Run the short loop; after `step`, request a stop of this process, which saves a checkpoint."""
    try:
        for number in trainer.steps():
            trainer.log(number, trainer.train_step(number))
            trainer.val_step()
            trainer.save_checkpoint(number)
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
    except Stopped:
        assert trainer.step == step


def state_of(trainer):
    return full_state(trainer.engine).parameters


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ([2, NAN, 2, INF, NAN, 2], [0, 0, 0, 0, 0, 0]),  # two in a row are allowed
        ([2, NAN, INF, NAN, NAN, 2], [0, 0, 0, 1, 0, 0]),
        ([4, 2, 3, 5, 5, 3, 5, 5, 5, 3], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]),  # above 1.5 * 3, three in a row
        ([4, 5, 5, 5, 8, 8, 8], [0, 0, 0, 0, 0, 0, 1]),  # the window is full after three: 5 is its median
    ],
)
def test_conditions_for_returning_to_a_checkpoint(figures, expected):
    recovery = Recovery(RecoveryConfig(2, 9, spike_factor=1.5, spike_steps=3, spike_window=3))
    found = []
    for step, figure in enumerate(figures, start=1):
        recovery = Recovery(RecoveryConfig(2, 9, 1.5, 3, 3), json.loads(json.dumps(recovery.state())))
        found.append(recovery.judge(step, figure, 1.0))
        if found[-1]:
            recovery.rolled_back(0)
    assert found == [bool(each) for each in expected]
    assert recovery.skipped == sum(figure != figure or figure == INF for figure in figures)


def test_a_second_return_goes_further_back():
    recovery = Recovery(RecoveryConfig(max_skipped_in_a_row=0, max_rollbacks=2))
    assert recovery.judge(7, NAN, 1.0) and recovery.since == 7
    recovery.rolled_back(4)
    assert recovery.judge(8, 1.0, INF) and recovery.since == 4 and recovery.may_roll_back
    recovery.rolled_back(2)
    assert not recovery.judge(9, 1.0, 1.0) and recovery.since is None and not recovery.may_roll_back


def test_a_loss_is_spoilt_only_if_it_is_not_finite():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    for value, finite in ((0.1, True), (INF, False)):
        loss = nan_gradient_unless_finite(weight[0] * 0.3 + torch.tensor(value))
        (gradient,) = torch.autograd.grad(loss, weight)
        assert torch.equal(gradient, torch.tensor([0.3, 0.0])) == finite
        assert bool(gradient.isnan().any()) != finite


@pytest.mark.parametrize(("stage", "kind"), [(0, "loss"), (1, "gradient"), (2, "loss"), (3, "gradient")])
def test_a_skipped_step_changes_nothing_and_counts(make_trainer, tmp_path, stage, kind):
    """The next step has the next rows and the next learning rate; an interrupted run gives the same."""
    whole = spoil(make_trainer(tmp_path / "whole", *EVERY_TWO, stage=stage), {5, 6, 8}, kind)
    for step in range(1, 13):
        before = state_of(whole) if step in (5, 6) else {}
        loss = update(whole)
        whole.log(step, loss)
        if step in (5, 6, 8):
            assert (loss == loss) == (kind == "gradient")
        after = state_of(whole) if before else {}
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    whole.save_checkpoint(12)
    whole.val_step()
    for until in (6, None):  # step 6, where it stops, is one of those
        part = spoil(make_trainer(tmp_path / "parts", *EVERY_TWO, stage=stage), {5, 6, 8}, kind)
        train(part, until)
    assert part.recovery.state() == whole.recovery.state()
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    assert [record["step"] for record in read_metrics(tmp_path / "whole", "recovery")] == [5, 6, 8]
    assert [record["step"] for record in read_metrics(tmp_path / "whole", "train")] == [1, 2, 3, 4, 7, 9, 10, 11, 12]


@pytest.mark.parametrize("stage", [0, 3])
def test_too_many_in_a_row_lead_back_to_a_checkpoint(make_trainer, tmp_path, stage):
    """Weights and moments return to step 4, the data continue at step 9."""
    overrides = (*EVERY_TWO, "training.recovery.max_skipped_in_a_row=2")
    trainer = spoil(make_trainer(tmp_path / "run", *overrides, stage=stage), {6, 7, 8}, "loss")
    train(trainer, until=4)
    at_four, ids_seen = full_state(trainer.engine), trainer.progress.ids_seen
    trainer = spoil(make_trainer(tmp_path / "run", *overrides, stage=stage), {6, 7, 8}, "loss")
    losses = train(trainer, until=8)
    assert (trainer.step, trainer.progress.ids_seen, trainer.recovery.rollbacks, len(losses)) == (8, ids_seen, 1, 4)
    found = full_state(trainer.engine)
    assert found.updates == at_four.updates == 4
    for name, tensor in at_four.parameters.items():
        assert torch.equal(tensor, found.parameters[name])
        assert torch.equal(at_four.moments["exp_avg"][name], found.moments["exp_avg"][name])
    assert (
        "going back to the weights of step 4, and on with the data after step 8 (rollback 1 of at most 2)"
        in (tmp_path / "run/train.log").read_text()
    )


def test_a_spike_leads_back_and_a_stopped_run_does_the_same(make_trainer, tmp_path):
    overrides = (
        *EVERY_TWO, "training.recovery.spike_factor=1.3", "training.recovery.spike_steps=2",
        "training.recovery.spike_window=3", "training.recovery.max_rollbacks=1",
    )  # fmt: skip

    def build(name):
        return spoil(make_trainer(tmp_path / name, *overrides), {7, 8, 9}, "spike")

    whole = build("whole")
    train(whole)
    assert whole.recovery.rollbacks == 1
    (record,) = read_metrics(tmp_path / "whole", "recovery")
    assert record["step"] == 8
    for until in (7, 9, None):
        train(build("parts"), until)
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["spike", "loss"])
def test_an_interrupted_run_returns_to_the_same_checkpoint(make_trainer, tmp_path, kind):
    """Both return to the same scheduled checkpoint: those of interruptions neither serve as such nor replace others."""
    overrides = (
        "training.save_every_steps=3", "training.eval_every_steps=4", "training.keep_last=2",
        "training.recovery.spike_factor=1.3", "training.recovery.spike_steps=2", "training.recovery.spike_window=3",
        "training.recovery.max_skipped_in_a_row=1",
    )  # fmt: skip
    runs = {"whole": (None,), "parts": (4, 5, 7, 8, 10, None)}  # 8 and 9 go wrong: both go back to step 6
    for name, stops in runs.items():
        for stop in stops:
            trainer = make_trainer(tmp_path / name, *overrides)
            train_until_asked(spoil(trainer, {8, 9}, kind), stop)
            if stop == 8:
                kept = [step_of(path) for path in checkpoints_of(tmp_path / name)]
                assert kept == [8, 7, 6, 3]  # two of interruptions in addition to the two that are always kept
        assert trainer.recovery.rollbacks == 1
        assert "going back to the weights of step 6" in (tmp_path / name / "train.log").read_text()
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    whole, parts = (checkpoints_of(tmp_path / name) for name in ("whole", "parts"))
    assert [path.name for path in whole] == [path.name for path in parts]
    for one, other in zip(whole, parts, strict=True):
        assert (one / "COMPLETE").read_bytes() == (other / "COMPLETE").read_bytes()


def test_a_run_stops_after_the_permitted_returns(make_trainer, tmp_path):
    overrides = (*EVERY_TWO, "training.recovery.max_skipped_in_a_row=1", "training.recovery.max_rollbacks=1")
    trainer = spoil(make_trainer(tmp_path / "run", *overrides), set(range(5, 13)), "gradient")
    with pytest.raises(NonFinite, match=r"gradient of step 8 is not finite \(rows 0-7 of its batch\)") as caught:
        train(trainer)
    assert "no update was made in 4 steps, and after going back 1 time nothing is left to try" in str(caught.value)
    assert f"python scripts/describe.py {tmp_path / 'run'} --step 8" in str(caught.value)


def test_configs_are_read():
    recovery = from_dict(RunConfig, {"training": {"recovery": {"spike_factor": 2.0}}}).training.recovery
    assert recovery == RecoveryConfig(spike_factor=2.0)
