"""Nats, counts and terms of the loss of next-token prediction, compared with numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stlm.config import TrainingConfig
from stlm.model import Output, row_keys
from stlm.model.exits import ExitLogits
from stlm.objectives import Batch, Loss, build_objective

BYTES_PER_ID = torch.tensor([1, 2, 3, 0])  # the last one ends a text


def batch_of(ids, mask) -> Batch:
    return Batch(ids, ids, mask, row_keys(1, 1, range(len(ids))))


def loss_of(output: Output, ids, mask, z_loss_weight: float = 0.0) -> Loss:
    objective = build_objective(TrainingConfig(z_loss_weight=z_loss_weight))
    return objective.loss(output, objective.prepare(batch_of(ids, mask)))


def test_a_uniform_model_pays_ln_v_for_each_counted_id():
    ids = torch.tensor([[0, 1, 3], [2, 2, 2]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = loss_of(Output(torch.zeros(2, 3, 4), {}, {}), ids, mask)
    assert loss.nats.dtype == torch.float64 and loss.terms == {}
    assert math.isclose(loss.nats.item(), 4 * math.log(4), rel_tol=1e-7)
    assert batch_of(ids, mask).counts(BYTES_PER_ID).tolist() == [4, 1 + 2 + 0 + 3]


def test_masked_ids_have_no_loss_and_no_gradient():
    """Masked logits may even be infinite or NaN: padding never reaches the gradient."""
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    logits[0, 2, 1] = math.inf
    logits.requires_grad_()
    ids, mask = torch.tensor([[1, 0, 2]]), torch.tensor([[True, True, False]])
    nats = loss_of(Output(logits, {}, {}), ids, mask).nats
    expected = -logits.detach()[0, :2].log_softmax(-1).gather(1, ids[0, :2, None]).double().sum()
    assert torch.isclose(nats, expected, rtol=1e-6)
    nats.backward()
    probabilities = logits.detach()[0, :2].softmax(-1)
    one_hot = torch.nn.functional.one_hot(ids[0, :2], 4)
    assert torch.allclose(logits.grad[0, :2], probabilities - one_hot, atol=1e-6)


def test_the_loss_of_exits_by_hand():
    """Worked out for two exits and three rows, each row with one exit; masked ids cost nothing."""
    ids = torch.tensor([[0, 1], [2, 2], [1, 1]])
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    logits = torch.zeros(3, 2, 4)
    logits[1, 0, 2] = logits[2, 1, 0] = math.log(3)  # likely and right: 1/2; likely and wrong: 1/6
    logits[0, 1, 0] = math.inf  # masked
    output = Output(torch.zeros(3, 2, 4), {}, {}, ExitLogits(logits, torch.tensor([1, 0, 1]), {2: 0.1, 4: 0.2, 6: 0.5}))
    loss = loss_of(output, ids, mask)
    assert output.auxiliary == {}  # arguments are not changed
    assert math.isclose(loss.nats.item(), 5 * math.log(4), rel_tol=1e-7)
    first, second = math.log(2) + math.log(4), math.log(4) + math.log(4) + math.log(6)
    expected = {"exit_2": 3 * 0.1 * first, "exit_4": 3 * 0.2 * second, "exit_6": 0.0}
    assert {name: nats.item() for name, nats in loss.terms.items()} == pytest.approx(expected, rel=1e-6)


def test_z_loss_is_the_squared_log_of_the_softmax_divisor_of_counted_ids():
    """Uniform logits c over 4 ids: log Z = c + ln 4. Masked ids pay nothing, even where they are not finite."""
    logits = torch.full((1, 3, 4), 2.0)
    logits[0, 1] = -math.log(4)
    logits[0, 2, 0] = math.inf
    logits.requires_grad_()
    output, mask = Output(logits, {}, {}), torch.tensor([[True, True, False]])
    ids = torch.zeros(1, 3, dtype=torch.long)
    loss = loss_of(output, ids, mask, z_loss_weight=0.5)
    assert loss.nats == loss_of(output, ids, mask).nats  # the reported loss remains the likelihood
    assert output.auxiliary == {}
    term = loss.terms["z"]
    assert math.isclose(term.item(), 0.5 * (2 + math.log(4)) ** 2, rel_tol=1e-6)
    term.backward()
    expected = (2 + math.log(4)) * torch.full((4,), 0.25)  # d log Z / d logit is the probability
    torch.testing.assert_close(logits.grad[0, 0], expected)
    assert not logits.grad[0, 1:].any()
