"""Learning rates, compared with numbers worked out by hand; both ends are exact."""

from __future__ import annotations

import math

import pytest

from stlm.config import TrainingConfig
from stlm.training import learning_rate_at

PEAK = 3e-3


def rates(max_steps, **settings):
    training = TrainingConfig(learning_rate=PEAK, max_steps=max_steps, **settings)
    return [learning_rate_at(step, training) for step in range(1, max_steps + 1)]


def test_cosine():
    found = rates(12, warmup_steps=4, final_learning_rate_fraction=0.1, schedule="cosine")
    assert found[:4] == [PEAK * 1 / 4, PEAK * 2 / 4, PEAK * 3 / 4, PEAK]
    assert math.isclose(found[7], PEAK * 0.55)  # half-way: the mean of 1 and 0.1
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert math.isclose(found[5], PEAK * quarter)
    assert found[11] == PEAK * 0.1
    assert found[3:] == sorted(found[3:], reverse=True)


def test_wsd():
    found = rates(10, warmup_steps=2, decay_steps=4, final_learning_rate_fraction=0.2, schedule="wsd")
    assert found[:6] == [PEAK / 2] + [PEAK] * 5
    assert found[6:9] == pytest.approx([PEAK * 0.8, PEAK * 0.6, PEAK * 0.4])
    assert found[9] == PEAK * 0.2


def test_constant():
    assert rates(5, warmup_steps=2, schedule="constant") == [PEAK / 2] + [PEAK] * 4


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_first_steps_of_a_run_may_be_tried_alone(schedule):
    whole = rates(500, warmup_steps=100, schedule=schedule)
    assert rates(20, warmup_steps=100, schedule=schedule) == whole[:20]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_no_step_is_wasted_and_the_edges_hold(schedule):
    decay = {"decay_steps": 1} if schedule == "wsd" else {}
    for max_steps, warmup in [(1, 0), (2, 0), (2, 1), (50, 0), (50, 49)]:
        found = rates(max_steps, warmup_steps=warmup, schedule=schedule, **decay)
        assert all(0 < rate <= PEAK for rate in found)
        if max_steps - warmup > 1 or schedule == "constant":
            assert max(found) == PEAK
        assert found[-1] == (PEAK if schedule == "constant" else PEAK * 0.1)
    with pytest.raises(ValueError, match="numbered from 1"):
        learning_rate_at(0, TrainingConfig())
