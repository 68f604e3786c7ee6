"""Initial values come from one module, and depend only on the seed and the parameter's name."""

import pytest
import torch
from test_pairs import make
from torch import nn

from stlm.config import ByteEmbedderConfig, LinearHeadConfig, RMSNormConfig
from stlm.errors import ConfigError
from stlm.model import initialize
from stlm.model.core.attention import ValueMix
from stlm.model.core.normalization import RMSNorm


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


class GatedNorm(RMSNorm):
    """A norm with an additional parameter that begins at 0.5."""

    def __init__(self):
        super().__init__(RMSNormConfig(), 4)
        self.gate = nn.Parameter(torch.full((4,), 0.5))


class Shift(nn.Module):
    """A vector named bias that begins at 0.5."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.full((), 0.5))


class GatedLinear(nn.Linear):
    """A linear map with an additional parameter."""

    def __init__(self):
        super().__init__(3, 4)
        self.gate = nn.Parameter(torch.full((4,), 0.5))


class OffsetMix(ValueMix):
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.full((2,), 0.5))


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (GatedNorm, "gate (4), of"),
        (Shift, "bias (a single number), of"),
        (GatedLinear, "gate (4), of"),
        (OffsetMix, "offset (2), of"),
        (lambda: nn.LayerNorm(4), "weight (4), of torch"),
        (lambda: nn.Conv1d(2, 4, 3), "weight (4x2x3), of torch"),
    ],
    ids=["norm", "bias", "linear", "mix", "foreign norm", "convolution"],
)
def test_a_parameter_without_a_rule_is_refused_by_name(module, named):
    """Nothing is changed then; the rule of the module's other parameter does not apply to it."""
    model = make(ByteEmbedderConfig(), LinearHeadConfig())
    model.core.added = module()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match="no rule gives an initial value") as caught:
        initialize(model, seed=9)
    assert f"  core.added.{named}" in str(caught.value)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    del model.core.added
    initialize(model, seed=9)


def test_constants_are_those_of_the_table():
    mix, linear, norm = ValueMix(), nn.Linear(3, 4), RMSNorm(RMSNormConfig(), 4)
    model = nn.ModuleDict({"mix": mix, "linear": linear, "norm": norm})
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    initialize(model, seed=0)
    assert mix.weight.tolist() == [0.5, 0.5] and norm.weight.tolist() == [1.0] * 4
    assert linear.bias.tolist() == [0.0] * 4 and 7.0 not in linear.weight
