"""Sampling, the decoding loop and windowed scoring, on models with known probabilities."""

import pytest
import torch

from stlm.generation import TextStream, generate_ids, nats_per_id, sample

NOTHING_BANNED = torch.zeros(4, dtype=torch.bool)


def draw(logits, times=4000, **options):
    """Share of each id over many draws."""
    generator = torch.Generator().manual_seed(0)
    drawn = sample(torch.tensor([logits]).expand(times, -1), generator, **options)
    return torch.bincount(drawn, minlength=len(logits)) / times


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
    ],
)
def test_sampling_draws_from_the_stated_distribution(options, expected):
    share = draw(PROBABILITIES.log().tolist(), **options)
    assert torch.equal(share > 0, expected > 0)
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)


class Counter:
    """Says that the next id is the last one plus 1 (mod 4); records what it is made to read at once."""

    def __init__(self):
        self.reads = []

    def begin(self, batch_size):
        return self.after(torch.tensor([3])), None

    def step(self, ids, state):
        self.reads.append(ids[0].tolist())
        return self.after(ids[0])[None]

    @staticmethod
    def after(ids):
        return 50.0 * torch.nn.functional.one_hot((ids + 1) % 4, 4).float()


def run(prompt, **options):
    model = Counter()
    options = {
        "max_new_ids": 6,
        "context_length": 100,
        "stop_id": 99,
        "banned_ids": NOTHING_BANNED,
        "seed": 0,
    } | options
    return list(generate_ids(model, prompt, **options)), model.reads


def test_generation_follows_the_model():
    assert run([2])[0] == [3, 0, 1, 2, 3, 0]
    assert run([])[0] == [0, 1, 2, 3, 0, 1]


def test_generation_ends_before_the_stop_id():
    assert run([0], stop_id=3)[0] == [1, 2]


def test_banned_ids_are_never_drawn():
    assert 1 not in run([0], banned_ids=torch.tensor([False, True, False, False]))[0]


def test_a_full_context_is_read_anew_from_its_last_half():
    ids, reads = run([0, 1], context_length=4, max_new_ids=5)
    assert ids == [2, 3, 0, 1, 2]
    assert reads == [[0, 1], [2], [2, 3], [0], [0, 1], [2]]


def test_a_prompt_longer_than_the_context_keeps_its_end():
    assert run([0, 1, 2, 3, 0, 1], context_length=4, max_new_ids=1)[1][0] == [3, 0, 1]


def test_a_context_of_one_id_reads_nothing():
    assert run([0, 1, 2], context_length=1, max_new_ids=3) == ([0, 0, 0], [])


def test_any_seed_will_do():
    assert run([2], seed=10**30, max_new_ids=2)[0] == [3, 0]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 20, 33])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_score_every_id_once_with_at_least_the_promised_context(length, stride):
    """The logits tell how many ids of the window came before: the score of an id is then that number."""

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
