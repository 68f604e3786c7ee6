"""Models of transformers become runs of this project: same logits, exactly the same weights, and back again."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import DataError
from data_pipeline.tokenizers import ByteTokenizer, build_tokenizer, train_sentencepiece
from stlm.config import (
    ByteEmbedderConfig,
    GroupedQueryConfig,
    LinearHeadConfig,
    ModelConfig,
    ResidualConfig,
    SwiGLUConfig,
    TokenEmbedderConfig,
    TransformerCoreConfig,
    load_run_config,
)
from stlm.errors import ConversionError
from stlm.export import convert_from, convert_to
from stlm.export.comparison import sample_text
from stlm.stlm import STLM
from stlm.training.run.run_directory import begin_run

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
    """Make a folder with a tokenizer.json of 400 ids like GPT-2's: one symbol for all purposes."""
    from tokenizers import ByteLevelBPETokenizer, normalizers

    folder = tmp_path_factory.mktemp("subwords")
    library = ByteLevelBPETokenizer()
    library.train_from_iterator([sample_text()], vocab_size=400, special_tokens=["<|endoftext|>"])
    library._tokenizer.normalizer = normalizers.NFC()  # like Qwen's
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def make(subwords, tmp_path):
    """Return a function (name, **fields) that writes a transformers model with random weights, biases and norms."""

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
    assert tokenizer.vocab_size == 403  # three more than the tokenizer has: they stand for no text
    assert (tokenizer.bytes_per_id == 0).sum() == 4
    assert tokenizer.start_id == tokenizer.pad_id == tokenizer.end_of_text_id == 0
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "e\u0301"

    # This project reads the start symbol, then the end-of-text symbol: here both are the same id, read twice.
    ids = torch.tensor([[0, 0, *tokenizer.encode("The file is").tolist()]])
    new = there.generate(ids, max_new_tokens=20, do_sample=False, suppress_tokens=[400, 401, 402], eos_token_id=0)
    new_ids = [id for id in new[0, ids.size(1) :].tolist() if id != 0]
    assert model.generate("The file is", max_new_ids=20, temperature=0.0) == tokenizer.decode(new_ids)


def test_the_config_of_the_run_loads_its_tokenizer_and_model(make, subwords, tmp_path):
    make("llama")
    read(tmp_path)
    config = load_run_config(tmp_path / "run")
    assert config.data.tokenizer == f"hf:{tmp_path / 'run' / 'tokenizer'}"
    tokenizer = build_tokenizer(config.data.tokenizer)
    loaded = STLM.load(tmp_path / "run")
    assert (tokenizer.fingerprint, tokenizer.spec) == (loaded.tokenizer.fingerprint, loaded.tokenizer.spec)
    assert config.model == loaded.config


CORE = TransformerCoreConfig(num_layers=2, attention=GroupedQueryConfig(num_heads=4, num_kv_heads=2))
QWEN3 = replace(CORE, attention=GroupedQueryConfig(num_heads=4, qk_norm=True))
OURS = {
    "byte": (ByteEmbedderConfig(), replace(CORE, residual=ResidualConfig(scale=0.5)), LinearHeadConfig()),
    "sentencepiece-bpe": (TokenEmbedderConfig(scaled=False), CORE, LinearHeadConfig()),
    "sentencepiece": (TokenEmbedderConfig(scaled=False), CORE, LinearHeadConfig(tied=False)),
    "hf": (TokenEmbedderConfig(scaled=False), QWEN3, LinearHeadConfig()),
}


@pytest.mark.parametrize("kind", OURS)
def test_a_round_trip_restores_the_model(kind, subwords, tmp_path):
    tokenizer = {
        "byte": ByteTokenizer,
        "sentencepiece": lambda: train_sentencepiece([sample_text()], 500),
        "sentencepiece-bpe": lambda: train_sentencepiece([sample_text()], 500, "sentencepiece-bpe"),
        "hf": lambda: build_tokenizer(f"hf:{subwords}"),
    }[kind]()
    embedder, core, head = OURS[kind]
    feed_forward = SwiGLUConfig(hidden_width=48)
    config = ModelConfig(64, 32, embedder=embedder, core=replace(core, feed_forward=feed_forward), head=head)
    model = STLM.from_config(config, tokenizer, seed=4)
    model.save(tmp_path / "model")
    convert_to("huggingface", tmp_path / "model", tmp_path / "there")
    read(tmp_path)
    back = STLM.load(tmp_path / "run")
    assert back.config == config
    assert back.tokenizer.fingerprint == tokenizer.fingerprint
    expected, got = model.state_dict(), back.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def edit(folder, file="config.json", **fields):
    path = folder / file
    described = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(described))


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_a_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def lowercase(folder):
    edit(folder, "tokenizer.json", normalizer={"type": "Lowercase"})


BAD = {
    "windows": (lambda folder: edit(folder, hidden_act="relu"), r"config\.json: stlm cannot express hidden_act = relu"),
    "rope": (
        lambda folder: edit(folder, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        r"rope_parameters\.rope_type = linear and rope_parameters\.factor = 2\.0",
    ),
    "another architecture": (lambda folder: edit(folder, model_type="opt"), r"model_type: got 'opt'.* gpt2, llama"),
    "no architecture": (lambda folder: edit(folder, model_type="telepathy"), r"cannot read it"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), r"cannot read it"),
    "truncated weights": (cut_weights, r"cannot load its weights"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"cannot load its weights"),
    "a missing weight": (lose_a_weight, r"missing keys model\.layers\.1\.mlp\.up_proj\.weight"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"holds no tokenizer\.json"),
    "a broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        r"tokenizer\.json cannot be read",
    ),
    "a tokenizer that loses text": (lowercase, r"loses text"),
    "nothing": (shutil.rmtree, r"holds no config\.json"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_message_and_nothing_is_written(what, make, tmp_path):
    make("llama")
    spoil, message = BAD[what]
    spoil(tmp_path / "there")
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ConversionError, DataError), match=message) as raised:
        read(tmp_path)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before


def test_more_ids_than_the_model_has_are_refused(make, tmp_path):
    make("llama", vocab_size=399)
    with pytest.raises(DataError, match=r"has 400 ids, but its model's vocab_size is 399"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "telepathy"])
def test_code_of_a_model_is_not_run_and_causes_no_prompt(kind, make, monkeypatch, tmp_path):
    """transformers would ask whether to run the code of an unknown type."""
    make("llama")
    (tmp_path / "there" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    edit(tmp_path / "there", model_type=kind, auto_map={"AutoConfig": "evil.Config"})
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    if kind == "llama":
        assert read(tmp_path).difference <= 1e-5
    else:
        with pytest.raises(ConversionError, match="cannot read it"):
            read(tmp_path)
    assert not asked and not (tmp_path / "ran").exists()


def test_another_model_is_noticed(make, monkeypatch, tmp_path):
    """Logits decide: swapped queries and keys leave all shapes unchanged."""
    from stlm.export.huggingface import foreign_models as foreign

    make("gpt2")
    monkeypatch.setattr(foreign, "_THIRDS", ("key", "query", "value"))
    with pytest.raises(ConversionError, match=r"the converted model differs: its logits differ .* nothing was written"):
        read(tmp_path)
    assert not (tmp_path / "run").exists()
