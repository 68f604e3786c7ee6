"""Activation checkpointing: fewer activations are kept for the gradient, and all figures of a run stay the same."""

from __future__ import annotations

import pytest
import torch
from tiny_run import read_metrics, train

from stlm.training.deepspeed.state_transfer import full_state

RECOMPUTE = "training.activation_checkpointing=true"
MODELS = {
    "plain": (),
    "mixture": (
        "model.core={kind: transformer, num_layers: 3, layer_dropout: 0.5, "
        "attention: {num_heads: 2, value_residual: true}, feed_forward: {kind: moe}, sharing: {modules: {block: all}}}",
    ),
    "byte_patch": ("model.embedder={kind: byte_patch}", "model.head={kind: byte_patch}"),
}


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("model", MODELS)
def test_recomputation_changes_no_figure(make_trainer, tmp_path, model, stage):
    """Losses with terms of layers, norms, measures and weights are bit-equal."""
    states = []
    for name, setting in (("kept", ()), ("recomputed", (RECOMPUTE,))):
        trainer = make_trainer(tmp_path / name, *MODELS[model], *setting, "training.max_steps=3", stage=stage)
        train(trainer)
        states.append(full_state(trainer.engine))
    assert read_metrics(tmp_path / "recomputed") == read_metrics(tmp_path / "kept")
    for name, tensor in states[0].parameters.items():
        assert torch.equal(tensor, states[1].parameters[name])


def test_less_is_kept_for_the_gradient(make_trainer, tmp_path):
    """Each layer keeps its input, outside of the layer, and far less than it keeps without recomputation."""

    def bytes_kept(name, *settings):
        trainer = make_trainer(tmp_path / name, "model.core.num_layers=6", *settings)
        kept: dict[int, int] = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.zeros(8, 32, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = trainer.engine.forward(ids)
        weights = sum(parameter.nbytes for parameter in trainer.model.parameters())
        del output
        return sum(kept.values()) - weights

    assert bytes_kept("recomputed", RECOMPUTE) < bytes_kept("kept") / 4
