"""Every entry of every registry of a transformer core is registered with an example here, and keeps its shapes."""

import pytest
import torch
from component_examples import EXAMPLES

from stlm.config import GroupedQueryConfig, ModelConfig, RMSNormConfig
from stlm.config.model.core.attention import AttentionConfig
from stlm.config.model.core.base import CoreConfig
from stlm.config.model.core.feed_forward import FeedForwardConfig
from stlm.config.model.core.normalization import NormConfig
from stlm.config.model.core.positions import PositionsConfig
from stlm.model import CORES, Context, initialize
from stlm.model.core.attention import ATTENTIONS
from stlm.model.core.feed_forward import FEED_FORWARDS
from stlm.model.core.normalization import NORMS
from stlm.model.core.positions import POSITIONS, Placement, RotaryTable

WIDTH, LENGTH = 24, 9
FAMILIES = {
    CORES: CoreConfig,
    ATTENTIONS: AttentionConfig,
    FEED_FORWARDS: FeedForwardConfig,
    NORMS: NormConfig,
    POSITIONS: PositionsConfig,
}
SHAPES = [(1, 1), (1, LENGTH), (3, 2), (2, LENGTH)]


@pytest.mark.parametrize("registry", EXAMPLES, ids=lambda registry: registry.name)
def test_every_entry_has_a_config_and_an_example(registry):
    examples = {config.kind for config in EXAMPLES[registry]}
    assert set(registry) == set(FAMILIES[registry].kinds) == examples


def through(registry, config):
    """Return the module that a config names, and a function of (x, its context) that should keep the shape of x."""
    attention = GroupedQueryConfig(num_heads=4)
    if registry is CORES:
        module = CORES[config.kind](config, ModelConfig(context_length=LENGTH, width=WIDTH, core=config))
        return module, module
    if registry is ATTENTIONS:
        module = ATTENTIONS[config.kind](config, RMSNormConfig(), WIDTH, layer=0)
        return module, lambda x, context: module(x, Placement(), context)
    if registry is POSITIONS:
        module = POSITIONS[config.kind](config, attention, WIDTH, LENGTH)
        return module, lambda x, context: module.enter(x, 0, context.documents)
    module = registry[config.kind](config, WIDTH)
    return module, module if registry is FEED_FORWARDS else lambda x, context: module(x)


CASES = [pytest.param(r, c, id=f"{r.name} {c}") for r, configs in EXAMPLES.items() for c in configs]


@pytest.mark.parametrize("registry, config", CASES)
def test_outputs_have_the_shape_of_inputs(registry, config):
    module, function = through(registry, config)
    initialize(module, seed=0)
    for batch, length in SHAPES:
        x = torch.randn(batch, length, WIDTH)
        for documents in (None, torch.arange(length).expand(batch, -1) // 4):
            y = function(x, Context(documents))
            assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()


@pytest.mark.parametrize("config", EXAMPLES[POSITIONS], ids=str)
def test_position_encodings_have_their_shapes(config):
    module = POSITIONS[config.kind](config, GroupedQueryConfig(num_heads=4), WIDTH, LENGTH)
    placement = module.placement(2, 5, torch.device("cpu"))
    if placement.rotary is not None:
        assert isinstance(placement.rotary, RotaryTable)
        for table in placement.rotary:
            assert table.shape[0] == 5 and table.shape[1] % 2 == 0 and table.shape[1] <= WIDTH // 4
            assert table.dtype == torch.float32
    if placement.slopes_N is not None:
        assert placement.slopes_N.shape == (4,) and placement.slopes_N.dtype == torch.float32
