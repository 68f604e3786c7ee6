"""Initial values come from one place, and depend on the seed and the parameter's name alone."""

import pytest
import torch
from test_pairs import make

from stlm.config import ByteEmbedderConfig, LinearHeadConfig


def test_values_depend_on_seed_and_name_alone():
    tied, untied = (make(ByteEmbedderConfig(), LinearHeadConfig(tied=t)) for t in (True, False))
    tensors = dict(untied.named_parameters())
    for name, parameter in tied.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    other = make(ByteEmbedderConfig(), LinearHeadConfig(), seed=4)
    assert not torch.equal(other.embedder.table.weight, tied.embedder.table.weight)


def test_scales_follow_the_table():
    model = make(ByteEmbedderConfig(), LinearHeadConfig(tied=False), width=256)
    block = model.core.stack.blocks[0]
    expected = {
        model.embedder.table.weight: 0.02,
        model.head.output.weight: 0.02,
        block.attention.query.weight: 256**-0.5,
        block.attention.output.weight: (256 * 4) ** -0.5,  # 2 layers: two branches each
        block.feed_forward.down.weight: (704 * 4) ** -0.5,
    }
    for parameter, deviation in expected.items():
        assert parameter.std().item() == pytest.approx(deviation, rel=0.03)
    assert torch.equal(block.attention_norm.weight, torch.ones(256))
