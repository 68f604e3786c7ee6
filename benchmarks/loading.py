#!/usr/bin/env python
"""Speed of opening and reading training data, compared with other loaders on the same windows.

    python benchmarks/loading.py

First table: a data set of 10^12 ids (sparse files) is opened in a new process, and the batch at a random step is drawn.
Second table: windows as int64 tensors in random order, all readers alternating in one process; the rate is the median
of the rounds. All read the same windows, which are in the page cache. Readers: `TrainLoader`; nanoGPT's idea of
get_batch (np.memmap opened for each batch, slices at random offsets, stacked), rewritten; a Hugging Face data set,
memory-mapped, under torch's DataLoader; mosaicml-streaming on local shards under the same. The last needs an older
numpy (below 2.2) than the one this project is tested with: it is left out where `import streaming` fails. Last line:
the ids per second that the fastest preset consumes on this machine with one thread: forward, backward and update.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from data_pipeline.config import DataConfig
from data_pipeline.loading.loaders import open_data, train_loader
from data_pipeline.storage.manifest import Manifest, ShardEntry
from data_pipeline.storage.shards import bin_path, idx_path, idx_size, write_shard
from data_pipeline.tokenizers import build_tokenizer
from stlm.config import RunConfig, load_run_config
from stlm.evals import table
from stlm.model import row_keys
from stlm.objectives import Batch, build_objective
from stlm.stlm import STLM

HUGE, SHARD, DOCUMENT = 10**12, 256 << 20, 4096  # ids of the sparse data set, of its shards, of its documents
BATCH, CONTEXT, SEED = 16, 512, 1
FASTEST = "quickstart"  # the smallest, and so fastest, preset
Batches = Iterator[torch.Tensor]  # [BATCH, CONTEXT] int64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=100_000, help=f"of {CONTEXT} bytes (default: 100000)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each reader (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(opening(Path(folder)), end="\n\n")
        print(reading(Path(folder), options.windows, options.rounds, options.seconds))


# ---------------------------------------------------------------------- opening


def opening(folder: Path) -> str:
    """Return the first table."""
    prepared(folder / "huge", [SHARD] * (HUGE // SHARD) + [HUGE % SHARD])
    command = [sys.executable, "-c", OPEN_AND_DRAW, str(ROOT), str(folder / "huge"), str(CONTEXT), str(BATCH)]
    found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    rows = [
        ["seconds to open", f"{median(one['open'] for one in found):.3f}"],
        ["seconds to draw the batch at a random step", f"{median(one['draw'] for one in found):.3f}"],
        ["MB of memory at the peak, Python and numpy included", f"{max(one['peak'] for one in found):.0f}"],
    ]
    return table(rows, [f"{HUGE:.0e} ids in {-(-HUGE // SHARD):,} shards", "median of 3"], "lr")


OPEN_AND_DRAW = """
import json, random, sys, time
root, directory, context, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, root)
from data_pipeline.config import DataConfig
from data_pipeline.loading.loaders import open_data, train_loader
started = time.perf_counter()
config = DataConfig(dir=directory)
loader = train_loader(open_data(config), config, context, batch, seed=1)
opened = time.perf_counter()
windows = loader.rows(random.randrange(loader.num_windows // batch) + 1, 0, batch)
drawn = time.perf_counter()
assert windows.ids.shape == (batch, context)
with open("/proc/self/status") as status:  # getrusage would count the process that started this one
    peak = next(int(line.split()[1]) / 1e3 for line in status if line.startswith("VmHWM"))
print(json.dumps({"open": opened - started, "draw": drawn - opened, "peak": peak}))
"""


def prepared(directory: Path, shards: list[int], ids: np.ndarray | None = None) -> Path:
    """Write a folder of prepared byte data: `ids`, or sparse files of the sizes in `shards`."""
    tokenizer = build_tokenizer("byte")
    tokenizer.save(directory / "tokenizer")
    entries = []
    for number, size in enumerate(shards):
        path = f"train/shard_{number:05d}"
        bin_path(directory / path).parent.mkdir(parents=True, exist_ok=True)
        if ids is None:
            documents = -(-size // DOCUMENT)
            for file, length in ((bin_path(directory / path), size), (idx_path(directory / path), idx_size(documents))):
                with open(file, "wb") as hole:
                    hole.truncate(length)
            entries.append(ShardEntry(path, size, documents, size - documents, "0" * 64, "0" * 64))
        else:
            written = write_shard(directory / path, tokenizer.dtype, [(ids, np.array([size]))])
            entries.append(ShardEntry(path=path, bytes=size - 1, **asdict(written)))
    validation = write_shard(directory / "validation/x", tokenizer.dtype, [(np.zeros(9, np.uint8), np.array([9]))])
    splits = {"train": entries, "validation": [ShardEntry(path="validation/x", bytes=8, **asdict(validation))]}
    description = {"spec": "byte", "vocab_size": 256, "dtype": "uint8", "fingerprint": tokenizer.fingerprint}
    Manifest(description, splits, sources=[], split_rule={}, duplicates={}, settings={}).save(directory)
    return directory


# ---------------------------------------------------------------------- reading


def reading(folder: Path, windows: int, rounds: int, seconds: float) -> str:
    """Return the second table."""
    rows_WT = np.random.default_rng(SEED).integers(0, 200, (windows, CONTEXT), dtype=np.uint8)
    readers: dict[str, Callable[[Path, np.ndarray], Batches]] = {
        "TrainLoader": by_train_loader,
        "nanoGPT's get_batch": by_get_batch,
        "HF datasets, DataLoader, in process": lambda folder, rows: by_datasets(folder, rows, workers=0),
        "HF datasets, DataLoader, 2 workers": lambda folder, rows: by_datasets(folder, rows, workers=2),
        "mosaicml-streaming, DataLoader": by_streaming,
    }
    batches: dict[str, Batches] = {}
    missing: list[list[str]] = []
    known = {row.tobytes() for row in rows_WT}
    for name, open_reader in readers.items():
        try:
            batches[name] = open_reader(folder, rows_WT)
        except ImportError as error:
            missing.append([name, f"cannot be imported: {error}", ""])
            continue
        first = next(batches[name])
        assert first.shape == (BATCH, CONTEXT) and first.dtype == torch.int64
        assert all(row.astype(np.uint8).tobytes() in known for row in first.numpy())

    rates: dict[str, list[float]] = {name: [] for name in batches}
    for _, (name, reader) in itertools.product(range(rounds), batches.items()):
        started, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < seconds:
            next(reader)
            count += 1
        rates[name].append(count * BATCH * CONTEXT / passed)
    ours = median(rates["TrainLoader"])
    rows = [[name, f"{median(found) / 1e6:.1f}", f"{ours / median(found):.1f}"] for name, found in rates.items()]
    consumed = consumption(load_run_config(FASTEST))
    rows += missing
    rows.append([f"consumed by {FASTEST}", f"{consumed / 1e6:.3f}", f"{ours / consumed:.0f}"])
    header = [
        f"{windows:,} windows of {CONTEXT} bytes, {BATCH} a batch",
        "million ids/s",
        "TrainLoader is times as fast",
    ]
    return table(rows, header, "lrr")


def by_train_loader(folder: Path, rows_WT: np.ndarray) -> Batches:
    config = DataConfig(dir=str(prepared(folder / "ours", [rows_WT.size], rows_WT.reshape(-1))))
    loader = train_loader(open_data(config), config, CONTEXT, BATCH, SEED)
    return (torch.from_numpy(loader.rows(step, 0, BATCH).ids) for step in itertools.count(1))


def by_get_batch(folder: Path, rows_WT: np.ndarray) -> Batches:
    path = folder / "train.bin"
    path.write_bytes(rows_WT.tobytes())
    while True:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        starts = torch.randint(len(rows_WT), (BATCH,)).tolist()
        yield torch.stack([torch.from_numpy(data[CONTEXT * i : CONTEXT * (i + 1)].astype(np.int64)) for i in starts])


def by_datasets(folder: Path, rows_WT: np.ndarray, workers: int) -> Batches:
    import datasets

    datasets.disable_progress_bars()
    path = str(folder / f"datasets-{workers}")
    features = datasets.Features({"ids": datasets.Sequence(datasets.Value("uint8"), length=CONTEXT)})
    datasets.Dataset.from_generator(
        lambda: ({"ids": row} for row in rows_WT), features=features, cache_dir=str(folder / "cache")
    ).save_to_disk(path)
    data = datasets.load_from_disk(path).with_format("torch")
    return endless(data, workers, lambda batch: batch["ids"].long(), shuffle=True)


def by_streaming(folder: Path, rows_WT: np.ndarray) -> Batches:
    from streaming import MDSWriter, StreamingDataset

    path = str(folder / "streaming")
    with MDSWriter(out=path, columns={"ids": f"ndarray:uint8:{CONTEXT}"}) as out:
        for row in rows_WT:
            out.write({"ids": row})
    data = StreamingDataset(local=path, shuffle=True, batch_size=BATCH)
    return endless(data, 0, lambda batch: batch["ids"].long())


def endless(data: torch.utils.data.Dataset, workers: int, ids: Callable[..., torch.Tensor], **options: bool) -> Batches:
    while True:
        loader = torch.utils.data.DataLoader(data, BATCH, num_workers=workers, drop_last=True, **options)
        yield from map(ids, loader)


def consumption(config: RunConfig) -> float:
    """Return the ids per second that a preset consumes in this process: forward, backward and update in fp32 or bf16,
    whichever is faster."""
    model = STLM.from_config(config.model, build_tokenizer("byte"))
    optimizer = torch.optim.AdamW(model.parameters())
    objective = build_objective(config.training)
    shape = (config.training.batch_size, config.model.context_length)
    ids = torch.randint(0, 200, shape)
    mask = torch.ones(shape, dtype=torch.bool)
    batch = objective.prepare(Batch(ids, ids, mask, row_keys(SEED, 1, range(len(ids)))))
    best = 0.0
    for bf16 in (False, True):
        times = []
        for _ in range(4):
            started = time.perf_counter()
            with torch.autocast("cpu", enabled=bf16):
                objective.loss(model(ids), batch).nats.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - started)
        best = max(best, ids.numel() / min(times[1:]))
    return best


if __name__ == "__main__":
    main()
