"""Documents that share a window: none sees another, and each is read as if it were alone."""

from __future__ import annotations

import pytest
import torch
from test_pairs import CONTEXT, PAIRS, make, random_ids

DOCUMENTS = torch.tensor([[0] * 7 + [1] * 5 + [2] * 9 + [-1] * 3])


@pytest.fixture(params=PAIRS)
def model(request):
    return make(*PAIRS[request.param])


@torch.no_grad()
def test_other_documents_have_no_influence_at_all(model):
    """Bit-equal, also where a document begins inside a patch, and where a local window crosses its edge."""
    ids = random_ids(1)
    logits = model(ids, DOCUMENTS).logits
    assert torch.isfinite(logits).all()
    for document in (0, 1, 2, -1):
        mine = document == DOCUMENTS
        changed = torch.where(mine, ids, (ids + 1) % 256)
        first = int(mine[0].nonzero()[0])
        if first:
            changed[0, first - 1] = ids[0, first - 1]  # the id after which a document begins belongs to both
        assert torch.equal(model(changed, DOCUMENTS).logits[mine], logits[mine])
        earlier = ids.clone()
        earlier[0, first] = (ids[0, first] + 1) % 256
        assert not torch.equal(model(earlier, DOCUMENTS).logits[mine], logits[mine])


@torch.no_grad()
def test_following_ids_have_no_influence(model):
    ids = random_ids(1)
    logits = model(ids, DOCUMENTS).logits
    for place in range(CONTEXT):
        changed = ids.clone()
        changed[0, place:] = (ids[0, place:] + 1) % 256
        assert torch.equal(model(changed, DOCUMENTS).logits[:, : place + 1], logits[:, : place + 1])


@torch.no_grad()
@pytest.mark.parametrize("start", [12, 13])
def test_a_document_is_read_as_if_alone(model, start):
    """Within 1e-5, as rotary angles are those of other positions; with patches, if it begins where a patch begins."""
    patching = getattr(model.embedder, "patching", None)
    if patching and patching.room(start) == patching.room(start + 1):
        pytest.skip("promised only where a patch begins")
    ids = random_ids(2)
    ids[:, start - 1] = model.tokenizer.start_id  # the text read at the start of a window
    documents = (torch.arange(CONTEXT) >= start).long().expand(2, -1)
    alone = model(ids[:, start:]).logits
    assert torch.allclose(model(ids, documents).logits[:, start:], alone, atol=1e-5)
    assert not torch.allclose(model(ids).logits[:, start:], alone, atol=1e-3)
    assert torch.allclose(model(ids[:, start:], documents[:, start:]).logits, alone, atol=1e-5)


@torch.no_grad()
def test_documents_may_be_numbered_in_any_whole_numbers(model):
    """Prepared data numbers them in 32 bits."""
    ids = random_ids(1)
    assert torch.equal(model(ids, DOCUMENTS.int()).logits, model(ids, DOCUMENTS).logits)
