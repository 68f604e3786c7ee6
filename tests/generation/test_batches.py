"""Rows decoded together: each gets the text that it would get alone, whatever the other rows are."""

import pytest
import torch

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import ModelConfig, from_dict
from stlm.errors import ConfigError
from stlm.generation import DecodingBatch, DecodingStats, Sampling
from stlm.stlm import STLM

LOCAL = {"kind": "byte_patch", "width": 16, "window": 5}
CORE = {"num_layers": 2, "attention": {"num_heads": 4, "num_kv_heads": 2}}
MODELS = {
    "bytes": {"embedder": {"kind": "byte", "ngrams": {"table_size": 20}}, "core": CORE},
    "windows": {"core": {"num_layers": 3, "attention": {"num_heads": 2, "window": 6, "full_every": 3}}},
    "learned positions": {"core": {**CORE, "positions": {"kind": "learned"}}},
    "linear biases, capped": {
        "core": {"num_layers": 2, "attention": {"num_heads": 2, "logit_cap": 5.0}, "positions": {"kind": "alibi"}}
    },
    "fixed patches": {
        "embedder": {**LOCAL, "patching": {"kind": "fixed", "patch_size": 4}},
        "head": {"kind": "byte_patch", "window": 6},
        "core": CORE,
    },
    "patches of words, learned positions": {
        "embedder": {**LOCAL, "patching": {"kind": "space", "patch_length": 3.0, "span": 4}},
        "head": {"kind": "byte_patch", "window": 6},
        "core": {**CORE, "positions": {"kind": "learned"}},
    },
}
PROMPTS = ["A text of some length,", "", "another", "a b c d", "Ünïcode", "far longer than the context is: " * 3]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make(request.param)


def make(name):
    config = from_dict(ModelConfig, {"context_length": 32, "width": 32, **MODELS[name]})
    model = STLM.from_config(config, build_tokenizer("byte"), seed=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 3  # an untrained model would predict the same after any text
    return model


@torch.no_grad()
def test_joined_rows_continue_as_each_would_alone(model):
    ids = torch.randint(32, 127, (3, 31), generator=torch.Generator().manual_seed(1))
    whole = model(ids).logits
    states = [model.begin(1, ids[[row], :read])[1] for row, read in enumerate((7, 1, 16))]
    zero = torch.tensor([0])
    state = model.join([(state, zero) for state in states])
    said = [model.step(torch.stack([ids[0, 7 + n], ids[1, 1 + n], ids[2, 16 + n]])[:, None], state) for n in range(5)]
    for row, read in enumerate((7, 1, 16)):
        together = torch.cat(said, 1)[row]
        torch.testing.assert_close(together, whole[row, read + 1 : read + 6], atol=1e-5, rtol=0)
    # One row leaves, one joins again, and all read several ids at once.
    state = model.join([(state, torch.tensor([1, 0])), (states[2], zero)])
    assert state.lengths == [6, 12, 16]
    said = model.step(torch.stack([ids[1, 6:14], ids[0, 12:20], ids[2, 16:24]]), state)
    for place, (row, read) in enumerate(((1, 6), (0, 12), (2, 16))):
        torch.testing.assert_close(said[place], whole[row, read + 1 : read + 9], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rules", [{"temperature": 0}, {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.1}])
def test_each_row_is_the_text_alone(model, rules):
    """Texts also exceed the context, where rows are reread at different times."""
    together = model.generate_batch(PROMPTS, max_new_ids=40, seed=5, **rules)
    alone = [model.generate(prompt, max_new_ids=40, **{"seed": 5 + row, **rules}) for row, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert len(set(together)) == len(PROMPTS)


def test_rows_join_and_leave_at_any_step(model):
    """A row joins at every second step, each with its own rules, and the third one leaves early."""
    rules = [Sampling(temperature=n % 3 / 2, seed=n) for n in range(len(PROMPTS))]
    expected = [model.generate(prompt, max_new_ids=12, sampling=rules[n]) for n, prompt in enumerate(PROMPTS)]
    batch, drawn, rows = DecodingBatch(model, 32), {}, []
    for n in range(40):
        if n % 2 == 0 and n // 2 < len(PROMPTS):
            row = model.row(PROMPTS[n // 2], rules[n // 2], 12)
            batch.add([row])
            rows.append(row)
        if n == 7:
            batch.remove(rows[2])
        for row in batch.step():
            drawn.setdefault(row, []).append(row.last_id)
            if row.sampler.remaining == 0:
                batch.remove(row)
    assert len(batch) == 0 and len(drawn[rows[2]]) == 3
    for row, text in zip(rows, expected, strict=True):
        assert row is rows[2] or model.tokenizer.decode(drawn[row]) == text


def test_samples_of_one_prompt_differ_and_stop_at_stop_strings(model):
    texts = model.generate_batch(["a"] * 4, max_new_ids=30, seed=1)
    assert len(set(texts)) == 4
    stop = texts[0][5:7]
    assert model.generate_batch(["a"] * 4, max_new_ids=30, seed=1, stop=[stop])[0] == texts[0].split(stop)[0]
    assert model.generate_batch([], max_new_ids=3) == [] and model.generate_batch(["a"], max_new_ids=0) == [""]


def test_constrained_text_holds_no_replacement_character(model):
    free = model.generate_batch(["a"] * 4, max_new_ids=25)
    assert any("\ufffd" in text for text in free)
    texts = model.generate_batch(["a"] * 4, max_new_ids=25, valid_utf8=True)
    assert not any("\ufffd" in text for text in texts) and any(not text.isascii() for text in texts)
    assert texts[0] == model.generate("a", max_new_ids=25, valid_utf8=True)


@torch.no_grad()
def test_a_model_optimized_for_decoding_is_the_same_but_for_rounding(model, tmp_path):
    ids = torch.randint(32, 127, (2, 31), generator=torch.Generator().manual_seed(1))
    before, text = model(ids).logits, model.generate("ab", max_new_ids=20, seed=2)
    model.save(tmp_path / "before")
    optimized = STLM.load(tmp_path / "before").optimize_for_decoding()
    assert optimized.core.stack.packed and optimized.head.packed
    assert optimized.num_parameters() == model.num_parameters()
    torch.testing.assert_close(optimized(ids).logits, before, atol=1e-5, rtol=0)
    assert optimized.generate("ab", max_new_ids=20, seed=2) == text
    optimized.save(tmp_path / "after")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]


def test_copied_drafts_do_not_change_texts(model):
    text = "one two three, one two three, one"
    plain = model.generate(text, max_new_ids=40, temperature=0, speculative=None)
    assert model.generate(text, max_new_ids=40, temperature=0, speculative="ngram") == plain
    copied, drawn = DecodingStats(), DecodingStats()
    assert model.generate(text, max_new_ids=40, temperature=0, stats=copied) == plain
    assert copied.ids  # statistics exist, so copying was enabled
    drawn_text = model.generate(text, max_new_ids=40, seed=1, stats=drawn)
    assert drawn_text == model.generate(text, max_new_ids=40, seed=1, speculative=None) and not drawn.ids


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate_batch("abc"), "prompts: got one str, expected a list of texts"),
        (lambda model: model.generate_batch(["a", b"b"]), r"prompts\[1\]: got bytes, expected one text"),
        (lambda model: model.embed("abc"), "texts: got one str, expected a list of texts"),
        (lambda model: model.generate(["a"]), "prompt: got list, expected one text"),
        (lambda model: model.log_likelihood(["a"]), "text: got list, expected one text"),
        (lambda model: model.beam_search(["a"]), "prompt: got list, expected one text"),
        (lambda model: model.beam_search("a", num_beams=0), "num_beams: got 0, expected an integer of at least 1"),
        (
            lambda model: model.beam_search("a", max_new_ids=-1),
            "max_new_ids: got -1, expected an integer of at least 0",
        ),
        (lambda model: model.generate_stream("a", max_new_ids=-1), "max_new_ids: got -1"),  # before anything is drawn
        (lambda model: model.generate("a", max_new_ids=2.5), "max_new_ids: got 2.5"),
        (lambda model: model.generate_batch(["a"], max_new_ids=-1), "max_new_ids: got -1"),
        (lambda model: model.generate("a", temperature=0, num_drafts=0), "num_drafts: got 0"),
        (lambda model: model.generate("a", top_k=2.5), "top_k: got 2.5"),
        (lambda model: model.generate("a", stop=""), "stop: got ''"),
        (lambda model: model.generate_batch(["a"], stop=["b", ""]), "stop: got ''"),
        (lambda model: model.generate("a", stop=None), "stop: got one NoneType, expected a list"),
        (lambda model: model.generate("a", stop=[1]), r"stop\[0\]: got int"),
        (lambda model: model.generate("a", stop="\udcff"), "stop: got .* lone surrogate"),
        (lambda model: model.generate("a", exit_threshold="x"), "exit_threshold: got 'x', expected a number"),
        (lambda model: model.generate("a", tempreature=1), "tempreature: unknown option; expected any of"),
        (lambda model: model.generate("a", sampling={"seed": 1}), "sampling: got dict, expected a Sampling"),
        (lambda model: model.generate_batch(["a"], sampling=Sampling(), seed=1), "seed: given in addition to sampling"),
    ],
)
def test_values_out_of_range_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call(make("bytes"))


def test_a_stop_string_alone_is_one_string():
    model = make("bytes")
    drawn = {"max_new_ids": 60, "temperature": 0.2, "seed": 3}
    text = model.generate("a", **drawn)
    # A string that occurs for the first time, although its first letter occurs earlier.
    stop = next(text[at : at + 2] for at in range(1, len(text) - 2)
                if text[at] in text[:at] and text.index(text[at : at + 2]) == at)  # fmt: skip
    ended = model.generate("a", **drawn, stop=stop)
    assert ended == text[: text.index(stop)] and stop[0] in ended
    assert model.generate_batch(["a"], **drawn, stop=stop) == [ended]


def test_rows_continue_together_when_others_have_stopped(model):
    """Two rows of equal length remain of a batch whose rows had different lengths."""
    prompts, rules = ["The text is long", "The text", "A texts "], {"max_new_ids": 20, "temperature": 0}
    alone = [model.generate(prompt, **rules) for prompt in prompts]
    stop = next(piece for piece in (alone[0][n : n + 2] for n in range(2, 18)) if piece not in alone[1] + alone[2])
    together = model.generate_batch(prompts, stop=[stop], **rules)
    assert together == [alone[0].split(stop)[0], *alone[1:]]


@pytest.mark.parametrize("place", ["begin", "step", "accept"])
def test_a_row_that_fails_leaves_the_others_as_they_are(model, monkeypatch, place):
    """Either the model fails on the row's ids, in its first step or later, or the row itself fails."""
    rules = [Sampling(temperature=n % 2, seed=n) for n in range(len(PROMPTS))]
    expected = [model.generate(prompt, max_new_ids=40, sampling=rules[n]) for n, prompt in enumerate(PROMPTS)]
    rows = [model.row(prompt, rules[n], 40) for n, prompt in enumerate(PROMPTS)]
    poisoned = rows[3]
    original = getattr(poisoned.sampler if place == "accept" else model, place)

    def fail(*given):
        whole = place == "begin" and any(row == poisoned.window for row in given[1].tolist())
        later = place == "step" and len(given[0]) == len(PROMPTS) and poisoned.sampler.remaining == 35
        if whole or later or (place == "accept" and poisoned.sampler.remaining == 35):
            poisoned.window[-1] = -1  # no valid id: reading this row fails from now on
            raise RuntimeError("poison")
        return original(*given)

    monkeypatch.setattr(poisoned.sampler if place == "accept" else model, place, fail)
    batch, drawn = DecodingBatch(model, 32), {row: [] for row in rows}
    batch.add(rows)
    while len(batch):
        for row in batch.step():
            if row.error is None:
                drawn[row].append(row.last_id)
            if row.sampler.remaining == 0:
                batch.remove(row)
    assert [row.error is not None for row in rows] == [row is poisoned for row in rows]
    for row, text in zip(rows, expected, strict=True):
        assert row is poisoned or model.tokenizer.decode(drawn[row]) == text


def test_rows_with_one_prompt_share_one_reading_of_it(model, monkeypatch):
    """Each row still draws its own ids, and continues independently."""
    read, begin = [], model.begin

    def counted(batch_size, ids_BN=None):
        read.append(batch_size)
        return begin(batch_size, ids_BN)

    alone = [model.generate("another", max_new_ids=20, seed=seed) for seed in range(4)]
    monkeypatch.setattr(model, "begin", counted)
    prompts = ["another"] * 4 + ["A text"]
    assert model.generate_batch(prompts, max_new_ids=20, sampling=Sampling(seed=0))[:4] == alone
    assert read == [1, 1]


def test_a_text_has_the_same_score_in_one_piece_and_in_many(model, monkeypatch):
    from stlm.generation import scoring

    ids = list(b"\xffsome text of thirty bytes here")
    log_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for logits_at_once in (1 << 24, 7 * 256, 1):
        monkeypatch.setattr(scoring, "MAX_LOGITS", logits_at_once)
        for place, found in enumerate(scoring.score_ids(model, ids, 2)):
            expected = [log_TV[place, ids[place]].item(), *log_TV[place].topk(2).values.tolist()]
            told = [found.log_probability, *(value for _, value in found.top)]
            assert told == pytest.approx(expected, abs=1e-4) and found.id == ids[place]
