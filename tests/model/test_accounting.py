"""The account of a model (parameters, FLOPs, memory) matches a real pass and a real decoding."""

from itertools import count

import pytest
import torch
import torch.nn.functional as F
from test_pairs import CONTEXT, PAIRS, make, random_ids
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import (
    ByteEmbedderConfig,
    GroupedQueryConfig,
    LinearHeadConfig,
    LoopsConfig,
    ModelConfig,
    SwiGLUConfig,
    TransformerCoreConfig,
)
from stlm.config.model.core.sharing import SharingConfig
from stlm.config.yaml.fields import FreeSection
from stlm.model import account, optimizer_bytes
from stlm.stlm import STLM

ROWS = 2


def counted(model, ids, precision):
    """Count FLOPs per id of a real forward and backward pass, and the bytes kept in between."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with hooks, autocast, FlopCounterMode(display=False) as forward:
        output = model(ids)
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), ids.flatten())
        loss = sum(output.auxiliary.values(), loss)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    size = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)
    return forward.get_total_flops() / ids.numel(), backward.get_total_flops() / ids.numel(), size


@pytest.mark.parametrize("pair", PAIRS)
def test_an_account_matches_a_real_pass(pair):
    model = make(*PAIRS[pair])
    calls = count()  # the first is for a model of fake tensors, the second for one with values
    told = account(lambda: model if next(calls) else STLM(model.config, model.tokenizer), 256, CONTEXT, ROWS)
    ids = random_ids(ROWS)
    assert told.simulated or "experts" in pair or pair.startswith("paper+paper")
    if not told.simulated:  # shapes depend on the ids
        ids = torch.randint(0, 256, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    assert told.rows == len(ids)
    forward, backward, kept = counted(model, ids, "fp32")
    assert (told.forward_flops, told.backward_flops) == (forward, backward)
    assert told.activation_bytes == {"fp32": kept, "bf16": counted(model, ids, "bf16")[2]}
    assert told.parameters == sum(part.parameters for part in told.parts) == model.num_parameters()
    assert sum(part.forward_flops for part in told.parts) == pytest.approx(forward)


def build(**core):
    attention = GroupedQueryConfig(num_heads=4, num_kv_heads=2)
    config = ModelConfig(
        context_length=CONTEXT, width=32, embedder=ByteEmbedderConfig(), head=LinearHeadConfig(),
        core=TransformerCoreConfig(attention=attention, feed_forward=SwiGLUConfig(80), **core),
    )  # fmt: skip
    return lambda: STLM(config, build_tokenizer("byte"))


ATTENTION, FEED_FORWARD, NORMS, TABLE = 32 * 32 * 2 + 2 * 32 * 16, 3 * 32 * 80, 2 * 32, 256 * 32


def test_parts_by_hand():
    told = account(build(num_layers=3), 256, CONTEXT, ROWS)
    parts = {part.name: (part.parameters, part.effective, part.forward_flops) for part in told.parts}
    products = 2 * CONTEXT * 32 * 2  # queries and keys, weights and values
    assert parts == {
        "embedder": (TABLE, TABLE, 0),
        "core attention": (3 * ATTENTION, 3 * ATTENTION, 3 * (2 * ATTENTION + products)),
        "core feed_forward": (3 * FEED_FORWARD, 3 * FEED_FORWARD, 3 * 2 * FEED_FORWARD),
        "core norm": (3 * NORMS + 32, 3 * NORMS + 32, 0),
        "head": (0, TABLE, 2 * TABLE),
    }
    assert told.embedding == TABLE and told.trained == told.parameters


def test_shared_weights_count_once_as_parameters_and_per_use_as_work():
    sharing = SharingConfig(modules=FreeSection.of({"feed_forward": "all"}))
    told = account(build(num_layers=3, sharing=sharing, loops=LoopsConfig(count=2, first=1)), 256, CONTEXT, ROWS)
    parts = {part.name: part for part in told.parts}
    assert parts["core feed_forward"].parameters == FEED_FORWARD
    assert parts["core feed_forward"].effective == 5 * FEED_FORWARD  # layers 0 1 2 1 2
    assert parts["core feed_forward"].forward_flops == 5 * 2 * FEED_FORWARD
    assert parts["core attention"].parameters == 3 * ATTENTION
    assert parts["core attention"].effective == pytest.approx(5 * ATTENTION, abs=1)


@torch.no_grad()
def test_cache_bytes_match_a_real_decoding():
    embedder, head = PAIRS["byte_patch+byte_patch"]
    model = make(embedder, head)
    _, state = model.begin(1)
    model.step(random_ids(1)[:, :-1], state)
    caches = [*state.embedder.local, *state.core, *state.head.local]
    told = account(lambda: STLM(model.config, model.tokenizer), 256, CONTEXT, ROWS)
    assert told.cache_bytes == sum(cache.nbytes for cache in caches)
    local = 2 * 16 * 4  # keys and values of a position, fp32
    assert told.cache_bytes == 4 * local + 2 * 5 * local + 2 * (CONTEXT // 4) * 2 * 16 * 4  # windows 5 and 6 less one


def test_memory_of_the_stages_by_hand():
    told = account(build(num_layers=1), 256, CONTEXT, ROWS)
    size = 4 * told.parameters
    sums = [sum(optimizer_bytes(told, stage, ranks=4).values()) for stage in range(4)]
    assert sums == [4 * size, 2 * size + 3 * size // 4, size + size, 5 * size // 4]
