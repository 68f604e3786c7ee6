"""Models of transformers become runs of this project: same logits, the weights to the last bit, and back again."""

import shutil

import pytest
import torch

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import (
    load_run_config,
)
from stlm.export import convert_from
from stlm.export.comparison import sample_text
from stlm.stlm import STLM
from stlm.training.run_directory import begin_run

transformers = pytest.importorskip("transformers", reason="needs transformers: the extra `export`")

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt2, not tied": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "n_inner": 40,
                       "activation_function": "gelu", "tie_word_embeddings": False},
    "llama": SHAPE,
    "llama, biased": {**SHAPE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {**SHAPE, "tie_word_embeddings": True},
    "qwen3": {**SHAPE, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}  # fmt: skip


@pytest.fixture(scope="module")
def subwords(tmp_path_factory):
    """A folder with tokenizer.json of 400 ids, as GPT-2 has it: one symbol, for everything."""
    from tokenizers import ByteLevelBPETokenizer, normalizers

    folder = tmp_path_factory.mktemp("subwords")
    library = ByteLevelBPETokenizer()
    library.train_from_iterator([sample_text()], vocab_size=400, special_tokens=["<|endoftext|>"])
    library._tokenizer.normalizer = normalizers.NFC()  # as Qwen has it
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def make(subwords, tmp_path):
    """make(name, **fields) writes a model of transformers with random weights, biases and norms included."""

    def make(name, vocab_size=403, **fields):
        torch.manual_seed(5)
        config = transformers.AutoConfig.for_model(name.split(",")[0], vocab_size=vocab_size, **MODELS[name] | fields)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "there")
        shutil.copy(subwords / "tokenizer.json", tmp_path / "there")
        return model

    return make


def read(tmp_path):
    return convert_from("huggingface", tmp_path / "there", tmp_path / "run", begin_run)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_same(name, make, tmp_path):
    there = make(name).eval()
    converted = read(tmp_path)
    assert converted.difference <= 1e-5
    model = STLM.load(tmp_path / "run")
    tokenizer = model.tokenizer
    assert model.num_parameters() == there.num_parameters() and converted.num_ids == 128
    assert tokenizer.vocab_size == 403  # three more than the tokenizer knows: they stand for no text
    assert (tokenizer.bytes_per_id == 0).sum() == 4
    assert tokenizer.start_id == tokenizer.pad_id == tokenizer.end_of_text_id == 0
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "e\u0301"

    ids = torch.tensor([[0, *tokenizer.encode("The file is").tolist()]])
    new = there.generate(ids, max_new_tokens=20, do_sample=False, suppress_tokens=[400, 401, 402], eos_token_id=0)
    new_ids = [id for id in new[0, ids.size(1) :].tolist() if id != 0]
    # This project reads the start symbol first, and then that of a document: here they are one, twice.
    ids_2 = torch.cat((ids[:, :1], ids), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids_2[:, 1:]).logits[:, 1:], there(ids_2).logits[:, 1:-1], atol=1e-5, rtol=0)
    assert len(new_ids) <= 20


def test_the_run_says_what_it_takes_to_go_on(make, subwords, tmp_path):
    make("llama")
    read(tmp_path)
    config = load_run_config(tmp_path / "run")
    assert config.data.tokenizer == f"hf:{tmp_path / 'run' / 'tokenizer'}"
    tokenizer = build_tokenizer(config.data.tokenizer)
    loaded = STLM.load(tmp_path / "run")
    assert (tokenizer.fingerprint, tokenizer.spec) == (loaded.tokenizer.fingerprint, loaded.tokenizer.spec)
    assert config.model == loaded.config
