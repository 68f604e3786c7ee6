"""Sums of nats, ids and bytes: against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stlm.model import Output
from stlm.model.exits import ExitLogits
from stlm.objectives import Batch, build_objective

BYTES_PER_ID = torch.tensor([1, 2, 3, 0])  # the last one ends a text


def sums_of(logits, ids, mask):
    objective = build_objective("next_token")
    prepared = objective.prepare(Batch(ids, mask), seed=1, step=1, row=0)
    return objective.sums(Output(logits, {}, {}), prepared, BYTES_PER_ID)


def test_a_uniform_model_pays_ln_v_for_each_counted_id():
    ids = torch.tensor([[0, 1, 3], [2, 2, 2]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    sums = sums_of(torch.zeros(2, 3, 4), ids, mask)
    assert sums.nats.dtype == torch.float64
    assert math.isclose(sums.nats.item(), 4 * math.log(4), rel_tol=1e-7)
    assert sums.ids.item() == 4
    assert sums.bytes.item() == 1 + 2 + 0 + 3


def test_what_is_masked_costs_nothing_and_teaches_nothing():
    """Not even where its logits are not finite: padding must never reach the gradient."""
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    logits[0, 2, 1] = math.inf
    logits.requires_grad_()
    ids, mask = torch.tensor([[1, 0, 2]]), torch.tensor([[True, True, False]])
    sums = sums_of(logits, ids, mask)
    expected = -logits.detach()[0, :2].log_softmax(-1).gather(1, ids[0, :2, None]).double().sum()
    assert torch.isclose(sums.nats, expected, rtol=1e-6)
    sums.nats.backward()
    probabilities = logits.detach()[0, :2].softmax(-1)
    one_hot = torch.nn.functional.one_hot(ids[0, :2], 4)
    assert torch.allclose(logits.grad[0, :2], probabilities - one_hot, atol=1e-6)


def test_exits_cost_what_their_rows_pay():
    """By hand: two exits, three rows, each row with one exit; masked ids cost nothing."""
    ids = torch.tensor([[0, 1], [2, 2], [1, 1]])
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    logits = torch.zeros(3, 2, 4)
    logits[1, 0, 2] = logits[2, 1, 0] = math.log(3)  # likely and right: 1/2; likely and wrong: 1/6
    logits[0, 1, 0] = math.inf  # masked
    output = Output(torch.zeros(3, 2, 4), {}, {}, ExitLogits(logits, torch.tensor([1, 0, 1]), {2: 0.1, 4: 0.2, 6: 0.5}))
    objective = build_objective("next_token")
    sums = objective.sums(output, objective.prepare(Batch(ids, mask), seed=1, step=1, row=0), BYTES_PER_ID)
    assert math.isclose(sums.nats.item(), 5 * math.log(4), rel_tol=1e-7)
    first, second = math.log(2) + math.log(4), math.log(4) + math.log(4) + math.log(6)
    expected = {"exit_2": 3 * 0.1 * first, "exit_4": 3 * 0.2 * second, "exit_6": 0.0}
    assert {name: nats.item() for name, nats in output.auxiliary.items()} == pytest.approx(expected, rel=1e-6)


def test_z_loss_is_the_squared_log_of_the_softmax_divisor_of_counted_ids():
    """Uniform logits c over 4 ids: log Z = c + ln 4. What is not counted pays nothing, even where it is not finite."""
    logits = torch.full((1, 3, 4), 2.0)
    logits[0, 1] = -math.log(4)
    logits[0, 2, 0] = math.inf
    logits.requires_grad_()
    output, mask = Output(logits, {}, {}), torch.tensor([[True, True, False]])
    prepared = build_objective("next_token").prepare(Batch(torch.zeros(1, 3, dtype=torch.long), mask), 1, 1, 0)
    plain = build_objective("next_token").sums(output, prepared, BYTES_PER_ID)
    assert output.auxiliary == {}
    sums = build_objective("next_token", z_loss_weight=0.5).sums(output, prepared, BYTES_PER_ID)
    assert sums.nats == plain.nats  # what is reported as the loss stays the likelihood
    term = output.auxiliary["z"]
    assert math.isclose(term.item(), 0.5 * (2 + math.log(4)) ** 2, rel_tol=1e-6)
    term.backward()
    expected = (2 + math.log(4)) * torch.full((4,), 0.25)  # d log Z / d logit is the probability
    torch.testing.assert_close(logits.grad[0, 0], expected)
    assert not logits.grad[0, 1:].any()


def test_sums_of_parts_add_up():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 5, 4, generator=generator)
    ids = torch.randint(0, 4, (4, 5), generator=generator)
    mask = torch.rand(4, 5, generator=generator) < 0.7
    whole = sums_of(logits, ids, mask)
    parts = [sums_of(logits[rows], ids[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 4))]
    for name in ("nats", "ids", "bytes"):
        total = sum(getattr(part, name) for part in parts)
        assert torch.allclose(getattr(whole, name).double(), total.double(), rtol=1e-12)
