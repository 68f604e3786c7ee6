"""llama.cpp runs the same model: ids of texts, probabilities, and the likeliest 64 ids."""

import sys
from dataclasses import replace

import pytest

from data_pipeline.tokenizers import build_tokenizer, train_sentencepiece
from stlm.config import (
    ByteEmbedderConfig,
    BytePatchEmbedderConfig,
    BytePatchHeadConfig,
    GroupedQueryConfig,
    LinearHeadConfig,
    ModelConfig,
    ResidualConfig,
    TokenEmbedderConfig,
    TransformerCoreConfig,
)
from stlm.errors import ConversionError
from stlm.export import convert_to_gguf
from stlm.export.comparison import sample_text
from stlm.export.gguf import conversion
from stlm.export.gguf.llama_cpp import LlamaCpp
from stlm.export.gguf.tokenizer import _LLAMA3, _PRE_TOKENIZERS, _QWEN2
from stlm.stlm import STLM

pytest.importorskip("gguf", reason="needs gguf: the extra `export`")
needs_llama_cpp = pytest.mark.skipif(not conversion.installed(), reason="needs xllamacpp")

CORE = TransformerCoreConfig(num_layers=2, attention=GroupedQueryConfig(num_heads=4, num_kv_heads=2))
QWEN3 = replace(CORE, attention=GroupedQueryConfig(num_heads=4, num_kv_heads=2, head_width=16, qk_norm=True))
HALVED = replace(CORE, residual=ResidualConfig(scale=0.5))
BYTES, SUBWORDS = ByteEmbedderConfig(scaled=False), TokenEmbedderConfig(scaled=False)
MODELS = {
    "llama, byte": (BYTES, CORE, LinearHeadConfig(tied=False)),
    "qwen3, sentencepiece-bpe": (SUBWORDS, QWEN3, LinearHeadConfig()),
    "granite, sentencepiece": (TokenEmbedderConfig(), HALVED, LinearHeadConfig()),
    "granite, hf": (TokenEmbedderConfig(), CORE, LinearHeadConfig()),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Return a function that makes one of MODELS by name, with weights that make a difference."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("hf")
    library = ByteLevelBPETokenizer()
    library.train_from_iterator([sample_text()], vocab_size=400, special_tokens=["<|endoftext|>"])
    library.save(str(folder / "tokenizer.json"))

    def make(name):
        kind = name.split(", ")[1]
        if kind in ("byte", "hf"):
            tokenizer = build_tokenizer("byte" if kind == "byte" else f"hf:{folder}")
        else:
            tokenizer = train_sentencepiece([sample_text()], 500, kind)
        embedder, core, head = MODELS[name]
        model = STLM.from_config(ModelConfig(128, 64, embedder=embedder, core=core, head=head), tokenizer, seed=3)
        for parameter in model.parameters():
            parameter.data *= 3 if parameter.ndim > 1 else 1
        return model

    return make


@needs_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_has_the_same_model(make, name, tmp_path):
    model = make(name)
    model.save(tmp_path / "model")
    written = convert_to_gguf(tmp_path / "model", tmp_path / "out")
    assert written.difference < 1e-4
    assert ("unknown id" in str(written)) == (name == "granite, sentencepiece")

    tokenizer, prompt = model.tokenizer, "The file is\n\x07"  # the last one was not learned by any
    there = LlamaCpp(written.output, 128)
    assert there.encode(prompt) == [tokenizer.start_id, *tokenizer.encode(prompt).tolist()]
    never = [id for id in range(tokenizer.vocab_size) if not tokenizer.bytes_per_id[id]]
    never.remove(tokenizer.end_of_text_id)
    ids = [tokenizer.start_id, tokenizer.end_of_text_id, *tokenizer.encode(prompt).tolist()]
    answer = there.complete(ids, n_predict=64, logit_bias=[[id, False] for id in never])
    found = [id for id in answer["tokens"] if id != tokenizer.end_of_text_id]
    assert len(set(found)) > 5  # not one id repeated
    assert tokenizer.decode(found) == model.generate(prompt, max_new_ids=64, temperature=0.0)


@needs_llama_cpp
def test_fewer_bits_are_another_model_but_close(make, tmp_path):
    make("granite, hf").save(tmp_path / "model")
    sizes, differences = [], []
    for type in ("f32", "f16", "q8_0"):
        written = convert_to_gguf(tmp_path / "model", tmp_path / type, type)
        sizes.append(written.bytes)
        differences.append(written.difference)
    assert sizes == sorted(sizes, reverse=True) and differences == sorted(differences)
    assert differences[1] > 1e-5


@needs_llama_cpp
def test_a_wrong_order_of_rows_is_detected(make, monkeypatch, tmp_path):
    """llama.cpp orders the rows of queries differently from transformers."""
    make("llama, byte").save(tmp_path / "model")
    monkeypatch.setattr("stlm.export.gguf.writer._halves_to_neighbours", lambda rows, num_heads: rows)
    with pytest.raises(ConversionError, match="does not compute the same model"):
        convert_to_gguf(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_without_llama_cpp_the_tensors_are_read_back(make, monkeypatch, type, tmp_path):
    make("llama, byte").save(tmp_path / "model")
    monkeypatch.setattr(conversion, "installed", lambda: False)
    written = convert_to_gguf(tmp_path / "model", tmp_path / "out", type)
    assert written.difference is None and "read back" in str(written)
    read_tensors = conversion.read_tensors
    monkeypatch.setattr(conversion, "read_tensors", lambda path: {**read_tensors(path), "output.weight": 0})
    with pytest.raises(ConversionError, match=r"output\.weight does not read back as it was written"):
        convert_to_gguf(tmp_path / "model", tmp_path / "other", type)
    assert not (tmp_path / "other").exists()


def test_unsupported_settings_are_named(make, monkeypatch, tmp_path):
    patches = ModelConfig(128, 32, embedder=BytePatchEmbedderConfig(), core=CORE, head=BytePatchHeadConfig())
    STLM.from_config(patches, build_tokenizer("byte")).save(tmp_path / "patches")
    with pytest.raises(ConversionError, match=r"model\.embedder\.kind = byte_patch .* safetensors or .*artifact"):
        convert_to_gguf(tmp_path / "patches", tmp_path / "out")
    narrow = ModelConfig(128, 48, embedder=BYTES, core=CORE)
    STLM.from_config(narrow, build_tokenizer("byte")).save(tmp_path / "narrow")
    with pytest.raises(ConversionError, match=r"--type: got q8_0, .* rows of \S+ have 48"):
        convert_to_gguf(tmp_path / "narrow", tmp_path / "out", "q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConversionError, match=r"-m pip install '?gguf\b"):
        convert_to_gguf(tmp_path / "narrow", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def save_model_cut_by(cut, folder):
    """Save a model whose tokenizer merges bytes within the matches of the expression `cut`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(cut), "isolated"), bytes_alone])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator([sample_text()], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    library.save(str(folder / "tokenizer.json"))
    config = ModelConfig(128, 32, embedder=SUBWORDS, core=CORE)
    STLM.from_config(config, build_tokenizer(f"hf:{folder}")).save(folder / "model")


@needs_llama_cpp
@pytest.mark.parametrize("cut", [_LLAMA3, _QWEN2])
def test_texts_are_cut_as_llama_3_and_qwen2_cut_them(cut, tmp_path):
    save_model_cut_by(cut, tmp_path)
    assert convert_to_gguf(tmp_path / "model", tmp_path / "out").difference < 1e-4


@needs_llama_cpp
def test_different_ids_are_detected(monkeypatch, tmp_path):
    save_model_cut_by(_LLAMA3, tmp_path)
    monkeypatch.setitem(_PRE_TOKENIZERS, _LLAMA3, "gpt-2")
    with pytest.raises(ConversionError, match=r"data\.tokenizer: llama\.cpp gives other ids"):
        convert_to_gguf(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cuts_otherwise_is_refused(tmp_path):
    save_model_cut_by("x", tmp_path)
    with pytest.raises(ConversionError, match=r"data\.tokenizer: got hf:.*, which llama\.cpp cannot express"):
        convert_to_gguf(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
