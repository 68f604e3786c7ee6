"""Patching rules by hand, and the slots of patches compared with a loop."""

from __future__ import annotations

import pytest
import torch
from test_pairs import CONTEXT, PAIRS, make, random_ids

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import FixedPatchingConfig, ModelConfig, SpacePatchingConfig
from stlm.model import Context, EntropyPatching
from stlm.model.embedders.patching.rules import PATCHINGS, spacelike
from stlm.stlm import vocabulary_of

VOCABULARY = vocabulary_of(build_tokenizer("byte"))
VARIABLE = ["byte_patch+byte_patch, patches of words", "byte_patch+byte_patch, patches of hard bytes"]


def build(config, context_length):
    return PATCHINGS[config.kind](config, ModelConfig(context_length=context_length), VOCABULARY)


def cut(text, rule, start=0xFC):
    """Return the text with a bar where each patch begins to be predicted."""
    data = text.encode()
    inputs = torch.tensor([[start, *data[:-1]]])
    wanted = rule(inputs, None, Context())[0]
    return b"".join(
        (b"|" if begins else b"") + bytes([byte]) for byte, begins in zip(data, wanted, strict=True)
    ).decode()


def test_words_by_hand():
    """A patch begins after the first space-like byte of a run, and after the first byte of a multi-byte character."""
    rule = build(SpacePatchingConfig(), 512)
    assert cut("The 2nd cat,  'sat' on\n\na mat.", rule) == "|The |2nd |cat,|  'sat'| on\n|\na |mat."
    inputs = torch.tensor([[0xFC, *"né 日本".encode(), 0xFF, ord("a")]])
    begins = rule(inputs, None, Context())[0].tolist()
    # In front of: n, C3 (é), A9, the space, E6 (日), 97, A5, E6 (本), 9C, AC, the end of the document, a, what follows.
    assert begins == [True, False, True, False, True, False, False, False, True, False, False, True, False]


def by_loop(wanted, documents, num_slots, context_length):
    """Compute slots one position at a time: where each patch begins, and the patch of each position."""
    room = [-(-t * num_slots // context_length) for t in range(len(wanted) + 1)]
    starts, patch_of, taken, current, document = {}, [], 0, 0, None
    for t, want in enumerate(wanted):
        if documents[t] != document:
            document, want, taken, current = documents[t], True, room[t], 0
        if want and taken < room[t + 1]:
            taken += 1
            current = taken
            starts[taken - 1] = t
        patch_of.append(current)
    return [starts.get(slot, -1) for slot in range(room[-1])], patch_of


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("with_documents", [False, True])
def test_slots_equal_a_loop_over_positions(density, with_documents):
    rule = build(SpacePatchingConfig(patch_length=5.0), 48)  # 12 slots
    draw = torch.Generator().manual_seed(1)
    wanted = torch.rand(50, 48, generator=draw) < density
    documents = (torch.rand(50, 48, generator=draw) < 0.1).long().cumsum(1) * with_documents
    for length in (48, 31):
        placed = rule.place(wanted[:, :length], documents[:, :length] if with_documents else None)
        for row in range(50):
            starts, patch_of = by_loop(wanted[row, :length].tolist(), documents[row].tolist(), 12, 48)
            assert placed.start_BP[row].tolist() == starts
            assert placed.index_BT[row].tolist() == patch_of
            assert placed.counts_B[row] == sum(start >= 0 for start in starts)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_fixed_patches_take_every_slot(size):
    rule = build(FixedPatchingConfig(size), 20)
    placed = rule.place(rule(torch.zeros(2, 20, dtype=torch.long), None, Context()))
    assert placed.start_BP.tolist() == [list(range(0, 20, size))] * 2
    assert placed.index_BT.tolist() == [[t // size + 1 for t in range(20)]] * 2


@torch.no_grad()
@pytest.mark.parametrize("name", VARIABLE)
def test_later_bytes_change_no_earlier_patch_or_logit(name):
    """Bit-equal, also where the patches after the changed byte begin elsewhere."""
    model = make(*PAIRS[name])
    ids = random_ids()
    logits, (_, before) = model(ids).logits, model.embedder(ids, Context())
    moved = 0
    for t in range(CONTEXT):
        changed = ids.clone()
        changed[:, t] = torch.where(spacelike(ids[:, t]), ord("a"), ord(" "))
        _, after = model.embedder(changed, Context())
        assert torch.equal(after.index_BT[:, :t], before.index_BT[:, :t])
        moved += not torch.equal(after.index_BT, before.index_BT)
        assert torch.equal(model(changed).logits[:, : t + 1], logits[:, : t + 1])
    assert moved > CONTEXT / 2


@torch.no_grad()
@pytest.mark.parametrize("name", VARIABLE)
@pytest.mark.parametrize("byte", [ord("a"), ord(" ")])
def test_windows_of_one_patch_and_of_too_many_are_harmless(name, byte):
    model = make(*PAIRS[name])
    ids = torch.full((2, CONTEXT), byte)
    for threshold in (-1.0, 9.0):
        if isinstance(model.embedder.patching, EntropyPatching):
            model.embedder.patching.threshold.fill_(threshold)
        logits = model(ids).logits
        assert logits.isfinite().all()
        first, state = model.begin(2)
        steps = torch.cat((first[:, None], model.step(ids[:, :9], state), model.step(ids[:, 9:], state)), 1)
        torch.testing.assert_close(steps[:, :CONTEXT], logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_hard_bytes_by_hand():
    """The byte model is certain of every byte except the one after a space."""
    model = make(*PAIRS["byte_patch+byte_patch, patches of hard bytes"])
    rule = model.embedder.patching
    rule.threshold.fill_(1.5)
    table = torch.full((256, 256), -50.0)  # logits of the next byte by the last
    table[:, ord("a")] = 50.0
    table[ord(" "), :] = -50.0
    table[ord(" "), [ord("x"), ord("y"), ord("z")]] = 0.0  # log2(3) = 1.58 bits
    table[ord("x"), :] = -50.0
    table[ord("x"), [ord("y"), ord("z")]] = 0.0  # 1 bit
    rule.model.forward = lambda inputs_BT, context, cache=None: table[inputs_BT]
    assert cut("aa za xa a", rule) == "aa |za |xa |a"
    rule.threshold.fill_(0.9)
    assert cut("aa za xa a", rule) == "aa |za |x|a |a"


@torch.no_grad()
def test_entropy_of_a_uniform_model_is_eight_bits():
    rule = make(*PAIRS["byte_patch+byte_patch, patches of hard bytes"]).embedder.patching
    rule.model.embedder.table.weight.zero_()
    assert torch.allclose(rule.entropy(random_ids()), torch.full((2, CONTEXT), 8.0), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIABLE)
def test_the_mean_length_is_measured(name):
    model = make(*PAIRS[name])
    output = model(random_ids())
    positions, patches = output.measures["patch_length"].tolist()
    _, placed = model.embedder(torch.cat((torch.full((2, 1), 0xFC), random_ids()[:, :-1]), 1), Context())
    assert positions == 2 * CONTEXT and patches == placed.index_BT.amax(1).sum()


@torch.no_grad()
@pytest.mark.parametrize("name", ["byte_patch+byte_patch", *VARIABLE])
def test_shapes_do_not_depend_on_the_text(name):
    """The whole forward pass is therefore one graph, compiled once."""
    model = make(*PAIRS[name])
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for ids in (random_ids(), torch.full((2, CONTEXT), ord("a"))):
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-6, rtol=0)
