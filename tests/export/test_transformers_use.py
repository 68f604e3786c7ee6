"""Exported models in common uses of transformers: caches, padding, losses, trainers, and refusals by name."""

import copy
import re
from pathlib import Path

import pytest
import torch

from data_pipeline.sources.conversations import TEMPLATE
from data_pipeline.tokenizers import build_tokenizer
from stlm.config import ModelConfig, from_dict, to_dict
from stlm.export import convert_to
from stlm.stlm import STLM

transformers = pytest.importorskip("transformers", reason="needs transformers: the extra `export`")
transformers.logging.set_verbosity_error()

LOCAL = {"kind": "byte_patch", "width": 16, "num_heads": 2, "window": 5}
CORE = {"num_layers": 2, "attention": {"num_heads": 4, "num_kv_heads": 2}}
PATCHES = {"head": {"kind": "byte_patch", "num_heads": 2, "window": 6}, "core": CORE}
VARIABLE = {"patch_length": 3.0, "span": 4}
FAMILIES = {
    "native": {"core": CORE},
    "windows": {"core": {"num_layers": 3, "attention": {"num_heads": 4, "window": 6, "full_every": 3}}},
    "learned positions": {"core": {**CORE, "positions": {"kind": "learned"}}},
    "n-grams, loops": {
        "embedder": {"kind": "byte", "ngrams": {"table_size": 40}},
        "core": {**CORE, "loops": {"count": 2, "embeddings": True}},
    },
    "experts": {"core": {**CORE, "feed_forward": {"kind": "moe", "num_experts": 4, "hidden_width": 16}}},
    "spelt": {
        "embedder": {"kind": "paper", "slots": 2, "width": 16, "num_heads": 2},
        "head": {"kind": "paper", "num_heads": 2},
        "core": CORE,
    },
    "fixed patches": {"embedder": {**LOCAL, "patching": {"kind": "fixed", "patch_size": 4}}, **PATCHES},
    "patches of words": {"embedder": {**LOCAL, "patching": {"kind": "space", **VARIABLE}}, **PATCHES},
    "learned patches": {"embedder": {**LOCAL, "patching": {"kind": "learned", **VARIABLE}}, **PATCHES},
}
START, PAD = 0xFC, 0xF8
LENGTHS = (5, 12, 8)


def make(parts, seed=3, context=64):
    config = from_dict(ModelConfig, {"context_length": context, "width": 32, **parts})
    model = STLM.from_config(config, build_tokenizer("byte"), seed=seed).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):  # an untrained model would predict the same everywhere
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
            parameter.mul_(2 if parameter.ndim > 1 else 1)
    return model


def remote(model):
    """Return the model as an object of the classes exported with it."""
    from stlm.export.remote.modeling_stlm import StlmConfig, StlmForCausalLM

    tokenizer = model.tokenizer
    spelt = [spelling.hex() for spelling in model.vocabulary.spellings]
    symbols = {"bos_token_id": START, "eos_token_id": tokenizer.end_of_text_id, "pad_token_id": PAD}
    config = StlmConfig(
        to_dict(model.config), 256, START, spelt if model.config.embedder.kind == "paper" else None, **symbols
    )
    there = StlmForCausalLM(config).eval()
    there.network.load_state_dict(model.state_dict())
    return there


def native(model):
    """Return the model as an object of transformers' own class."""
    from stlm.export.huggingface.writer import _native_model

    symbols = {"bos_token_id": START, "eos_token_id": model.tokenizer.end_of_text_id, "pad_token_id": PAD}
    return _native_model(model, symbols).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def there(request):
    model = make(FAMILIES[request.param])
    return native(model) if request.param == "native" else remote(model)


@pytest.fixture(scope="module")
def bytes_there():
    """Return a byte model of each class: of this project and of transformers."""
    model = make(FAMILIES["native"])
    return {"remote": remote(model), "native": native(model)}


@pytest.fixture
def ids():
    ids = torch.randint(32, 127, (3, 20), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = START
    return ids


def padded(ids, left, width=12):
    """Return rows of LENGTHS ids with padding before or after them, and the mask."""
    rows, mask = torch.full((3, width), PAD), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(width - length, width) if left else slice(0, length)
        rows[row, place], mask[row, place] = ids[row, :length], 1
    return rows, mask


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


OPTIONS = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [i for i in range(256) if i >= 0xF5]}


@torch.no_grad()
def test_cached_steps_equal_one_pass(there, ids):
    whole = there(ids, use_cache=False).logits
    first = there(ids[:, :7])
    close(first.logits, whole[:, :7])
    cache = first.past_key_values
    cache.activate_past_recording()
    kept = copy.deepcopy(cache)
    close(there(ids[:, 7:12], past_key_values=cache).logits, whole[:, 7:12])
    cache.crop(-3)
    assert cache.get_seq_length() == 9
    close(there(ids[:, 9:], cache=cache).logits, whole[:, 9:])
    kept.crop(-4)  # beyond the ids read in one piece
    close(there(ids[:, 3:], past_key_values=kept).logits, whole[:, 3:])


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(there, ids, request):
    alone = [there.generate(ids[row : row + 1, :length], **OPTIONS)[0, length:] for row, length in enumerate(LENGTHS)]
    for left in (True, False):
        rows, mask = padded(ids, left)
        for use_cache in (True, False):
            logits = there(rows, attention_mask=mask, use_cache=use_cache).logits
            for row, length in enumerate(LENGTHS):
                close(logits[row][mask[row].bool()], there(ids[row : row + 1, :length], use_cache=False).logits[0])
            if (
                left or "StlmForCausalLM" in type(there).__name__
            ):  # transformers' own classes continue after the padding
                texts = there.generate(rows, attention_mask=mask, use_cache=use_cache, **OPTIONS)[:, 12:]
                assert [text.tolist() for text in texts] == [text.tolist() for text in alone]


@torch.no_grad()
def test_ways_of_generating_agree(there, ids):
    rows, mask = padded(ids, left=True)
    beams = [
        there.generate(rows, attention_mask=mask, num_beams=3, num_return_sequences=2, use_cache=use_cache, **OPTIONS)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)
    prompt = ids[:1, :9]
    plain = there.generate(prompt, use_cache=False, **OPTIONS)
    assert torch.equal(there.generate(prompt, **OPTIONS), plain)
    assert torch.equal(there.generate(prompt, prompt_lookup_num_tokens=3, **OPTIONS), plain)
    other = copy.deepcopy(there)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
    for assistant in (there, other):
        assert torch.equal(there.generate(prompt, assistant_model=assistant, **OPTIONS), plain)
    prefix = there(ids[:1, :5]).past_key_values
    assert torch.equal(there.generate(prompt, past_key_values=prefix, **OPTIONS), plain)
    told = there.generate(prompt, return_dict_in_generate=True, output_logits=True, **OPTIONS)
    close(torch.stack(told.logits, 1), there(plain[:, :-1], use_cache=False).logits[:, 8:])


@torch.no_grad()
def test_optional_outputs_are_returned(there, ids):
    whole = there(ids, use_cache=False).logits
    close(there(ids, logits_to_keep=2).logits, whole[:, -2:])
    close(there(ids, logits_to_keep=torch.tensor([5, 2]), use_cache=False).logits, whole[:, [5, 2]])
    given = there(ids, return_dict=False, use_cache=False)
    assert isinstance(given, tuple) and torch.equal(given[0], whole)
    states = there(ids, output_hidden_states=True, use_cache=False).hidden_states
    layers = there.network.core.stack.depth if hasattr(there, "network") else there.config.num_hidden_layers
    assert len(states) == layers + 1
    assert all(state.shape == states[0].shape and state.size(0) == 3 for state in states)
    if states[0].size(1) == ids.size(1):
        if not hasattr(getattr(there, "network", None), "head") or not hasattr(there.network.head, "local"):
            close(there.get_output_embeddings()(states[-1]), whole)
        rows, mask = padded(ids, left=True)
        with_padding = there(rows, attention_mask=mask, output_hidden_states=True).hidden_states
        close(with_padding[-1][1], states[-1][1, :12])
        close(with_padding[1][0, 7:], states[1][0, :5])


def test_losses_with_padding_are_those_of_the_texts_alone(there, ids):
    nats, count = 0.0, 0
    for row, length in enumerate(LENGTHS):
        text = ids[row : row + 1, :length]
        nats, count = nats + (length - 1) * there(text, labels=text).loss.item(), count + length - 1
    rows, mask = padded(ids, left=False)
    labels = rows.masked_fill(mask == 0, -100)
    assert there(rows, attention_mask=mask, labels=labels).loss.item() == pytest.approx(nats / count, abs=1e-4)
    if "Stlm" in type(there).__name__:
        rows, mask = padded(ids, left=True)
        labels = rows.masked_fill(mask == 0, -100)
        assert there(rows, attention_mask=mask, labels=labels).loss.item() == pytest.approx(nats / count, abs=1e-4)


def test_layers_that_recompute_give_the_same_gradient(there, ids):
    there.train()
    gradients = []
    for recompute in (False, True):
        there.gradient_checkpointing_enable() if recompute else there.gradient_checkpointing_disable()
        there.zero_grad()
        there(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in there.parameters() if p.grad is not None])
    assert there.is_gradient_checkpointing
    there.gradient_checkpointing_disable()
    there.zero_grad()
    there.eval()
    assert gradients[0] and all(map(torch.equal, *gradients))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["remote", "native"])
def test_vectors_instead_of_ids(bytes_there, kind, ids):
    there = bytes_there[kind]
    vectors = there.get_input_embeddings()(ids)
    close(there(inputs_embeds=vectors).logits, there(ids).logits)
    close(there(inputs_embeds=vectors, use_cache=False).logits, there(ids).logits)
    new = there.generate(inputs_embeds=vectors[:, :6], **OPTIONS)
    assert torch.equal(new, there.generate(ids[:, :6], **OPTIONS)[:, 6:])


REFUSED = {
    "output_attentions": ({"output_attentions": True}, ValueError),
    "unknown argument mistyped": ({"mistyped": 1}, TypeError),
    "position_ids": ({"position_ids": torch.arange(1, 21)[None]}, ValueError),
    "token_type_ids": ({"token_type_ids": torch.ones(3, 20, dtype=torch.long)}, ValueError),
    r"attention_mask: got the shape \[3, 1, 20, 20\]": ({"attention_mask": torch.ones(3, 1, 20, 20)}, ValueError),
    "attention_mask: all of row 1": ({"attention_mask": torch.tensor([[1], [0], [1]]).expand(3, 20)}, ValueError),
    "cache: got a DynamicCache": ({"past_key_values": transformers.DynamicCache()}, TypeError),
    "either input_ids or inputs_embeds": ({"inputs_embeds": torch.zeros(3, 20, 16)}, ValueError),
    "logits_to_keep": ({"logits_to_keep": 1, "labels": torch.zeros(3, 20, dtype=torch.long)}, ValueError),
    "output_hidden_states": ({"output_hidden_states": True, "use_cache": True}, ValueError),
}


@pytest.mark.parametrize("message", REFUSED)
def test_unsupported_options_are_refused(ids, message):
    there = remote(make(FAMILIES["fixed patches"]))
    options, error = REFUSED[message]
    with pytest.raises(error, match=message):
        there(ids, **options)


def test_unsupported_calls_are_refused(ids):
    there = remote(make(FAMILIES["fixed patches"]))
    with pytest.raises(ValueError, match="inputs_embeds: this model also reads the ids themselves"):
        there(inputs_embeds=torch.zeros(3, 20, 16))
    with pytest.raises(ValueError, match="cache_implementation: got 'static'"):
        there.generate(ids, cache_implementation="static", **OPTIONS)
    with pytest.raises(ValueError, match="assistant_early_exit"):
        there.generate(ids[:1], assistant_early_exit=1, **OPTIONS)
    with pytest.raises(NotImplementedError, match="generate_batch: this model has no paged cache"):
        there.generate_batch([[START]])
    with pytest.raises(NotImplementedError, match="resize_token_embeddings: got 300"):
        there.resize_token_embeddings(300)
    cache = there(ids[:, :4], attention_mask=torch.ones(3, 4)).cache
    with pytest.raises(ValueError, match="differs from the mask"):
        there(ids[:, 4:], cache=cache, attention_mask=torch.cat((torch.zeros(3, 1), torch.ones(3, 19)), 1))
    there.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use_cache"):
        there(ids, use_cache=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Make folders of two models that have learned conversations, by the class that loads them."""
    folder = tmp_path_factory.mktemp("exported")
    for kind, parts in (("native", FAMILIES["native"]), ("remote", FAMILIES["fixed patches"])):
        model = make(parts, context=128)
        model.tokenizer.chat_template = TEMPLATE
        model.save(folder / kind / "model")
        convert_to("huggingface", folder / kind / "model", folder / kind / "out")
    return folder


def load(exported, kind):
    folder = str(exported / kind / "out")
    options = {"trust_remote_code": kind == "remote"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["native", "remote"])
def test_models_can_be_loaded_and_created_from_a_config(exported, kind, tmp_path, ids):
    tokenizer, there = load(exported, kind)
    assert "token_type_ids" not in tokenizer("a")
    config, options = there.config, {"trust_remote_code": True}
    halved = transformers.AutoModelForCausalLM.from_pretrained(
        exported / kind / "out", torch_dtype=torch.bfloat16, **options
    )
    assert halved.dtype == torch.bfloat16
    assert (halved(ids).logits.float() - there(ids).logits).abs().max() < 0.3
    halved.generate(ids[:, :5], **OPTIONS)
    new = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    assert torch.isfinite(new(ids).logits).all() and not torch.equal(new(ids).logits, there(ids).logits)
    with torch.device("meta"):
        nowhere = transformers.AutoModelForCausalLM.from_config(config, **options)
    assert all(parameter.is_meta for parameter in nowhere.parameters())
    new.tie_weights()
    assert new.get_input_embeddings().weight is new.get_output_embeddings().weight
    there.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32, **options)
    assert torch.equal(again(ids).logits, there(ids).logits)
    assert again.generation_config.eos_token_id == there.generation_config.eos_token_id


def test_initial_values_are_made_once_and_are_those_of_a_new_model(monkeypatch):
    from stlm.export.remote import modeling_stlm

    builds = []
    build = modeling_stlm.StlmConfig.build
    monkeypatch.setattr(modeling_stlm.StlmConfig, "build", lambda self: builds.append(1) or build(self))
    there = remote(make(FAMILIES["fixed patches"]))
    builds.clear()
    new = modeling_stlm.StlmForCausalLM(there.config)
    assert len(builds) == 2  # one model, and one generator of its values, for any number of modules
    fresh = STLM.from_config(there.config.settings(), build_tokenizer("byte"), seed=0)
    for name, parameter in fresh.named_parameters():
        assert torch.equal(new.network.get_parameter(name), parameter), name


CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "Hi" * n}, {"role": "assistant", "content": "You"}]} for n in range(1, 9)
]


@pytest.mark.parametrize("kind", ["native", "remote"])
def test_trl_and_peft_train_it(exported, kind, tmp_path, ids):
    trl = pytest.importorskip("trl", reason="needs trl")
    peft = pytest.importorskip("peft", reason="needs peft")
    from datasets import Dataset

    def arguments(**others):
        return trl.SFTConfig(
            str(tmp_path / "sft"), max_steps=6, learning_rate=1e-2, use_cpu=True, bf16=False, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_steps=1, max_length=64, **others,
        )  # fmt: skip

    tokenizer, there = load(exported, kind)
    data = Dataset.from_list(CONVERSATIONS)
    trainer = trl.SFTTrainer(there, args=arguments(eval_strategy="steps", eval_steps=6), train_dataset=data,
                             eval_dataset=data, processing_class=tokenizer)  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    told = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    texts = [tokenizer.apply_chat_template(each["messages"])["input_ids"] for each in CONVERSATIONS]
    assert texts[0][:3] == [START, 0xFF, 2]
    there.eval()
    with torch.no_grad():
        nats = sum((len(t) - 1) * there(torch.tensor([t]), labels=torch.tensor([t])).loss.item() for t in texts)
    assert told == pytest.approx(nats / sum(len(text) - 1 for text in texts), abs=0.02)

    tuned = peft.get_peft_model(there, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    trainer = trl.SFTTrainer(
        tuned, args=arguments(gradient_checkpointing=True), train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    tuned.eval()
    expected = tuned(ids).logits
    tuned.save_pretrained(tmp_path / "peft")
    _, base = load(exported, kind)
    base.load_state_dict({name.replace(".base_layer", ""): tensor for name, tensor in
                          tuned.get_base_model().state_dict().items() if "lora_" not in name})  # fmt: skip
    close(peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()(ids).logits, expected)


def test_a_loss_made_outside_is_refused_where_the_model_has_terms_of_its_own(ids):
    there = remote(make(FAMILIES["experts"])).train()
    with pytest.raises(ValueError, match=r"further terms .* transformers\.Trainer"):
        there.base_model(ids)
    there.eval()
    states = there.base_model(ids).last_hidden_state
    close(there.get_output_embeddings()(states), there(ids).logits)


@pytest.mark.parametrize("kind", ["native", "remote"])
def test_the_card_is_right(exported, kind, monkeypatch, capsys, tmp_path):
    folder = exported / kind / "out"
    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    shown = re.search(r"This prints:\n\n(.*?)\n\nThe tokenizer", card, re.DOTALL)[1]
    letters = "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in printed)
    assert [line.removeprefix("    ") for line in shown.splitlines()] == letters.splitlines()
    licence = folder / "LICENSE"
    assert licence.is_file() == (kind == "remote") == ("MIT" in card)
    if kind == "remote":
        assert licence.read_text() == (Path(__file__).parents[2] / "LICENSE").read_text()


def test_the_command_of_the_card_can_be_typed():
    from stlm.export.origin import _launch_command

    recorded = "scripts/pretrain.py --local_rank=0 --ds_config ds_configs/zero2.json --set 'a=b c'"
    assert _launch_command(recorded) == "deepspeed scripts/pretrain.py --ds_config ds_configs/zero2.json --set 'a=b c'"
    assert _launch_command(None) is None and _launch_command("mine --now") == "mine --now"
