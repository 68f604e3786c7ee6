"""Each preset has the size in its name, and its byte modules cost few parameters."""

import numpy as np
import pytest
import torch

from data_pipeline.tokenizers import parse_spec
from stlm.config import load_run_config
from stlm.stlm import STLM

SIZES = {f"{size}-{kind}": float(size[:-1]) * 1e6 for size in ("10m", "50m", "100m") for kind in
         ("token", "byte", "byte-patch")} | {"paper-50m": 47.2e6}  # fmt: skip
TABLE = 50_257  # vectors of GPT-2


class Vocabulary:
    """The properties of a tokenizer that a model's shape depends on."""

    start_id = 1

    def __init__(self, spec):
        self.vocab_size = parse_spec(spec)[1]
        self.bytes_per_id = np.full(self.vocab_size, 4)

    def decode_bytes(self, ids):
        return b"".join(id.to_bytes(4, "big") for id in ids)


def build(name):
    config = load_run_config(name)
    with torch.device("meta"):
        return STLM(config.model, Vocabulary(config.data.tokenizer))


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_the_size_of_its_name(name):
    model = build(name)
    assert model.num_parameters() == pytest.approx(SIZES[name], rel=0.01)
    heads = model.config.core.attention
    assert model.config.width // heads.num_heads in (32, 64, 128) and heads.num_kv_heads < heads.num_heads


@pytest.mark.parametrize("name", [name for name in SIZES if name.endswith("byte-patch")])
def test_byte_modules_are_smaller_than_a_subword_table(name):
    model = build(name)
    around = model.num_parameters() - sum(parameter.numel() for parameter in model.core.parameters())
    table = TABLE * model.config.width
    print(f"{name}: {around / (2 * table):.1%} of an untied table, {around / table:.1%} of a tied one")
    assert around <= 0.05 * 2 * table
    assert around <= 0.10 * table
