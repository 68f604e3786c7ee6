"""Every registered objective: sums of parts add up, and arguments stay unchanged."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import ModelConfig, TrainingConfig, TransformerCoreConfig
from stlm.config.objectives import NextTokenConfig, ObjectiveConfig
from stlm.model import row_keys
from stlm.objectives import Batch, build_objective
from stlm.stlm import STLM

EXAMPLES = [  # one of each kind, with settings away from their defaults
    NextTokenConfig(),
]


def test_every_objective_has_an_example():
    assert {type(example) for example in EXAMPLES} == set(ObjectiveConfig.kinds.values())


@pytest.fixture(scope="module")
def model() -> STLM:
    config = ModelConfig(context_length=16, width=32, core=TransformerCoreConfig(num_layers=2))
    return STLM.from_config(config, build_tokenizer())


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda config: config.kind)
def test_sums_do_not_depend_on_how_rows_are_divided(config: ObjectiveConfig, model: STLM):
    ids = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(16) < torch.tensor([16, 16, 9, 1])[:, None]
    documents = (torch.arange(16) >= 7).int().expand(4, 16)
    batch = Batch(ids, ids, mask, row_keys(1, 1, range(4)), documents)
    objective = build_objective(TrainingConfig(objective=config, z_loss_weight=1e-3))

    def sums(rows: slice) -> torch.Tensor:
        part = objective.prepare(batch.map(lambda tensor: tensor[rows]))
        output = model(part.ids, part.document_ids)
        before = [tensor.clone() for tensor in (*part, output.logits) if tensor is not None]
        nats, terms = objective.loss(output, part)
        after = [tensor for tensor in (*part, output.logits) if tensor is not None]
        assert all(map(torch.equal, before, after)) and not output.auxiliary  # arguments are not changed
        assert nats.dtype == torch.float64 and all(term.dtype == torch.float64 for term in terms.values())
        counts = part.counts(torch.from_numpy(model.tokenizer.bytes_per_id))
        return torch.stack((nats, *(terms[name] for name in sorted(terms)), *counts.double()))

    whole = sums(slice(0, 4))
    assert whole[-2] > 0 and whole[0].requires_grad
    torch.testing.assert_close(sums(slice(0, 1)) + sums(slice(1, 4)), whole, rtol=1e-6, atol=0)
