"""The volume of messages between ranks in a step."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from tiny_run import update

REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter_tensor")  # messages of gradients; others carry weights


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_travel_once_a_step(make_trainer, tmp_path, monkeypatch, stage):
    """Four micro-batches send no more messages than one, and none before the last backward pass."""
    calls: list[str] = []
    for name in REDUCTIONS:
        monkeypatch.setattr(dist, name, counted(name, calls))
    messages = []
    for micro_batch_size in ("null", "2"):
        settings = f"training.micro_batch_size={micro_batch_size}"
        trainer = make_trainer(tmp_path / micro_batch_size, settings, stage=stage)
        trainer.engine.native.enable_backward_allreduce = True  # off at stage 0, where a rank is alone
        backward, before_the_last = trainer.engine.backward, []

        def noting(loss, last, backward=backward, before_the_last=before_the_last):
            before_the_last.append(len(calls))
            backward(loss, last)

        monkeypatch.setattr(trainer.engine, "backward", noting)
        update(trainer)
        calls.clear()
        before_the_last.clear()
        update(trainer)
        assert before_the_last[-1] == 0, calls
        messages.append(list(calls))
    assert messages[0] == messages[1] != []


def counted(name, calls):
    function = getattr(dist, name)

    def call(*arguments, **options):
        calls.append(name)
        return function(*arguments, **options)

    return call
