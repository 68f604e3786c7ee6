"""Sampling, the decoding loop and windowed scoring, on models with known probabilities."""

import math

import pytest
import torch

from stlm.errors import ConfigError
from stlm.generation import Sampler, Sampling, TextStream, UTF8Automaton, generate_ids, nats_per_id
from stlm.generation.sampler import distribution, sample_ids

NOTHING_BANNED = torch.zeros(4, dtype=torch.bool)


def shares(logits, times=4000, prompt=(), **rules):
    """Return the share of each id over many draws, one row each."""
    rows = [Sampler(Sampling(**rules, seed=seed), prompt, NOTHING_BANNED, 1, 99) for seed in range(times)]
    drawn = sample_ids(torch.tensor([logits]).expand(times, -1), rows)
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / times


PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05])


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, PROBABILITIES),
        ({"top_k": 2}, torch.tensor([0.625, 0.375, 0, 0])),
        ({"top_p": 0.8}, torch.tensor([0.625, 0.375, 0, 0])),  # 0.5 + 0.3 reach 0.8: the third is not needed
        ({"top_p": 0.81}, torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95),
        ({"top_p": 0.0}, torch.tensor([1.0, 0, 0, 0])),
        ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        ({"temperature": 1e-40}, torch.tensor([1.0, 0, 0, 0])),
        ({"temperature": 1e-320, "top_k": 3, "top_p": 0.9}, torch.tensor([1.0, 0, 0, 0])),
        ({"temperature": 0}, torch.tensor([1.0, 0, 0, 0])),
        ({"min_p": 0.3}, torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95),
        ({"min_p": 0.31}, torch.tensor([0.625, 0.375, 0, 0])),
        ({"typical_p": 0.2}, torch.tensor([0, 1.0, 0, 0])),  # 1.14 nats: 1.20 are nearest to 1.14
        ({"typical_p": 0.31}, torch.tensor([0.625, 0.375, 0, 0])),
    ],
)
def test_sampling_draws_from_the_stated_distribution(options, expected):
    share = shares(PROBABILITIES.log().tolist(), **options)
    assert torch.equal(share > 0, expected > 0)
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)


def test_penalties_follow_their_formulas():
    """Worked out for prompt [1] and text [2, 2, 3], with logits 2, 1, -1 and 3."""
    logits = torch.tensor([[2.0, 1.0, -1.0, 3.0]])
    for rules, expected in [
        ({"repetition_penalty": 2.0}, [2.0, 0.5, -2.0, 1.5]),
        ({"frequency_penalty": 0.5}, [2.0, 1.0, -2.0, 2.5]),
        ({"presence_penalty": 0.5}, [2.0, 1.0, -1.5, 2.5]),
    ]:
        row = Sampler(Sampling(**rules, temperature=1.0), [1], NOTHING_BANNED, 9, 99)
        for id in (2, 2, 3):
            row.accept(id)
        ahead = row.copy()
        ahead.accept(0)  # rejected drafts leave no trace
        torch.testing.assert_close(distribution(logits, [row]), torch.tensor([expected]).softmax(-1))


def test_rows_with_different_rules_are_drawn_as_if_alone():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    rules = [{}, {"temperature": 0}, {"top_k": 2, "temperature": 3.0}] * 2

    def rows():
        return [Sampler(Sampling(**given, seed=n), [], NOTHING_BANNED, 9, 99) for n, given in enumerate(rules)]

    together, alone = rows(), rows()
    for _ in range(5):
        expected = [sample_ids(logits[n : n + 1], [row])[0] for n, row in enumerate(alone)]
        assert sample_ids(logits, together) == expected


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"temperature": -1}, "temperature: got -1, expected a number from 0 to 100"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"top_p": 1.5}, "top_p: got 1.5, expected a number from 0 to 1"),
        ({"top_k": 0}, "top_k: got 0, expected an integer of at least 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0"),
        ({"frequency_penalty": math.inf}, "frequency_penalty: got inf"),
        ({"temperature": "1"}, "temperature: got '1', expected a number from 0 to 100"),
        ({"temperature": None}, "temperature: got None"),
        ({"seed": 1.5}, "seed: got 1.5, expected an integer"),
        ({"valid_utf8": "no"}, "valid_utf8: got 'no', expected True or False"),
        ({"logit_bias": {65: 1.0}}, "logit_bias: got {65: 1.0}, expected pairs"),
        ({"logit_bias": ((65, 101),)}, "logit_bias of id 65: got 101, expected a number from -100 to 100"),
    ],
)
def test_rules_out_of_range_are_refused(rules, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**rules)


ALL_BYTES = UTF8Automaton([bytes([byte]) for byte in range(256)])


def test_the_automaton_agrees_with_pythons_decoder():
    """Checked on all beginnings of up to four bytes at the edges of the automaton's classes."""
    edges = (0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF,
             0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF)  # fmt: skip
    reached = [(b"", 0)]
    for left in (4, 3, 2, 1):
        longer = []
        for text, state in reached:
            refused = ALL_BYTES.banned(state, left)
            for byte in edges:
                said = text + bytes([byte])
                assert bool(refused[byte]) == (not can_be_valid(said, left - 1)), (said, left)
                if not refused[byte]:
                    longer.append((said, ALL_BYTES.next_state(state, byte)))
        reached = longer
    assert len(reached) > 100 and all(text.decode() for text, _ in reached)


def can_be_valid(text, left):
    """Return whether up to `left` more bytes can make it valid."""
    ways = (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xbf", b"\xbf\x80", b"\xbf\x80\x80", b"\x90\x80\x80")
    for way in ways:
        try:
            if len(way) <= left:
                (text + way).decode()
                return True
        except UnicodeDecodeError:
            pass
    return False


def test_constrained_text_is_always_valid_and_complete():
    banned = torch.tensor([byte in (0xC0, 0xC1) or 0xF5 <= byte < 0xFF for byte in range(256)])
    for seed in range(30):
        row = Sampler(Sampling(valid_utf8=True, seed=seed), [], banned, 7, 0xFF, ALL_BYTES)
        logits, drawn = 5 * torch.randn(7, 1, 256, generator=torch.Generator().manual_seed(seed)), []
        while row.remaining and 0xFF not in drawn:
            drawn += sample_ids(logits[row.remaining - 1], [row])
            row.accept(drawn[-1])
        bytes(id for id in drawn if id != 0xFF).decode()


class Counter:
    """Predicts the last id plus 1 (mod 4) as the next id; records the ids read at once."""

    def __init__(self):
        self.reads = []

    def begin(self, batch_size, ids=None):
        if ids is not None and ids.numel():
            return self.step(ids, None)[:, -1], None
        return self.after(torch.tensor([3])), None

    def step(self, ids, state):
        self.reads.append(ids[0].tolist())
        return self.after(ids[0])[None]

    @staticmethod
    def after(ids):
        return 50.0 * torch.nn.functional.one_hot((ids + 1) % 4, 4).float()


def run(prompt, max_new_ids=6, context_length=100, stop_id=99, banned=NOTHING_BANNED, seed=0):
    model = Counter()
    sampler = Sampler(Sampling(seed=seed), prompt, banned, max_new_ids, stop_id)
    return list(generate_ids(model, prompt, sampler, context_length=context_length, stop_id=stop_id)), model.reads


def test_generation_follows_the_model():
    assert run([2])[0] == [3, 0, 1, 2, 3, 0]
    assert run([])[0] == [0, 1, 2, 3, 0, 1]


def test_generation_ends_before_the_stop_id():
    assert run([0], stop_id=3)[0] == [1, 2]


def test_banned_ids_are_never_drawn():
    assert 1 not in run([0], banned=torch.tensor([False, True, False, False]))[0]


def test_a_full_context_is_reread_from_its_last_half():
    ids, reads = run([0, 1], context_length=4, max_new_ids=5)
    assert ids == [2, 3, 0, 1, 2]
    assert reads == [[0, 1], [2], [2, 3], [0], [0, 1]]


def test_a_prompt_longer_than_the_context_keeps_its_end():
    assert run([0, 1, 2, 3, 0, 1], context_length=4, max_new_ids=1)[1][0] == [3, 0, 1]


def test_a_context_of_one_id_reads_nothing():
    assert run([0, 1, 2], context_length=1, max_new_ids=3) == ([0, 0, 0], [])


def test_any_seed_will_do():
    assert run([2], seed=10**30, max_new_ids=2)[0] == [3, 0]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 20, 33])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_score_every_id_once_with_at_least_the_promised_context(length, stride):
    """The logits encode the number of preceding ids in the window, so the score of an id is that number."""

    def logits_of(ids_BT):
        nats = torch.arange(ids_BT.size(1), dtype=torch.float64).expand(ids_BT.shape)
        others = torch.log(torch.expm1(nats).clamp_min(1e-300))  # log of e^n - 1: -log softmax of the id is then n
        return torch.where(torch.arange(2) == ids_BT[..., None], 0.0, others[..., None])

    ids = torch.arange(length) % 2
    seen = torch.cat(list(nats_per_id(logits_of, ids, context_length=8, stride=stride, batch_size=3)))
    expected = [t if t < 8 else 8 - stride + (t - 8) % stride for t in range(length)]
    torch.testing.assert_close(seen, torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=0)


def test_text_stream_holds_back_unfinished_characters():
    class Bytes:
        def decode_bytes(self, ids):
            return bytes(ids)

    stream = TextStream(Bytes())
    assert [stream.push(byte) for byte in "é!".encode()] == ["", "é", "!"]
    assert stream.push(0xE2) == "" and stream.push(0x41) == "\ufffdA"
    assert stream.push(0xF0) == "" and stream.close() == "\ufffd"


def test_a_stop_string_ends_the_text_wherever_pieces_begin():
    class Pieces:
        def decode_bytes(self, ids):
            return b"".join(PIECES[id] for id in ids)

    def shown(*stop):
        stream, said = TextStream(Pieces(), stop), []
        for id in range(len(PIECES)):
            said.append(stream.push(id))
            if stream.stopped:
                break
        return [*said, stream.close()]

    PIECES = [b"ab", b"a", b"ba", b"cd ", "é".encode()[:1], "é".encode()[1:]]
    assert "".join(shown("abac")) == "ab"  # in "ababac" the first "aba" is only a partial match
    assert shown("bac", "é")[:3] == ["a", "", "ba"]
    assert shown("é") == ["ab", "a", "ba", "cd ", "", "", ""]
    assert "".join(shown("abx", "d é!")) == "ababacd é"
