#!/usr/bin/env python
"""Writing text: this project, transformers and llama.cpp on the same model; patches against bytes; prompts.

    python benchmarks/generation.py [--ids 64] [--rounds 3]

The model is a Llama of ten million parameters with random weights (the speed of none of them depends on the values), is
exported to the others by this project, and runs in fp32 on as many threads as torch takes. Rounds alternate between
all of them; a row gives the median. Ends of text are written over, so that all write as many ids.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data_pipeline.tokenizers import Tokenizer, build_tokenizer, train_sentencepiece
from stlm.config import TokenEmbedderConfig, load_run_config
from stlm.export.conversion import convert_to
from stlm.generation import Batch, Sampling
from stlm.stlm import STLM

PROMPT = "The module defines a class whose instances hold the arguments that were given on the command line. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=64, help="ids, or bytes, to write (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of measuring (default: 3)")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        compare_with_others(Path(folder), options.ids, options.rounds)
    compare_patches(options.ids, options.rounds)


def tokenizer_of_docstrings() -> Tokenizer:
    """4,096 pieces, learned from what modules of the standard library say of themselves."""
    texts = []
    for path in sorted(Path(argparse.__file__).parent.glob("*.py")):
        texts += path.read_text(encoding="utf-8", errors="ignore").split("\n\n")
    return train_sentencepiece(texts[:20_000], 4096)


def compare_with_others(folder: Path, number: int, rounds: int) -> None:
    """The same Llama everywhere."""
    config = load_run_config("10m-token").model
    model = STLM.from_config(replace(config, embedder=TokenEmbedderConfig(scaled=False)), tokenizer_of_docstrings())
    model.save(folder / "model")
    model = STLM.load(folder / "model").settle()
    convert_to("huggingface", folder / "model", folder / "hf")
    ours = written_by_us(model, number)
    theirs = written_by_transformers(folder / "hf", model, number)
    llama, why_not = written_by_llama_cpp(folder, model, number)

    heads = ("ours", "transformers", "ratio", "llama.cpp", "ratio")
    print(f"{'ids per second':36}{heads[0]:>9}{heads[1]:>14}{heads[2]:>7}{heads[3]:>11}{heads[4]:>7}")
    for batch_size in (1, 16):
        for temperature in (0.0, 0.8):
            name = f"batch {batch_size}, {'sampled' if temperature else 'greedy'}"
            ways = [partial(ours, batch_size, temperature), partial(theirs, batch_size, temperature)]
            if llama and batch_size == 1:
                ways.append(partial(llama, temperature))
            seconds = alternating(ways, rounds)
            speeds = [batch_size * number / each for each in seconds]
            row = f"{name:36}{speeds[0]:9.0f}{speeds[1]:14.0f}{speeds[0] / speeds[1]:7.2f}"
            print(
                row + (f"{speeds[2]:11.0f}{speeds[0] / speeds[2]:7.2f}" if len(speeds) > 2 else f"{'-':>11}"),
                flush=True,
            )
    print(f"llama.cpp: {why_not or 'the bindings write one text at a time'}\n")

    ids_BT = torch.randint(300, 4000, (1, config.context_length - 1))
    with torch.inference_mode():
        prefill, forward = alternating([lambda: model.begin(1, ids_BT), lambda: model(ids_BT)], max(5, rounds))
    print(f"{'prompt of 511 ids':36}{'read':>9}{'forward':>14}{'ratio':>7}")
    print(f"{'milliseconds':36}{1e3 * prefill:9.1f}{1e3 * forward:14.1f}{forward / prefill:7.2f}\n")


def written_by_us(model: STLM, number: int) -> Callable[[int, float], None]:
    """A function that writes texts of `number` ids."""

    def write(batch_size: int, temperature: float) -> None:
        batch = Batch(model, model.config.context_length)
        sampling = Sampling(temperature=temperature)
        batch.add([model.row(PROMPT, replace(sampling, seed=seed), number) for seed in range(batch_size)])
        for _ in range(number):
            batch.step()

    return write


def written_by_transformers(folder: Path, model: STLM, number: int) -> Callable[[int, float], None]:
    """The same by `generate`, with its own cache."""
    from transformers import AutoModelForCausalLM

    there = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    row = [model.tokenizer.start_id, model.tokenizer.end_of_text_id, *model.tokenizer.encode(PROMPT).tolist()]

    def write(batch_size: int, temperature: float) -> None:
        ids_BT = torch.tensor([row] * batch_size)
        rules = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        there.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=number, min_new_tokens=number, **rules
        )

    return write


def written_by_llama_cpp(folder: Path, model: STLM, number: int) -> tuple[Callable[[float], None] | None, str]:
    """The same by llama.cpp, or why not."""
    from stlm.errors import StlmError
    from stlm.export.gguf import convert_to_gguf
    from stlm.export.llama_cpp import LlamaCpp, installed

    if not installed():
        return None, "xllamacpp is not installed"
    try:
        convert_to_gguf(folder / "model", folder / "gguf")
    except StlmError as error:
        return None, str(error)
    there = LlamaCpp(folder / "gguf" / "model.gguf", model.config.context_length)
    row = [model.tokenizer.start_id, model.tokenizer.end_of_text_id, *model.tokenizer.encode(PROMPT).tolist()]

    def write(temperature: float) -> None:
        there.ask(
            "/completion", prompt=row, n_predict=number, temperature=temperature, cache_prompt=False, ignore_eos=True
        )

    return write, ""


def compare_patches(number: int, rounds: int) -> None:
    """The presets of byte patches and of bytes, which have as many parameters."""
    models = {
        name: STLM.from_config(load_run_config(name).model, build_tokenizer("byte")).settle()
        for name in ("10m-byte-patch", "10m-byte")
    }
    print(f"{'bytes per second':36}{'patches':>9}{'bytes':>14}{'ratio':>7}")
    for batch_size in (1, 16):
        writers = [written_by_us(model, number) for model in models.values()]
        seconds = alternating([partial(write, batch_size, 0.8) for write in writers], rounds)
        patches, plain = (batch_size * number / each for each in seconds)
        print(f"{f'batch {batch_size}, sampled':36}{patches:9.0f}{plain:14.0f}{patches / plain:7.2f}", flush=True)


def alternating(ways: list[Callable[[], object]], rounds: int) -> list[float]:
    """The median seconds of each, all taking turns, after one turn to warm up."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, mine in zip(ways, times, strict=True):
            begin = time.perf_counter()
            way()
            mine.append(time.perf_counter() - begin)
    return [median(mine[1:]) for mine in times]


if __name__ == "__main__":
    main()
