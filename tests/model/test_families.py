"""Configs of well-known families, compared with each family's own formulas in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from component_examples import CORES
from test_pairs import make, random_ids

from stlm.config import ByteEmbedderConfig, GroupedQueryConfig, LinearHeadConfig, TransformerCoreConfig

NUM_HEADS, WIDTH = 4, 32


def randomized(core, tied):
    """Make a model whose parameters, biases and norms included, all have values that reveal mistakes."""
    model = make(ByteEmbedderConfig(scaled=False), LinearHeadConfig(tied=tied), core)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, {name: tensor.detach() for name, tensor in model.state_dict().items()}


def heads(x):
    return x.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).flatten(2)


def rms(x, weight):
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def turned(x, theta, width):
    """Return the first `width` numbers of each head as complex numbers: number i with number i + width / 2."""
    angle = torch.arange(x.size(-2))[:, None] * theta ** (-torch.arange(0, width, 2) / width)
    half = width // 2
    z = torch.complex(x[..., :half], x[..., half:width]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag, x[..., width:]), dim=-1)


def gpt2(ids, p):
    x = p["embedder.table.weight"][ids] + p["core.stack.positions.table.weight"][: ids.size(1)]
    for n in range(2):
        block = {k.removeprefix(f"core.stack.blocks.{n}."): v for k, v in p.items()}

        def linear(x, name, block=block):
            return F.linear(x, block[f"{name}.weight"], block[f"{name}.bias"])

        y = F.layer_norm(x, (WIDTH,), block["attention_norm.weight"], block["attention_norm.bias"])
        q, k, v = (heads(linear(y, f"attention.{name}")) for name in ("query", "key", "value"))
        x = x + linear(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)), "attention.output")
        y = F.layer_norm(x, (WIDTH,), block["feed_forward_norm.weight"], block["feed_forward_norm.bias"])
        x = x + linear(F.gelu(linear(y, "feed_forward.up"), approximate="tanh"), "feed_forward.down")
    x = F.layer_norm(x, (WIDTH,), p["core.norm.weight"], p["core.norm.bias"])
    return x @ p["embedder.table.weight"].T


def gpt_neox(ids, p):
    x = p["embedder.table.weight"][ids]
    for n in range(2):
        block = {k.removeprefix(f"core.stack.blocks.{n}."): v for k, v in p.items()}

        def linear(x, name, block=block):
            return F.linear(x, block[f"{name}.weight"], block[f"{name}.bias"])

        y = F.layer_norm(x, (WIDTH,), block["attention_norm.weight"], block["attention_norm.bias"])
        q, k, v = (heads(linear(y, f"attention.{name}")) for name in ("query", "key", "value"))
        q, k = turned(q, 1e4, 4), turned(k, 1e4, 4)
        attended = linear(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)), "attention.output")
        y = F.layer_norm(x, (WIDTH,), block["feed_forward_norm.weight"], block["feed_forward_norm.bias"])
        x = x + attended + linear(F.gelu(linear(y, "feed_forward.up")), "feed_forward.down")
    return F.layer_norm(x, (WIDTH,), p["core.norm.weight"], p["core.norm.bias"]) @ p["head.output.weight"].T


def llama(ids, p, theta=1e4, qk_norm=False):
    x = p["embedder.table.weight"][ids]
    for n in range(2):
        block = {k.removeprefix(f"core.stack.blocks.{n}.").removesuffix(".weight"): v for k, v in p.items()}
        y = rms(x, block["attention_norm"])
        q, k, v = (y @ block[f"attention.{name}"].T for name in ("query", "key", "value"))
        width = q.size(-1) // NUM_HEADS
        q, k, v = heads(q), *(z.unflatten(-1, (2, width)).transpose(1, 2).repeat_interleave(2, 1) for z in (k, v))
        if qk_norm:
            q, k = rms(q, block["attention.query_norm"]), rms(k, block["attention.key_norm"])
        q, k = turned(q, theta, width), turned(k, theta, width)
        x = x + merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)) @ block["attention.output"].T
        y = rms(x, block["feed_forward_norm"])
        gate, up = (y @ block[f"feed_forward.{name}"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ block["feed_forward.down"].T
    return rms(x, p["core.norm.weight"]) @ p["head.output.weight"].T


def qwen3(ids, p):
    return llama(ids, p, qk_norm=True)


LLAMA = TransformerCoreConfig(num_layers=2, attention=GroupedQueryConfig(num_kv_heads=2))
QWEN3 = TransformerCoreConfig(
    num_layers=2,
    attention=GroupedQueryConfig(num_kv_heads=2, head_width=16, qk_norm=True),
)


@torch.no_grad()
@pytest.mark.parametrize(
    "core, reference, tied",
    [(CORES["GPT-2"], gpt2, True), (CORES["GPT-NeoX"], gpt_neox, False), (LLAMA, llama, False), (QWEN3, qwen3, True)],
    ids=["GPT-2", "GPT-NeoX", "Llama", "Qwen3"],
)
def test_a_family_is_expressed_exactly(core, reference, tied):
    model, parameters = randomized(core, tied)
    if tied:
        parameters["head.output.weight"] = parameters["embedder.table.weight"]
    ids = random_ids()
    read = torch.cat((torch.full_like(ids[:, :1], model.tokenizer.start_id), ids[:, :-1]), dim=1)
    expected = reference(read, parameters)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
