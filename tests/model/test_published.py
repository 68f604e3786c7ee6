"""Ids read and spelled as their bytes: no text is lost, and the likelihood of an id follows from its slots."""

import math

import pytest
import torch

from data_pipeline.tokenizers import train_sentencepiece
from stlm.config import (
    GroupedQueryConfig,
    LinearHeadConfig,
    ModelConfig,
    PublishedEmbedderConfig,
    PublishedHeadConfig,
    TransformerCoreConfig,
)
from stlm.errors import ConfigError
from stlm.model import Context, PublishedEmbedder, PublishedHead, Vocabulary, count_parameters, initialize
from stlm.model.embedders.published import PAD, symbols_of
from stlm.stlm import STLM, vocabulary_of

TEXT = "the cat and the other cat sat on the mat, naïve as ever; then they sang. " * 20
CONTEXT = 12


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentencepiece([TEXT], 287)


def make(tokenizer, reconstruction_weight=0.0, slots=16, **head):
    config = ModelConfig(
        context_length=CONTEXT,
        width=32,
        embedder=PublishedEmbedderConfig(slots, 16, 1, 2, reconstruction_weight),
        core=TransformerCoreConfig(num_layers=1, attention=GroupedQueryConfig(num_heads=2)),
        head=PublishedHeadConfig(num_layers=1, num_heads=2, **head),
    )
    return STLM.from_config(config, tokenizer, seed=3).eval()


def ids_of(tokenizer):
    return torch.tensor(tokenizer.encode(TEXT)[: 2 * CONTEXT].tolist()).unflatten(0, (2, CONTEXT))


def test_every_id_is_spelt_in_its_own_way_and_by_its_bytes(tokenizer):
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.size == 287 and vocabulary.spellings == tuple(tokenizer.decode_bytes([i]) for i in range(287))
    spelt = [tuple(row) for row in symbols_of(vocabulary, 16).tolist()]
    assert len(set(spelt)) == 287
    for id, symbols in enumerate(spelt):
        assert bytes(symbol for symbol in symbols if symbol < PAD) == tokenizer.decode_bytes([id])
    specials = [tokenizer.start_id, tokenizer.end_of_text_id, tokenizer.pad_id, tokenizer.mask_id]
    assert [spelt[id][0] for id in specials] == [258, 259, 260, 261]  # 257 is the unknown's


def test_spellings_by_hand():
    vocabulary = Vocabulary((b"", b"a", b"ab", b"a", b"", b"a"))
    assert symbols_of(vocabulary, 3).tolist() == [
        [257, PAD, PAD],
        [97, PAD, PAD],
        [97, 98, PAD],
        [97, 257, PAD],
        [258, PAD, PAD],
        [97, 258, PAD],
    ]


def test_too_few_slots_name_the_key_and_a_value_that_works(tokenizer):
    with pytest.raises(ConfigError, match=r"model\.embedder\.slots: got 1, expected at least the (\d+)") as error:
        make(tokenizer, slots=1)
    needed = int(str(error.value).split("at least the ")[1].split()[0])
    assert f"{needed} would work" in str(error.value)
    make(tokenizer, slots=needed)
    with pytest.raises(ConfigError):
        make(tokenizer, slots=needed - 1)


@torch.no_grad()
def test_the_likelihood_is_the_product_over_slots_renormalised_over_the_vocabulary(tokenizer):
    model = make(tokenizer)
    ids = ids_of(tokenizer)
    inputs = torch.cat((torch.full((2, 1), tokenizer.start_id), ids[:, :-1]), dim=1)
    x, _ = model.embedder(inputs, Context())
    slots = model.head.spell(model.core(x, Context())).double().log_softmax(-1)  # [N, S, A]
    nats = model(ids).logits.flatten(0, 1).double().log_softmax(-1)
    symbols = symbols_of(vocabulary_of(tokenizer), 16)
    for n in (0, 7, 23):
        products = torch.stack([sum(slots[n, s, row[s]] for s in range(16)) for row in symbols])
        torch.testing.assert_close(nats[n], products - products.logsumexp(0), atol=1e-5, rtol=0)
    assert nats[0].exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def test_every_parameter_gets_a_gradient(tokenizer):
    model = make(tokenizer)
    model(ids_of(tokenizer)).logits.logsumexp(-1).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_text_is_scored_by_the_product_of_its_ids_also_after_load(tokenizer, tmp_path):
    model = make(tokenizer)
    model.save(tmp_path / "model")
    ids = [tokenizer.end_of_text_id, *tokenizer.encode("the cat sang").tolist()]
    total, state = 0.0, None
    for t, id in enumerate(ids):
        logits, state = model.begin(1) if t == 0 else (model.step(torch.tensor([[ids[t - 1]]]), state)[:, 0], state)
        total += logits[0].double().log_softmax(-1)[id].item() if t else 0.0
    for m in (model, STLM.load(tmp_path / "model")):
        assert m.log_likelihood("the cat sang") == pytest.approx(total, abs=1e-4)


@torch.no_grad()
def test_slots_that_an_id_does_not_fill_change_nothing(tokenizer):
    many, few = make(tokenizer, slots=16).embedder, make(tokenizer, slots=12).embedder
    few.load_state_dict(many.state_dict() | {"local.places.weight": many.local.places.weight[:12]})
    ids = ids_of(tokenizer)
    torch.testing.assert_close(few(ids, Context())[0], many(ids, Context())[0], atol=1e-6, rtol=0)


def test_the_reconstruction_loss_predicts_the_ids_just_read(tokenizer):
    model = make(tokenizer, reconstruction_weight=0.5)
    ids = ids_of(tokenizer)
    assert model(ids).auxiliary == {}  # terms are added in training only
    model.train()
    whole = model(ids).auxiliary["reconstruction"]
    torch.testing.assert_close(whole, sum(model(row[None]).auxiliary["reconstruction"] for row in ids))
    inputs = torch.cat((torch.full((2, 1), tokenizer.start_id), ids[:, :-1]), dim=1)
    symbols = (symbols_of(vocabulary_of(tokenizer), 16)[inputs] != PAD).sum().item()
    num_symbols = model.embedder.table.num_embeddings
    assert whole.item() == pytest.approx(0.5 * symbols * math.log(num_symbols), rel=0.02)  # untrained
    whole.backward()
    for part, reached in ((model.embedder, True), (model.core, False), (model.head, True)):
        assert {p.grad is not None and bool(p.grad.any()) for p in part.parameters()} == {reached}
    assert make(tokenizer).train()(ids).auxiliary == {}
    (conflict,) = ModelConfig(
        embedder=PublishedEmbedderConfig(reconstruction_weight=1.0), head=LinearHeadConfig(tied=False)
    ).check()
    assert conflict.key == "embedder.reconstruction_weight"


@pytest.mark.parametrize(
    "width, untied, tied", [(512, 0.0609, 0.1204), (768, 0.0461, 0.0913)], ids=["width 512", "width 768"]
)
def test_parameters_are_a_small_share_of_a_tables(width, untied, tied):
    """Published depths of 4 and 7 layers, with 12 slots: the share of parameters that a GPT-2 table would need."""
    vocabulary = Vocabulary((b"", *(bytes([id // 65536, id // 256 % 256, id % 256]) for id in range(50_256))))
    model = ModelConfig(width=width, embedder=PublishedEmbedderConfig(slots=12, num_layers=4))
    embedder = PublishedEmbedder(model.embedder, model, vocabulary)
    head = PublishedHead(PublishedHeadConfig(num_layers=7), model, vocabulary)
    initialize(torch.nn.ModuleDict({"embedder": embedder, "head": head}), seed=1)
    ours = count_parameters(embedder) + count_parameters(head)
    assert ours / (2 * 50_257 * width) == pytest.approx(untied, abs=0.0001)
    head.output.weight = embedder.table.weight
    ours = count_parameters(torch.nn.ModuleList([embedder, head]))
    assert ours / (50_257 * width) == pytest.approx(tied, abs=0.0001)


def test_it_can_be_made_and_run_without_memory(tokenizer):
    """On the meta device, where tensors have no values: sizes and costs are counted this way."""
    model = make(tokenizer)
    with torch.device("meta"):
        empty = STLM(model.config, tokenizer)
    assert [p.shape for p in empty.parameters()] == [p.shape for p in model.parameters()]
    ids = torch.zeros(2, 6, dtype=torch.long, device="meta")
    assert empty(ids).logits.shape == (2, 6, tokenizer.vocab_size)
