"""The scheduler without a server: a failure of one text affects only that text."""

import queue

import pytest
import torch

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import ModelConfig, from_dict
from stlm.generation import Sampling
from stlm.serving.scheduler import Prompt, Scheduler
from stlm.stlm import STLM


@pytest.fixture(scope="module")
def model():
    patches = {"kind": "byte_patch", "width": 16, "patching": {"kind": "fixed"}}
    parts = {"embedder": patches, "head": {"kind": "byte_patch"}, "core": {"num_layers": 1}}
    config = from_dict(ModelConfig, {"context_length": 64, "width": 32, **parts})
    model = STLM.from_config(config, build_tokenizer("byte"), seed=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3 if parameter.ndim > 1 else 1
    return model


@pytest.mark.parametrize("place", ["reading", "drawing", "decoding", "telling"])
def test_a_failing_text_does_not_affect_the_others(model, monkeypatch, place):
    prompts = ["The first", "The second one", "a third", "4", "the fifth of them"]
    rules = [Sampling(temperature=number % 2, seed=number) for number in range(5)]
    expected = [model.generate(prompt, max_new_ids=40, sampling=rules[n]) for n, prompt in enumerate(prompts)]
    scheduler = Scheduler(model, max_rows=4, max_waiting=8)
    told = [queue.Queue() for _ in prompts]
    try:
        jobs = [
            scheduler.job(Prompt(model.prompt_ids(prompt)), rules[n], 40, (), told[n].put)
            for n, prompt in enumerate(prompts)
        ]
        poisoned, untouched = jobs[1], jobs[1].send

        def fail(*given):
            raise RuntimeError("poison")

        def fail_later(piece):
            fail() if poisoned.row.sampler.remaining == 30 else untouched(piece)

        if place == "reading":
            monkeypatch.setattr(poisoned.row, "window", [*poisoned.row.window, -1])  # no id
        elif place == "drawing":
            monkeypatch.setattr(poisoned.row.sampler, "accept", fail)
        elif place == "decoding":
            monkeypatch.setattr(poisoned.stream, "push", fail)
        else:
            monkeypatch.setattr(poisoned, "send", fail_later)
        scheduler.submit(jobs)
        for number in (0, 2, 3, 4):
            assert whole(told[number])[0] == expected[number]
        if place != "telling":  # then no client can be told
            assert whole(told[1])[1] == "error"
        assert scheduler.load() == (0, 0)
    finally:
        scheduler.close()


def whole(pieces):
    """Return the text of a job and how it ended."""
    text = ""
    while True:
        piece = pieces.get(timeout=60)
        text += piece.text
        if piece.finish is not None:
            return text, piece.finish
