#!/usr/bin/env python
"""Speed of text generation: this project, transformers and llama.cpp on the same model; patches against bytes; prompts.

    python benchmarks/generation.py [--ids 64] [--rounds 3] [--model RUN] [--threads 1 --processor-time]

The model is a Llama of ten million parameters with random weights. Only copied drafts depend on the values of weights;
`--model` measures them on a trained model. This project exports the model to the others. Rounds alternate between all
of them; a row gives the median. The end-of-text id is excluded, so that all generate equally many ids. On a machine
with other load, compare processor time on one thread.
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
from stlm.generation import DecodingBatch, DecodingStats, Sampling, speculate_with_ngrams
from stlm.model import PRECISIONS
from stlm.stlm import STLM

PROMPT = "The module defines a class whose instances hold the arguments that were given on the command line. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=64, help="ids, or bytes, to write (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of measuring (default: 3)")
    parser.add_argument("--model", help="a trained model of Llama's shape in the place of one with random weights")
    parser.add_argument("--threads", type=int, help="threads of torch and llama.cpp (default: as many as torch takes)")
    parser.add_argument("--processor-time", action="store_true", help="count the time of processors, not the clock's")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.processor_time:
        global clock
        clock = time.process_time
    unit = "of processor time" if options.processor_time else "by the clock"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, seconds {unit}\n")
    with tempfile.TemporaryDirectory() as folder:
        compare_with_others(Path(folder), options.ids, options.rounds, options.model)
    compare_patches(options.ids, options.rounds)


clock = time.perf_counter


def tokenizer_of_docstrings() -> Tokenizer:
    """Train a tokenizer of 4,096 pieces on the source of the standard library's modules."""
    texts = []
    for path in sorted(Path(argparse.__file__).parent.glob("*.py")):
        texts += path.read_text(encoding="utf-8", errors="ignore").split("\n\n")
    return train_sentencepiece(texts[:20_000], 4096)


def compare_with_others(folder: Path, number: int, rounds: int, trained: str | None) -> None:
    """Compare the same Llama in all three programs, in 32, 16 and 8 bits, and with copied drafts."""
    config = load_run_config("10m-token").model
    if trained is None:
        model = STLM.from_config(replace(config, embedder=TokenEmbedderConfig(scaled=False)), tokenizer_of_docstrings())
    else:
        model = STLM.load(trained)
    model.save(folder / "model")
    convert_to("huggingface", folder / "model", folder / "hf")
    llama, why_not = written_by_llama_cpp(folder, model, number)

    heads = ("ours", "transformers", "ratio", "llama.cpp", "ratio")
    print(f"{'ids per second':36}{heads[0]:>9}{heads[1]:>14}{heads[2]:>7}{heads[3]:>11}{heads[4]:>7}")
    for precision in PRECISIONS:
        model = STLM.load(folder / "model").optimize_for_decoding(precision)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        ours, there = written_by_us(model, number), written_by_transformers(folder / "hf", model, number, dtype)
        for batch_size in (1, 16):
            for temperature in (0.0, 0.8):
                name = f"{precision}, batch {batch_size}, {'sampled' if temperature else 'greedy'}"
                ways = [partial(ours, batch_size, temperature), partial(there, batch_size, temperature)]
                if llama and batch_size == 1 and precision == "fp32":
                    ways.append(partial(llama, temperature))
                print_row(name, [batch_size * number / each for each in alternating(ways, rounds)])
        copied = partial(there, 1, 0.0, prompt_lookup_num_tokens=8)
        seconds = alternating([partial(written_with_copies, model, number), copied], rounds)
        print_row(f"{precision}, batch 1, greedy, copies", [number / each for each in seconds])
    print(f"int8: transformers in bf16\nllama.cpp: {why_not or 'in fp32; the bindings write one text at a time'}\n")

    model = STLM.load(folder / "model").optimize_for_decoding()
    ids_BT = torch.randint(300, 4000, (1, config.context_length - 1))
    with torch.inference_mode():
        prefill, forward = alternating([lambda: model.begin(1, ids_BT), lambda: model(ids_BT)], max(5, rounds))
        model.optimize_for_decoding("bf16")
        (short,) = alternating([lambda: model.begin(1, ids_BT)], max(5, rounds))
    print(f"{'prompt of 511 ids':36}{'read':>9}{'forward':>14}{'ratio':>7}{'bf16':>11}")
    print(f"{'milliseconds':36}{1e3 * prefill:9.1f}{1e3 * forward:14.1f}{forward / prefill:7.2f}{1e3 * short:11.1f}\n")


def print_row(name: str, speeds: list[float]) -> None:
    """Print this project's speed, then each of the others with the ratio to it."""
    row = f"{name:36}{speeds[0]:9.0f}{speeds[1]:14.0f}{speeds[0] / speeds[1]:7.2f}"
    print(row + (f"{speeds[2]:11.0f}{speeds[0] / speeds[2]:7.2f}" if len(speeds) > 2 else f"{'-':>11}"), flush=True)


def written_by_us(model: STLM, number: int) -> Callable[[int, float], None]:
    """Return a function that generates texts of `number` ids with this project."""

    def write(batch_size: int, temperature: float) -> None:
        batch = DecodingBatch(model, model.config.context_length)
        sampling = Sampling(temperature=temperature)
        batch.add([model.row(PROMPT, replace(sampling, seed=seed), number) for seed in range(batch_size)])
        for _ in range(number):
            batch.step()

    return write


def written_with_copies(model: STLM, number: int) -> None:
    """Generate one text at temperature 0 with drafts copied from earlier text, as `generate` does."""
    row = model.row(PROMPT, Sampling(temperature=0.0), number)
    length, end = model.config.context_length, -1  # no id ends the text
    options = {"context_length": length, "stop_id": end, "num_drafts": 8, "stats": DecodingStats()}
    for _ in speculate_with_ngrams(model, row.window, row.sampler, **options):
        pass


def written_by_transformers(folder: Path, model: STLM, number: int, dtype: torch.dtype) -> Callable[..., None]:
    """Return a function that generates texts with transformers' `generate` and its cache."""
    from transformers import AutoModelForCausalLM

    there = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    row = [model.tokenizer.start_id, model.tokenizer.end_of_text_id, *model.tokenizer.encode(PROMPT).tolist()]

    def write(batch_size: int, temperature: float, **options: int) -> None:
        ids_BT = torch.tensor([row] * batch_size)
        rules = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        options |= {"max_new_tokens": number, "min_new_tokens": number}
        there.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **rules, **options)

    return write


def written_by_llama_cpp(folder: Path, model: STLM, number: int) -> tuple[Callable[[float], None] | None, str]:
    """Return a function that generates a text with llama.cpp, or None and the reason."""
    from stlm.errors import StlmError
    from stlm.export.gguf.conversion import convert_to_gguf
    from stlm.export.gguf.llama_cpp import LlamaCpp, installed

    if not installed():
        return None, "xllamacpp is not installed"
    try:
        convert_to_gguf(folder / "model", folder / "gguf")
    except StlmError as error:
        return None, str(error)
    there = LlamaCpp(folder / "gguf" / "model.gguf", model.config.context_length)
    row = [model.tokenizer.start_id, model.tokenizer.end_of_text_id, *model.tokenizer.encode(PROMPT).tolist()]

    def write(temperature: float) -> None:
        there.request(
            "/completion", prompt=row, n_predict=number, temperature=temperature, cache_prompt=False, ignore_eos=True
        )

    return write, ""


def compare_patches(number: int, rounds: int) -> None:
    """Compare the presets of byte patches and of bytes, which have the same number of parameters."""
    models = {
        name: STLM.from_config(load_run_config(name).model, build_tokenizer("byte")).optimize_for_decoding()
        for name in ("10m-byte-patch", "10m-byte")
    }
    print(f"{'bytes per second':36}{'patches':>9}{'bytes':>14}{'ratio':>7}")
    for batch_size in (1, 16):
        writers = [written_by_us(model, number) for model in models.values()]
        seconds = alternating([partial(write, batch_size, 0.8) for write in writers], rounds)
        patches, plain = (batch_size * number / each for each in seconds)
        print(f"{f'batch {batch_size}, sampled':36}{patches:9.0f}{plain:14.0f}{patches / plain:7.2f}", flush=True)


def alternating(ways: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median seconds of each, run alternately, after one warm-up round."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, mine in zip(ways, times, strict=True):
            begin = clock()
            way()
            mine.append(clock() - begin)
    return [median(mine[1:]) for mine in times]


if __name__ == "__main__":
    main()
