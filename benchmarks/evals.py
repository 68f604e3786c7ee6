#!/usr/bin/env python
"""All minimal pairs of BLiMP with one model, and the same pairs by lm-evaluation-harness from the same weights.

    python benchmarks/evals.py --tasks-dir DIR [--model RUN] [--pairs 500] [--whole]

DIR holds blimp.jsonl (docs/evals_reference.md). Without a run, the model is a new one of the preset 10m-token, as speed
does not depend on training; 4,096 subwords are learned from the default corpus. The harness reads the model with its
`hf` backend, from the folder that `convert_checkpoint.py --to huggingface` writes, in batches of 1 and of 64; its
work before and after the model is not counted. CPU is the processor time of all threads, which depends less on other
work on the machine; "all" is the time of all 67,000 pairs at that rate with every thread busy. `--whole` scores them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.sources.default_corpus.corpus import corpus_units, read_unit
from data_pipeline.tokenizers import train_sentencepiece
from stlm.config import load_run_config
from stlm.evals import LoadedTask, Row, log_likelihoods, table
from stlm.export import convert_to
from stlm.stlm import STLM

ALL = 67_000
Score = Callable[[Sequence[Sequence[Row]]], list[list[float]]]  # log-probabilities of both sentences of each pair


def ours(model: STLM, bf16: bool) -> Score:
    def score(pairs: Sequence[Sequence[Row]]) -> list[list[float]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = log_likelihoods(model, pairs)
        return [[one.log_probability for one in pair] for pair in found.by_question]

    return score


def theirs(model: STLM, folder: Path) -> Callable[[int], Score]:
    """Return a function from batch size to the harness's score on the same weights."""
    from lm_eval.models.huggingface import HFLM

    model.save(folder / "model")
    convert_to("huggingface", folder / "model", folder / "huggingface")
    harness = HFLM(pretrained=str(folder / "huggingface"), device="cpu", dtype="float32")
    front = [model.tokenizer.start_id, model.tokenizer.end_of_text_id]  # a sentence begins a document

    def in_batches_of(size: int) -> Score:
        def score(pairs: Sequence[Sequence[Row]]) -> list[list[float]]:
            harness.batch_size_per_gpu = size
            sentences = [row.continuation for pair in pairs for row in pair]
            encode = harness.tokenizer.encode
            requests = [(("", text), front, encode(text, add_special_tokens=False)) for text in sentences]
            found = [nats for nats, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]
            return [found[start : start + 2] for start in range(0, len(found), 2)]

        return score

    return in_batches_of


def new_model() -> STLM:
    documents = (text for package, files, _ in corpus_units() for text in read_unit(package, files))
    tokenizer = train_sentencepiece(islice(documents, 5000), 4096, "sentencepiece-bpe")
    return STLM.from_config(load_run_config("10m-token").model, tokenizer, seed=0).eval()


def right(scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    return scores[:, 0] > scores[:, 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks-dir", required=True, metavar="DIR")
    parser.add_argument("--model", metavar="RUN", help="run, checkpoint or model directory")
    parser.add_argument("--pairs", type=int, default=500, help="that both score (default: 500)")
    parser.add_argument("--whole", action="store_true", help="also score all pairs, in bf16")
    arguments = parser.parse_args()

    model = STLM.load(arguments.model) if arguments.model else new_model()
    questions = LoadedTask.read("blimp", arguments.tasks_dir, 0).questions()
    some = questions[:: max(1, len(questions) // arguments.pairs)][: arguments.pairs]
    print(f"{model.num_parameters():,} parameters, {torch.get_num_threads()} threads, {len(questions):,} pairs")

    rows: list[list[str]] = []

    def measure(name: str, score: Score, pairs: Sequence[Sequence[Row]]) -> NDArray[np.float64]:
        score(pairs[:8])  # warm up
        wall, cpu = time.perf_counter(), time.process_time()
        found = np.array(score(pairs))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        at_this_rate = cpu / len(pairs) * ALL / torch.get_num_threads()
        rows.append([name, f"{len(pairs):,}", f"{wall:.1f}", f"{cpu:.1f}", f"{1e3 * cpu / len(pairs):.2f}",
                     f"{at_this_rate:.0f}", f"{100 * right(found).mean():.2f}"])  # fmt: skip
        return found

    with tempfile.TemporaryDirectory() as folder:
        in_batches_of = theirs(model, Path(folder))
    measure("lm-eval, hf, fp32, batches of 1 (its default)", in_batches_of(1), some[: len(some) // 5])
    expected = measure("lm-eval, hf, fp32, batches of 64", in_batches_of(64), some)
    for name, bf16 in (("stlm, fp32", False), ("stlm, bf16", True)):
        found = measure(name, ours(model, bf16), some)
        same = int((right(found) == right(expected)).sum())
        gap = np.abs(found - expected).max()
        times = " and ".join(f"{float(row[4]) / float(rows[-1][4]):.1f}" for row in rows[:2])
        print(f"{name}: the same choice as the harness in {same:,} of {len(some):,} pairs, log-probabilities within "
              f"{gap:.2g}; {times} times as fast as its batches of 1 and 64 by CPU time")  # fmt: skip
    if arguments.whole:
        measure("stlm, bf16", ours(model, True), questions)
    print()
    print(table(rows, ["scored by", "pairs", "s", "CPU s", "CPU ms a pair", "all, s", "accuracy"], "lrrrrrr"))


if __name__ == "__main__":
    main()
