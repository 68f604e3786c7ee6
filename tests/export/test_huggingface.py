"""transformers loads the same model in a separate process: logits, ids of texts, and generated text."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from data_pipeline.sources.conversations import TEMPLATE, prompt_of
from data_pipeline.tokenizers import build_tokenizer, train_sentencepiece
from stlm.config import (
    ByteEmbedderConfig,
    GroupedQueryConfig,
    LinearHeadConfig,
    ModelConfig,
    ResidualConfig,
    TokenEmbedderConfig,
    TransformerCoreConfig,
)
from stlm.errors import ConversionError
from stlm.export import convert_to
from stlm.export.comparison import sample_text
from stlm.export.huggingface.families import obstacles
from stlm.export.huggingface.reader import read_huggingface
from stlm.stlm import STLM

pytest.importorskip("transformers", reason="needs transformers: the extra `export`")

PROMPT = "The file is"
CORE = TransformerCoreConfig(num_layers=2, attention=GroupedQueryConfig(num_heads=4, num_kv_heads=2))
QWEN3 = replace(CORE, attention=GroupedQueryConfig(num_heads=4, num_kv_heads=2, head_width=16, qk_norm=True))
MODELS = {
    "LlamaForCausalLM": ("byte", ByteEmbedderConfig(scaled=False), CORE, LinearHeadConfig(tied=False)),
    "LlamaForCausalLM, subwords": ("hf", TokenEmbedderConfig(scaled=False), CORE, LinearHeadConfig()),
    "LlamaForCausalLM, merges": ("sentencepiece-bpe", TokenEmbedderConfig(scaled=False), CORE, LinearHeadConfig()),
    "Qwen3ForCausalLM": ("sentencepiece", TokenEmbedderConfig(scaled=False), QWEN3, LinearHeadConfig()),
    "GraniteForCausalLM": (
        "sentencepiece", TokenEmbedderConfig(), replace(CORE, residual=ResidualConfig(scale=0.5)), LinearHeadConfig(),
    ),
}  # fmt: skip
FRESH = """
import json, sys, torch, transformers
folder, again, prompt, text = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
new = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.size(1):].tolist()
model.save_pretrained(again); tokenizer.save_pretrained(again)
second = transformers.AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32).state_dict()
print(json.dumps({
    "class": type(model).__name__,
    "prompt": ids[0].tolist(),
    "new": new,
    "logits": model(ids).logits[0].tolist(),
    "text": tokenizer(text, add_special_tokens=False)["input_ids"],
    "again": all(torch.equal(tensor, second[name]) for name, tensor in model.state_dict().items()),
    "text again": transformers.AutoTokenizer.from_pretrained(again)(text, add_special_tokens=False)["input_ids"],
}))
"""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("hf")
    library = ByteLevelBPETokenizer()
    library.train_from_iterator([sample_text()], vocab_size=400, special_tokens=["<|endoftext|>"])
    library.save(str(folder / "tokenizer.json"))
    return {
        "hf": build_tokenizer(f"hf:{folder}"),
        "byte": build_tokenizer("byte"),
        "sentencepiece": train_sentencepiece([sample_text()], 500),
        "sentencepiece-bpe": train_sentencepiece([sample_text()], 500, "sentencepiece-bpe"),
    }


def make(tokenizers, name):
    kind, embedder, core, head = MODELS[name]
    config = ModelConfig(context_length=128, width=32, embedder=embedder, core=core, head=head)
    return STLM.from_config(config, tokenizers[kind], seed=3)


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_has_the_same_model(name, tokenizers, tmp_path):
    model = make(tokenizers, name)
    model.save(tmp_path / "model")
    converted = convert_to("huggingface", tmp_path / "model", tmp_path / "out")
    assert converted.difference <= 1e-5

    text = sample_text() + "<start><|start|><pad><unknown><0x0A>"
    command = [sys.executable, "-c", FRESH, str(tmp_path / "out"), str(tmp_path / "again"), PROMPT, text]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(printed.splitlines()[-1])

    tokenizer = model.tokenizer
    read = [tokenizer.end_of_text_id, *tokenizer.encode(PROMPT).tolist()]
    assert found["class"] == name.split(",")[0]
    assert found["prompt"] == [tokenizer.start_id, *read]
    assert found["text"] == tokenizer.encode(text).tolist()
    assert found["again"] and found["text again"] == found["text"]
    expected = model.eval()(torch.tensor([read])).logits[0]
    torch.testing.assert_close(torch.tensor(found["logits"])[:-1], expected, atol=1e-5, rtol=0)
    new = [id for id in found["new"] if id != tokenizer.end_of_text_id]
    assert tokenizer.decode(new) == model.generate(PROMPT, max_new_ids=64, temperature=0.0)


def test_the_card_has_true_figures(tokenizers, tmp_path):
    model = make(tokenizers, "LlamaForCausalLM")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00001234"
    model.save(checkpoint / "model")
    (checkpoint / "COMPLETE").write_text('{"files": {}}')
    progress = {"step": 1234, "data_fingerprint": "f" * 64, "validation_bits_per_byte": 1.98765}
    (checkpoint / "state.json").write_text(json.dumps(progress))
    starts = {"starts": [{"command": "first"}, {"command": "scripts/pretrain.py --config mine.yaml"}]}
    (tmp_path / "run" / "environment.json").write_text(json.dumps(starts))
    card = (convert_to("huggingface", tmp_path / "run", tmp_path / "out").output / "README.md").read_text()
    for figure in (f"{model.num_parameters():,}", "1,234 steps", "f" * 64, "1.9876", "mine.yaml", "LlamaForCausalLM"):
        assert figure in card


PLAIN = ModelConfig(core=CORE)
OTHERS = {
    "model.head.logit_cap = 5": replace(PLAIN, head=LinearHeadConfig(logit_cap=5.0)),
    "model.core.attention.window = 8": replace(PLAIN, core=replace(CORE, attention=GroupedQueryConfig(window=8))),
    "model.embedder.scaled = true": replace(PLAIN, core=QWEN3),
    "model.base_width = 64": replace(PLAIN, base_width=64),
}


@pytest.mark.parametrize("obstacle", OTHERS)
def test_an_unsupported_setting_is_named(obstacle):
    assert obstacles(PLAIN) == []
    assert obstacles(OTHERS[obstacle]) == [obstacle]


def test_a_missing_library_is_named_with_its_installation(tokenizers, monkeypatch, tmp_path):
    make(tokenizers, "LlamaForCausalLM").save(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConversionError, match=r"-m pip install '?transformers\b"):
        convert_to("huggingface", tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_chat_template_travels_both_ways(tokenizers, tmp_path):
    import transformers

    model = make({"byte": build_tokenizer("byte")}, "LlamaForCausalLM")
    model.tokenizer.chat_template = TEMPLATE
    model.save(tmp_path / "model")
    convert_to("huggingface", tmp_path / "model", tmp_path / "out")
    messages = [{"role": "user", "content": "Hi {{ there }}"}]
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = there.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == there.bos_token + there.eos_token + prompt_of(messages)
    back, _ = read_huggingface(tmp_path / "out")
    assert back.tokenizer.chat_template == TEMPLATE
