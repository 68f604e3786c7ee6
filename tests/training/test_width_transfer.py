"""Base widths: training steps change activations equally at every width, and nothing else differs."""

import pytest
import torch
import torch.nn.functional as F
from tiny_run import update

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import (
    ByteEmbedderConfig,
    BytePatchEmbedderConfig,
    BytePatchHeadConfig,
    GroupedQueryConfig,
    LinearHeadConfig,
    ModelConfig,
    TrainingConfig,
    TransformerCoreConfig,
    load_run_config,
)
from stlm.errors import ConfigError
from stlm.model import Context
from stlm.stlm import STLM
from stlm.training import build_optimizer

WATCHED = ("core.stack.blocks.1.attention.query", "core.stack.blocks.1.attention", "core.stack.blocks.1.feed_forward")
PATCHES = {"embedder": BytePatchEmbedderConfig(width=16, num_heads=2), "head": BytePatchHeadConfig(num_heads=2)}
BYTES = {"embedder": ByteEmbedderConfig(), "head": LinearHeadConfig()}


def build(width, base_width, parts=BYTES):
    attention = GroupedQueryConfig(num_heads=4, num_kv_heads=2)
    core = TransformerCoreConfig(num_layers=2, attention=attention)
    config = ModelConfig(context_length=16, width=width, base_width=base_width, core=core, **parts)
    return STLM.from_config(config, build_tokenizer("byte"), seed=1)


@torch.no_grad()
def coordinates(model, ids):
    """Return the outputs of some modules, and the logits."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _module, _in, out, name=name: seen.update({name: out}))
        for name in WATCHED
    ]
    seen["logits"] = model(ids).logits
    for handle in handles:
        handle.remove()
    return seen


def changes(model, rate=1e-2, steps=4):
    """Return the root mean square change of these coordinates over a few training steps."""
    ids = torch.randint(97, 123, (8, 16), generator=torch.Generator().manual_seed(1))
    optimizer = build_optimizer(model, TrainingConfig(learning_rate=rate))
    before = coordinates(model, ids)
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["learning_rate_scale"]
        optimizer.zero_grad()
        F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    after = coordinates(model, ids)
    return {name: (after[name] - before[name]).pow(2).mean().sqrt().item() for name in before}


@pytest.mark.parametrize("parts", [BYTES, PATCHES], ids=["byte", "byte_patch"])
def test_steps_change_activations_equally_at_every_width(parts):
    narrow = changes(build(64, 64, parts), rate=3e-3)
    for width in (128, 256, 512):
        wide = changes(build(width, 64, parts), rate=3e-3)
        for name, change in wide.items():
            assert change == pytest.approx(narrow[name], rel=0.4), (name, width)


def test_without_a_base_width_changes_grow_with_the_width():
    narrow, wide = changes(build(64, None), rate=3e-3), changes(build(512, None), rate=3e-3)
    assert all(wide[name] > 1.5 * change for name, change in narrow.items())


def test_at_the_base_width_nothing_differs():
    assert changes(build(64, 64)) == changes(build(64, None))


@torch.no_grad()
def test_scores_are_divided_by_the_head_width_and_inputs_keep_their_size():
    ids = torch.arange(97, 113)[None]
    scaled, plain = build(512, 64), build(512, None)
    read = scaled.embedder(ids, Context())[0]
    torch.testing.assert_close(read, plain.embedder.table(ids) * 64**0.5)  # not sqrt(512)
    for block in plain.core.stack.blocks:
        block.attention.query.weight *= (16 / 128) ** 0.5  # heads are 16 wide at the base, 128 here
    torch.testing.assert_close(scaled.core(read, Context()), plain.core(read, Context()))


def test_groups_have_the_scale_of_their_inputs_and_keep_the_decay():
    model = build(256, 64, PATCHES)
    groups = build_optimizer(model, TrainingConfig(weight_decay=0.1)).param_groups
    of = {parameter: group for group in groups for parameter in group["params"]}
    block = model.core.stack.blocks[0]
    expected = {
        block.attention.query.weight: 1 / 4,
        block.feed_forward.down.weight: 192 / 704,  # 8/3 of each width, rounded
        model.head.project.weight: 1 / 4,
        model.embedder.project.weight: 1,  # from local layers, whose width is unchanged
        model.embedder.table.weight: 1,
        block.attention_norm.weight: 1,
    }
    assert {parameter: of[parameter]["learning_rate_scale"] for parameter in expected} == expected
    for group in groups:
        assert group["weight_decay"] * group["learning_rate_scale"] in (0, pytest.approx(0.1))


def test_the_engine_scales_each_group(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", "model.base_width=16")
    update(trainer)
    groups = trainer.engine.optimizer.param_groups
    assert len({group["lr"] for group in groups}) > 1
    for group in groups:  # 1e-3: the first of three steps of the warm-up
        assert group["lr"] == pytest.approx(1e-3 * group["learning_rate_scale"])


def test_a_base_width_that_heads_do_not_fit_names_the_key():
    with pytest.raises(ConfigError, match=r"model\.base_width: got 10, at which model\.core\.attention\.num_heads"):
        load_run_config("10m-byte", ["model.base_width=10"])
