#!/usr/bin/env python
"""Speed of preparing text, compared with other programs on the same .jsonl with the same workers.

    ids = bytes     scripts/preprocess.py
                    datasets    load_dataset, map with batches and processes, save_to_disk
                    megatron    its preprocessing loop, rewritten from the idea: a pool of processes makes lines
                                lists of ids, one process appends them to a file
    ids = subwords  scripts/preprocess.py
                    encoder     sentencepiece alone in as many processes, on texts in memory, nothing read or written

Every row is a process of its own and counts from its start to its end, imports included. Rounds are interleaved, so
each row sees the same machine; a ratio is the median over the rounds of the ratio within a round. MB are 10^6 bytes of
text. The rows of bytes end with their result on the disk (fsync). CPU: seconds of all processes of the row. Memory: the
highest sum, sampled every 50 ms, of the proportional set size (PSS) of its processes.

--large GB prepares that much text instead: once as one file, once as one line of one file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_pipeline.preparation import pipeline as prepare
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.workers import available_cores
from data_pipeline.progress import Progress
from data_pipeline.sources.default_corpus import corpus
from data_pipeline.storage.atomic import fsync_tree
from data_pipeline.storage.manifest import SPLITS
from data_pipeline.tokenizers import load_tokenizer, train_sentencepiece

SHAPES = ["file", "line"]
POOL_BYTES = 8 << 20  # of the default corpus, from which documents are cut


# --- text ------------------------------------------------------------------------------------------------------------


def pool_of_text() -> bytes:
    """Return the beginning of the default corpus."""
    parts: list[bytes] = []
    for package, files, _ in corpus.corpus_units():
        parts += [document.encode() for document in corpus.read_unit(package, files)]
        if sum(map(len, parts)) > POOL_BYTES:
            break
    return b"\n\n".join(parts)[:POOL_BYTES]


def documents(pool: bytes, size: int) -> Iterator[bytes]:
    """Yield `size` bytes of text in documents of about 2 kB, cut from the pool at spaces; the same each time."""
    rng = random.Random(1)
    made = 0
    while made < size:
        start = pool.index(b" ", rng.randrange(len(pool) - 200_000)) + 1
        length = min(int(rng.lognormvariate(7.2, 0.8)) + 50, 100_000)
        document = pool[start : pool.index(b" ", start + length)].decode(errors="ignore").strip().encode()
        made += len(document)
        yield document


def write_jsonl(path: Path, pool: bytes, size: int) -> None:
    with path.open("w") as file:
        for document in documents(pool, size):
            file.write(json.dumps({"text": document.decode(), "source": "pool"}, ensure_ascii=False) + "\n")


# --- rows: each returns the documents and ids that it wrote ----------------------------------------------------------


def ours(jsonl: Path, output: Path, workers: int, tokenizer_dir: Path | None) -> dict[str, int]:
    spec = "byte"
    if tokenizer_dir is not None:
        tokenizer = load_tokenizer(tokenizer_dir)
        spec = tokenizer.spec
        prepare.make_tokenizer = lambda *_: tokenizer  # training is a separate column
    config = PrepareConfig((str(jsonl),), spec, str(output), workers, deduplicate=False)
    manifest = prepare.prepare(config)
    return {what: sum(manifest.total(split, what) for split in SPLITS) for what in ("documents", "ids")}


def hugging_face(jsonl: Path, output: Path, workers: int, tokenizer_dir: Path | None) -> dict[str, int]:
    import datasets

    assert tokenizer_dir is None
    cache = str(output.with_suffix(".cache"))
    data = datasets.load_dataset("json", data_files=str(jsonl), split="train", cache_dir=cache)
    data = data.map(
        lambda batch: {"ids": [np.frombuffer(text.encode() + b"\xff", np.uint8) for text in batch["text"]]},
        batched=True,
        num_proc=workers,
        remove_columns=data.column_names,
        features=datasets.Features({"ids": datasets.List(datasets.Value("uint8"))}),
    )
    data.save_to_disk(output, num_proc=workers)
    fsync_tree(output)
    return {"documents": len(data), "ids": sum(len(chunk.values) for chunk in data.data.column("ids").chunks)}


def encode_line(line: str) -> list[int]:
    return [*json.loads(line)["text"].encode(), 0xFF]


def megatron(jsonl: Path, output: Path, workers: int, tokenizer_dir: Path | None) -> dict[str, int]:
    assert tokenizer_dir is None
    sizes: list[int] = []
    with multiprocessing.Pool(workers) as pool, jsonl.open() as lines, output.open("wb") as file:
        for ids in pool.imap(encode_line, lines, 32):
            file.write(np.array(ids, np.uint8).tobytes())
            sizes.append(len(ids))
        file.flush()
        os.fsync(file.fileno())
    np.save(output.with_suffix(".npy"), np.array(sizes))
    return {"documents": len(sizes), "ids": sum(sizes)}


def encode_texts(tokenizer_dir: Path, jsonl: Path, part: int, parts: int, barrier: Any, results: Any) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(tokenizer_dir / "sentencepiece.model"))
    texts = [json.loads(line)["text"] for number, line in enumerate(jsonl.open()) if number % parts == part]
    barrier.wait()
    start = time.perf_counter()
    ids = sum(len(processor.encode(text)) + 1 for text in texts)
    results.put((len(texts), ids, time.perf_counter() - start))


def encoder(jsonl: Path, output: Path, workers: int, tokenizer_dir: Path | None) -> dict[str, float]:
    assert tokenizer_dir is not None
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.Queue()
    started = [
        context.Process(target=encode_texts, args=(tokenizer_dir, jsonl, part, workers, barrier, results))
        for part in range(workers)
    ]
    for process in started:
        process.start()
    found = [results.get() for _ in started]
    return {
        "documents": sum(count for count, _, _ in found),
        "ids": sum(ids for _, ids, _ in found),
        "seconds": statistics.mean(seconds for _, _, seconds in found),  # all cores are busy for that time
    }


ROWS = {"ours": ours, "datasets": hugging_face, "megatron": megatron, "encoder": encoder}


# --- measuring -------------------------------------------------------------------------------------------------------


def tree(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for process in found:
        try:
            for thread in os.listdir(f"/proc/{process}/task"):
                found += map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split())
        except OSError:
            pass  # it has ended
    return found


def memory(pid: int) -> int:
    """Return the memory of a process and its descendants in bytes (PSS)."""
    total = 0
    for process in tree(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
        except OSError:
            pass
    return total


def measure(row: str, jsonl: Path, folder: Path, workers: int, tokenizer_dir: Path | None = None) -> dict[str, float]:
    """Run a row in a separate process, and return its seconds, documents, ids and peak memory."""
    output = folder / f"output-{row}"
    arguments = [sys.executable, __file__, "--row", row, str(jsonl), str(output), str(tokenizer_dir or "")]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(folder)}
    quiet.pop("PYTHONDONTWRITEBYTECODE", None)  # compile modules once, as is the default
    start = time.perf_counter()
    process = subprocess.Popen([*arguments, "--workers", str(workers)], env=quiet, stdout=subprocess.PIPE, text=True)
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"the row {row} failed")
    for path in folder.glob(f"output-{row}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu": cpu, "peak": peak} | json.loads(out.splitlines()[-1])


def compare(names: list[str], rounds: list[dict[str, dict[str, float]]], size: int) -> list[str]:
    """Return a line of the table for each row: rate, CPU time, memory, and the first row's speed relative to it."""
    lines = []
    for name in names:
        results = [measured[name] for measured in rounds]
        rates = sorted(size / result["seconds"] / 1e6 for result in results)
        ratio = statistics.median(found[name]["seconds"] / found[names[0]]["seconds"] for found in rounds)
        peak = max(result["peak"] for result in results) / 1e6
        cpu = statistics.median(result["cpu"] for result in results)
        between = f"{rates[0]:.1f}–{rates[-1]:.1f}"
        lines.append(f"{name:<28}{statistics.median(rates):>9.1f}{between:>16}{cpu:>9.1f}{peak:>12,.0f}{ratio:>12.2f}")
    return lines


def side_by_side(folder: Path, megabytes: int, workers: int, rounds: int, vocabulary: int) -> None:
    pool = pool_of_text()
    big, small = folder / "big.jsonl", folder / "small.jsonl"
    write_jsonl(big, pool, megabytes * 10**6)
    write_jsonl(small, pool, max(megabytes // 2, 8) * 10**6)
    start = time.perf_counter()
    sample = (document.decode() for document in documents(pool, 4 << 20))
    train_sentencepiece(sample, vocabulary).save(folder / "tokenizer")
    trained = time.perf_counter() - start

    plan = [(row, big, None) for row in ("ours", "datasets", "megatron")]
    plan += [(row, small, folder / "tokenizer") for row in ("ours", "encoder")]
    measured: list[list[dict[str, dict[str, float]]]] = [[], []]
    with Progress(total=rounds * len(plan), desc="rows", leave=False) as bar:
        for number in range(rounds):
            found: list[dict[str, dict[str, float]]] = [{}, {}]
            for row, jsonl, tokenizer in plan if number % 2 == 0 else reversed(plan):
                found[tokenizer is not None][row] = measure(row, jsonl, folder, workers, tokenizer)
                bar.update()
            for group, results in zip(measured, found, strict=True):
                group.append(results)

    print(f"{workers} workers, {rounds} rounds, {len(os.sched_getaffinity(0))} cores")
    for group, jsonl, title in zip(measured, (big, small), ("bytes", f"sentencepiece:{vocabulary}"), strict=True):
        results = [result for found in group for result in found.values()]
        assert len({(result["documents"], result["ids"]) for result in results}) == 1, results
        ids, count = int(results[0]["ids"]), int(results[0]["documents"])
        size = ids - count if title == "bytes" else sum(len(json.loads(line)["text"].encode()) for line in jsonl.open())
        heading = f"{title}, {size / 1e6:.0f} MB"
        print(f"\n{heading:<28}{'MB/s':>9}{'range':>16}{'CPU/s':>9}{'memory/MB':>12}{'ours is ×':>12}")
        print("\n".join(compare(list(group[0]), group, size)))
    print(f"\n(not counted: training the tokenizer on 4 MiB, {trained:.0f} s)")


def large(folder: Path, gigabytes: float, workers: int, shapes: list[str]) -> None:
    pool = pool_of_text()
    ways = {"file": (pool, b"\n\n"), "line": (b" ".join(pool.split()), b" ")}
    print(f"{f'{gigabytes:g} GB, bytes, {workers} workers':<28}{'MB/s':>9}{'seconds':>12}{'memory/MB':>12}")
    for shape in shapes:
        pool, separator = ways[shape]
        path = folder / "large.txt"
        size = int(gigabytes * 10**9)
        with path.open("wb") as file, Progress(total=size, unit="B", unit_scale=True, desc="text", leave=False) as bar:
            for document in documents(pool, size):
                file.write(document + separator)
                bar.update(len(document))
        size = path.stat().st_size
        result = measure("ours", path, folder, workers)
        path.unlink()
        rate = size / result["seconds"] / 1e6
        print(f"{f'one {shape}':<28}{rate:>9.1f}{result['seconds']:>12.1f}{result['peak'] / 1e6:>12,.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="text for the rows of bytes (default: 256)")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (default: one per core)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each row (default: 3)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="ids of the subwords (default: 4096)")
    parser.add_argument("--large", type=float, metavar="GB", help="prepare that much text as one file and as one line")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=SHAPES, help="of --large (default: both)")
    parser.add_argument("--folder", help="where text and results are kept meanwhile (default: the temporary folder)")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)  # used by `measure`
    options = parser.parse_args()
    if options.row:
        row, jsonl, output, tokenizer = options.row
        found = ROWS[row](Path(jsonl), Path(output), options.workers, Path(tokenizer) if tokenizer else None)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.large:
            large(Path(folder), options.large, options.workers, options.shape)
        else:
            side_by_side(Path(folder), options.megabytes, options.workers, options.rounds, options.vocabulary)


if __name__ == "__main__":
    main()
