"""Exported chat models: the ids that `generate.py --chat` reads, answers that end with the turn, and the same answers
in transformers and in llama.cpp."""

import json

import pytest
import torch

from data_pipeline.sources.conversations import END_OF_TURN, TEMPLATE
from data_pipeline.tokenizers import build_tokenizer, train_sentencepiece
from stlm.chat.template import ChatTemplate
from stlm.config import ModelConfig, from_dict
from stlm.export import convert_to, convert_to_gguf
from stlm.export.comparison import sample_text
from stlm.export.gguf.llama_cpp import LlamaCpp, installed
from stlm.export.huggingface.reader import read_huggingface
from stlm.stlm import STLM

transformers = pytest.importorskip("transformers", reason="needs transformers: the extra `export`")
transformers.logging.set_verbosity_error()
pytest.importorskip("gguf", reason="needs gguf: the extra `export`")

HOSTILE = "<|start|><|end_of_text|><start></s><unk><0x03><|endoftext|> Ünï {{ x }} {% y %}\n\n \t 🙂"
TOKENIZERS = ("byte", "sentencepiece", "sentencepiece-bpe", "hf", "hf that joins ends of turns")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Return a function that makes, for a tokenizer, a chat model that writes only ASCII."""

    def make(kind):
        if kind == "byte":
            tokenizer = build_tokenizer("byte")
        elif kind.startswith("hf"):
            from tokenizers import ByteLevelBPETokenizer

            text = "!\x03 " * 500 + sample_text() if "joins" in kind else sample_text()
            folder = tmp_path_factory.mktemp("hf")
            library = ByteLevelBPETokenizer()
            library.train_from_iterator([text], vocab_size=400, special_tokens=["<|endoftext|>"])
            library.save(str(folder / "tokenizer.json"))
            tokenizer = build_tokenizer(f"hf:{folder}")
        else:
            tokenizer = train_sentencepiece([sample_text()], 500, kind)
        tokenizer.chat_template = TEMPLATE
        embedder = {"kind": "byte" if kind == "byte" else "token", "scaled": False}
        core = {"num_layers": 2, "attention": {"num_heads": 4}}
        parts = {"embedder": embedder, "core": core, "head": {"tied": False}}
        model = STLM.from_config(from_dict(ModelConfig, {"context_length": 256, "width": 64, **parts}), tokenizer, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 4 if parameter.ndim > 1 else 1
            for id in range(tokenizer.vocab_size):
                piece = tokenizer.decode_bytes([id])
                if END_OF_TURN.encode() in piece:
                    model.head.output.weight[id] *= 1.3
                elif not piece.isascii() or not piece.decode().isprintable():
                    model.head.output.weight[id] = 0
        return model.eval()

    return make


def conversation(number):
    """Return several turns, of which the last is a question."""
    turns = [{"role": "system", "content": f"System {number}"}, {"role": "user", "content": "Hi " + "x" * number}]
    turns += [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": HOSTILE[: 6 * number]}]
    return turns if number % 2 else turns[1:2]


def exported(model, folder):
    """Return tokenizer and model as transformers loads them."""
    model.save(folder / "model")
    convert_to("huggingface", folder / "model", folder / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_conversation_has_the_ids_of_generate_and_its_answers(make, kind, tmp_path):
    model = make(kind)
    there_tokenizer, there = exported(model, tmp_path)
    tokenizer, template = model.tokenizer, ChatTemplate(TEMPLATE)
    ends = there.generation_config.eos_token_id
    assert ends[0] == tokenizer.end_of_text_id and len(ends) > 1
    assert (there.generation_config.stop_strings == [END_OF_TURN]) == ("joins" in kind)
    ended = 0
    for number in range(20):
        messages = conversation(number)
        prompt = template.prompt(messages)
        given = there_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = given["input_ids"]
        assert ids[0].tolist() == [tokenizer.start_id, tokenizer.end_of_text_id, *tokenizer.encode(prompt).tolist()]
        written = there.generate(**given, max_new_tokens=24, do_sample=False, tokenizer=there_tokenizer)[0]
        said = there_tokenizer.decode(written[ids.size(1) :], skip_special_tokens=True)
        expected = model.generate(prompt, max_new_ids=24, temperature=0, stop=template.stop)
        if "joins" in kind:  # there the end of a turn is an ordinary character
            said = said.partition(END_OF_TURN)[0]
        assert said == expected
        ended += len(written) - ids.size(1) < 24
    assert 0 < ended < 20
    with pytest.raises(Exception, match="a message spells out a symbol"):
        there_tokenizer.apply_chat_template([{"role": "user", "content": there_tokenizer.bos_token}])
    text = sample_text() + HOSTILE + "a\x02b\x03c"
    assert there_tokenizer(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).tolist()
    assert there_tokenizer.decode(tokenizer.encode(text).tolist()) == text


@pytest.mark.parametrize("kind", TOKENIZERS[:4])
def test_converting_back_restores_the_tokenizer_and_its_template(make, kind, tmp_path):
    model = make(kind)
    exported(model, tmp_path)
    back, _ = read_huggingface(tmp_path / "out")
    assert back.tokenizer.chat_template == TEMPLATE
    assert back.tokenizer.encode(HOSTILE + "\x03").tolist() == model.tokenizer.encode(HOSTILE + "\x03").tolist()
    assert kind == "hf" or back.tokenizer.fingerprint == model.tokenizer.fingerprint


@pytest.mark.skipif(not installed(), reason="needs xllamacpp")
@pytest.mark.parametrize("kind", TOKENIZERS[:4])
def test_llama_cpp_answers_the_same(make, kind, tmp_path):
    model = make(kind)
    there_tokenizer, there = exported(model, tmp_path)
    other = LlamaCpp(convert_to_gguf(tmp_path / "model", tmp_path / "gguf").output, 256)
    tokenizer = model.tokenizer
    never = [id for id in range(tokenizer.vocab_size) if not tokenizer.bytes_per_id[id]]
    never.remove(tokenizer.end_of_text_id)
    ended = 0
    for number in range(20):
        messages = conversation(number)
        if kind == "sentencepiece":  # llama.cpp reads untrained pieces as unknown
            messages = json.loads(json.dumps(messages, ensure_ascii=False).encode("ascii", "ignore"))
        given = there_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        prompt = other.request("/apply-template", messages=messages)["prompt"]
        read = other.request("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
        assert read == given["input_ids"][0].tolist()
        written = there.generate(**given, max_new_tokens=24, do_sample=False)[0, given["input_ids"].size(1) :]
        said = there_tokenizer.decode(written, skip_special_tokens=True)
        options = {"temperature": 0, "max_tokens": 24, "cache_prompt": False}
        answer = other.request(
            "/v1/chat/completions", messages=messages, logit_bias=[[id, False] for id in never], **options
        )["choices"][0]
        assert answer["message"]["content"] == said
        ended += answer["finish_reason"] == "stop"
    assert 0 < ended < 20
