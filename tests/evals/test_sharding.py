"""Sums over sharded items equal, digit for digit, those of a single rank."""

from functools import partial

import pytest
import torch

import stlm.evals.likelihood
import stlm.evals.tasks.bits_per_byte
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.tokenizers import build_tokenizer
from stlm.config import GroupedQueryConfig, ModelConfig, TransformerCoreConfig
from stlm.evals import EvalShard, Row, log_likelihoods, score_split
from stlm.stlm import STLM

CONFIG = ModelConfig(
    context_length=32, width=32, core=TransformerCoreConfig(num_layers=1, attention=GroupedQueryConfig(num_heads=2))
)


@pytest.fixture(scope="module")
def model():
    return STLM.from_config(CONFIG, build_tokenizer("byte"), seed=1).eval()


def of_all_ranks(score, world_size):
    """Return each rank's contribution to the sum, and its result from the sum over all ranks."""
    given = []
    for rank in range(world_size):
        score(shard=EvalShard(rank, world_size, lambda values: given.append(list(values)) or given[-1]))
    total = [sum(values) for values in zip(*given, strict=True)]
    return given, [score(shard=EvalShard(rank, world_size, lambda values: total)) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_likelihoods_do_not_depend_on_the_number_of_ranks(model, monkeypatch, world_size):
    monkeypatch.setattr(stlm.evals.likelihood, "_IDS_PER_BATCH", 64)  # several batches
    texts = ["a cat", "two cats sat", "none " * 12, "and so it goes on"]  # the third one is longer than the model
    questions = [[Row("Say: ", f"{text}{end}") for end in (".", "!!")] for text in texts]
    alone = log_likelihoods(model, questions)
    given, found = of_all_ranks(partial(log_likelihoods, model, questions), world_size)
    assert str(found) == str([alone] * world_size)  # compared as text, since NaN equals nothing
    assert sum(any(value != 0 for value in values) for values in given) == min(world_size, 3)


@pytest.mark.parametrize("world_size", [2, 3])
def test_bits_per_byte_do_not_depend_on_the_number_of_ranks(model, monkeypatch, tmp_path, world_size):
    monkeypatch.setattr(stlm.evals.tasks.bits_per_byte, "_WINDOWS_PER_SEGMENT", 2)
    (tmp_path / "text.txt").write_text("\n<eos>\n".join(f"Text {n} of {n % 7} words." for n in range(99)))
    output = tmp_path / "data"
    prepare(PrepareConfig((str(tmp_path / "text.txt"),), output=str(output), workers=1, validation_fraction=0.3))
    data = PreparedData.open(output)
    stream, sources = data.split("validation"), data.sources("validation")
    alone = score_split(model, stream, sources=sources)
    given, found = of_all_ranks(partial(score_split, model, stream, sources=sources), world_size)
    for score in found:
        assert score.nats == pytest.approx(alone.nats, rel=1e-12)
        assert torch.equal(torch.from_numpy(score.bytes_D), torch.from_numpy(alone.bytes_D))
        assert score.nats_D == pytest.approx(alone.nats_D, rel=1e-12)
        assert [part.nats for part in score.sources.values()] == pytest.approx([alone.nats], rel=1e-12)
        assert (score.bytes, score.ids) == (alone.bytes, alone.ids)
    assert all(0.2 * alone.nats < values[0] < 0.8 * alone.nats for values in given)
