"""Optimized models, which run in another form, give the same predictions."""

import copy

import pytest
import torch
from torch import nn

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import ModelConfig, from_dict
from stlm.config.model.core.normalization import RMSNormConfig
from stlm.errors import ConfigError
from stlm.model.core.normalization import RMSNorm
from stlm.model.decoding.packed_weights import BLOCK, FEW, IntegerProduct, Product, RoundedProduct, normalize
from stlm.stlm import STLM

CORES = {
    "Llama": {"attention": {"num_kv_heads": 2}},
    "scales and heads' norms, windows, half of each head turned, no sharing of values": {
        "attention": {"qk_norm": True, "window": 5, "full_every": 2, "logit_cap": 4.0},
        "residual": {"learned_scale": True},
        "positions": {"kind": "rope", "fraction": 0.5},
        "feed_forward": {"kind": "relu_squared"},
    },
    "GPT-2, with branches scaled": {
        "attention": {"bias": "all"},
        "norm": {"kind": "layer_norm"},
        "positions": {"kind": "learned"},
        "feed_forward": {"kind": "gelu", "bias": True},
        "residual": {"scale": 0.5},
    },
    "parallel, ALiBi, mixed values": {
        "attention": {"value_residual": True, "num_kv_heads": 1},
        "positions": {"kind": "alibi"},
        "residual": {"parallel": True, "scale": 0.7},
        "feed_forward": {"kind": "swiglu", "bias": True},
    },
    "experts, and matrices that layers share and correct, in a loop": {
        "feed_forward": {"kind": "moe", "num_experts": 3, "hidden_width": 16, "shared_hidden_width": 8},
        "sharing": {"modules": {"block": [[0, 2]]}, "lora_rank": 2},
        "loops": {"count": 2, "first": 1, "embeddings": True},
    },
}


@pytest.fixture(params=CORES)
def model(request):
    return make(CORES[request.param])


def make(core, **changes):
    core = {"num_layers": 3, **core, "attention": {"num_heads": 4, **core.get("attention", {})}}
    config = from_dict(ModelConfig, {"context_length": 24, "width": 32, "core": core, **changes})
    model = STLM.from_config(config, build_tokenizer("byte"), seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # parameters that begin at zero or one would hide mistakes
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def random_ids(length=20):
    return torch.randint(32, 127, (2, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_an_optimized_model_predicts_the_same_in_one_pass_and_in_steps(model):
    ids = random_ids()
    expected = model(ids).logits
    parameters = copy.deepcopy(dict(model.named_parameters()))
    model.optimize_for_decoding()
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
    logits, state = model.begin(2, ids[:, :7])
    torch.testing.assert_close(logits, expected[:, 7], atol=1e-5, rtol=0)
    state = model.join([(state, torch.tensor([0, 1]))])
    for place in range(7, 19):
        logits = model.step(ids[:, place : place + 1], state)[:, 0]
        torch.testing.assert_close(logits, expected[:, place + 1], atol=1e-5, rtol=0)
    assert all(torch.equal(parameters[name], parameter) for name, parameter in model.named_parameters())


@torch.no_grad()
def test_corrections_are_packed_too():
    model = make({}, lora={"rank": 2}).optimize_for_decoding()
    packed = model(random_ids()).logits
    torch.testing.assert_close(packed, model.train().eval()(random_ids()).logits, atol=1e-5, rtol=0)
    assert model.core.stack.packed is None
    assert (
        packed - make({}, lora={"rank": 2}).optimize_for_decoding().merged()(random_ids()).logits
    ).abs().max() < 1e-5


@torch.no_grad()
def test_changed_weights_and_dtypes_discard_packed_ones():
    other = STLM.from_config(make({}).config, build_tokenizer("byte"), seed=9).eval()
    expected = other(random_ids()).logits
    model = make({}).optimize_for_decoding()
    model.load_tensors(dict(other.named_parameters()), source="another")
    assert torch.equal(model(random_ids()).logits, expected)
    model = make({}).optimize_for_decoding().double()
    assert model(random_ids()).logits.dtype == torch.float64


def test_layers_that_share_matrices_share_products():
    stack = make({"sharing": {"modules": {"block": "all"}}}).optimize_for_decoding().core.stack
    first, *others = stack.packed
    assert all(other.heads is first.heads and other.up is first.up for other in others)
    stack = make({}).optimize_for_decoding().core.stack
    assert stack.packed[0].heads is not stack.packed[1].heads


@torch.no_grad()
@pytest.mark.parametrize("kind, error", [(RoundedProduct, 2**-8), (IntegerProduct, 2**-6)])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_fewer_bits_change_the_output_as_much_as_expected(kind, error, rows, bias):
    torch.manual_seed(0)
    linears = nn.Linear(64, 48, bias=bias), nn.Linear(64, 32, bias=bias)
    x, residual = torch.randn(rows, 64), torch.randn(rows, 80)
    exact, product = Product(linears), kind(linears)
    expected = torch.cat([linear(x) for linear in linears], dim=1)
    torch.testing.assert_close(exact(x), expected, atol=1e-5, rtol=0)
    assert 0 < (product(x) - expected).norm() / expected.norm() < error
    whole = torch.add(residual, expected, alpha=0.5)
    torch.testing.assert_close(exact.add_to(residual, x, 0.5), whole, atol=1e-5, rtol=0)
    assert 0 < (product.add_to(residual, x, 0.5) - whole).norm() / expected.norm() < error


@torch.no_grad()
def test_few_vectors_and_many_read_the_same_integers():
    torch.manual_seed(0)
    product = IntegerProduct((nn.Linear(128, 64, bias=False),))
    x = torch.randn(3 * FEW, 128)
    few = torch.cat([product(part) for part in x.split(FEW)])
    torch.testing.assert_close(few, product(x), atol=0.03, rtol=0.03)
    steps = product.levels_CD.float() * product.steps_C.float()[:, None]
    torch.testing.assert_close(few, x.bfloat16().float() @ steps.T, atol=0.02, rtol=0.02)
    assert product.levels_CD.abs().max() <= 127


@torch.no_grad()
@pytest.mark.parametrize("width", [8, 24, 40, 1320])
def test_integers_of_any_width_are_read_within_their_rows(width):
    torch.manual_seed(0)
    linear, x = nn.Linear(width, 64, bias=False), torch.randn(FEW, width)
    product = IntegerProduct((linear,))
    assert product.levels_CD.size(1) % BLOCK == 0  # torch reads past the end of other rows, which may crash the process
    assert (product(x) - linear(x)).norm() / linear(x).norm() < 2**-6


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_the_short_norm_is_the_norm(size):
    norm = RMSNorm(RMSNormConfig(1e-5), 48)
    norm.weight += 0.1 * torch.randn(48, generator=torch.Generator().manual_seed(1))
    x = size * torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(normalize(norm)(x), norm(x), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_model_of_fewer_bits_predicts_the_same_in_one_pass_and_in_steps():
    for precision in ("bf16", "int8"):
        model = make({}).optimize_for_decoding(precision)
        ids = random_ids()
        expected = model(ids).logits
        logits, state = model.begin(2, ids[:, :9])
        torch.testing.assert_close(logits, expected[:, 9], atol=0.05, rtol=0)
        torch.testing.assert_close(model.step(ids[:, 9:12], state)[:, :2], expected[:, 10:12], atol=0.05, rtol=0)
        assert not torch.equal(expected, make({})(ids).logits)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="precision: got 'fp4', expected one of fp32, bf16, int8"):
        make({}).optimize_for_decoding("fp4")
