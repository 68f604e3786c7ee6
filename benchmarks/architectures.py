"""Every architecture on the same text: training speed, and bits per byte after the same time.

    python benchmarks/architectures.py speed   [--input PATH …] [--presets 10m-byte 10m-byte-patch 10m-token]
    python benchmarks/architectures.py quality [--input PATH …] [--seconds 120] [--seeds 3]

`speed` alternates whole steps of presets, on one thread, each of about 4 kB of text, and compares bytes of text per
second of processor time.

`quality` trains every architecture of studies/architectures/*.yaml, all with the same number of unique parameters, for
the same processor time of one core. It first measures, on one thread and alternating, how many steps fit into that
time; the number of steps is then fixed, so that other work on the machine matters little. The peak learning rate of
each architecture is chosen from --learning-rates, with a quarter of the time and a seed that the table does not use.
--jobs runs train at once. Rerun the command to resume after an interruption.

Prints one Markdown table; --output writes it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data_pipeline.loading.loaders import open_data
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.progress import Progress
from stlm.config import RunConfig, load_run_config
from stlm.objectives import build_objective
from stlm.stlm import STLM
from stlm.training.deepspeed.precision import choose_precision
from stlm.training.distributed.connection import Distributed
from stlm.training.distributed.ranks import find_ranks
from stlm.training.entropy import begin_entropy_patching
from stlm.training.loaders import batch_of, build_loaders
from stlm.training.optim.optimizers import build_optimizer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "benchmarks" / "studies" / "architectures"
ENTROPY_MODEL = "entropy-model"  # config of the byte model for entropy patching
STEP_BYTES = 4096  # of text in a step when measuring speed
BYTES_PER_ROW = 512  # of text, in all architectures
TRIAL_SEED = 99  # of the runs that choose a learning rate
TRIAL_SHARE = 0.25  # share of the time for each of these runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "quality"))
    parser.add_argument("--input", nargs="+", default=[], metavar="PATH", help="text (default: the default corpus)")
    parser.add_argument("--validation-fraction", default="0.01", help="share of documents held back (default: 0.01)")
    parser.add_argument("--seconds", type=float, default=120, help="time of each run on one core (default: 120)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each architecture (default: 3)")
    parser.add_argument(
        "--learning-rates", nargs="+", default=["3e-3", "6e-3"], help="peaks to choose from (default: 3e-3 6e-3)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once (default: one a core)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="architectures (default: all)")
    parser.add_argument(
        "--presets", nargs="+", default=["10m-byte", "10m-byte-patch", "10m-token"], metavar="NAME",
        help="what speed compares, with the first one (default: 10m-byte 10m-byte-patch 10m-token)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="rounds of measuring speed (default: 5)")
    parser.add_argument(
        "--work", default="runs/architectures", help="folder of data and runs (default: runs/architectures)"
    )
    parser.add_argument("--output", help="file for the table as well")
    options = parser.parse_args()
    options.work = Path(options.work).resolve()
    options.work.mkdir(parents=True, exist_ok=True)

    table = speed(options) if options.what == "speed" else quality(options)
    print(table)
    if options.output:
        Path(options.output).write_text(table + "\n", encoding="utf-8")


class Architecture(NamedTuple):
    """A preset or config file with overrides: its data, and its entropy model if it has one."""

    config: str | Path
    settings: tuple[str, ...]

    def load(self) -> RunConfig:
        """Return the config with the overrides."""
        return load_run_config(self.config, self.settings)


def architectures(options: argparse.Namespace) -> dict[str, Architecture]:
    """Return the architectures to compare, by name. Missing data is prepared."""
    found = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in ("common", ENTROPY_MODEL)}
    if unknown := set(options.only or ()) - set(found):
        raise SystemExit(f"error: --only: got {', '.join(sorted(unknown))}; expected any of {', '.join(found)}")
    return {name: ready(options, path) for name, path in found.items() if not options.only or name in options.only}


def ready(options: argparse.Namespace, source: str | Path) -> Architecture:
    """Prepare the data and the entropy model of a preset or file, and return its architecture."""
    config = load_run_config(source)
    architecture = Architecture(source, (f"data.dir={prepared(options, config.data.tokenizer)}",))
    patching = getattr(config.model.embedder, "patching", None)
    if not hasattr(patching, "entropy_model"):
        return architecture
    byte_model = ready(options, CONFIGS / f"{ENTROPY_MODEL}.yaml")
    run_dir = options.work / "runs" / ENTROPY_MODEL
    pretrain(byte_model, run_dir, {})
    return Architecture(source, (*architecture.settings, f"model.embedder.patching.entropy_model={run_dir}"))


def prepared(options: argparse.Namespace, tokenizer: str) -> Path:
    """Prepare the text with a tokenizer, and return its folder."""
    data = options.work / "data" / tokenizer.replace(":", "-")
    command = [
        sys.executable, ROOT / "scripts" / "preprocess.py", *(["--input", *options.input] if options.input else []),
        "--tokenizer", tokenizer, "--output", data, "--validation-fraction", options.validation_fraction,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return data


# ---------------------------------------------------------------------- speed


def speed(options: argparse.Namespace) -> str:
    """Return a table of bytes per second in training, measured alternately."""
    torch.set_num_threads(1)
    chosen = {name: with_small_steps(ready(options, name)) for name in options.presets}
    measured = measure(chosen, options.rounds, time.process_time)
    rows = []
    for name in chosen:
        rates, others = measured[name], measured[options.presets[0]]
        ratio = statistics.median(mine / theirs for mine, theirs in zip(rates, others, strict=True))
        size = parameters_of(chosen[name])
        rows.append([name, f"{size:,}", f"{statistics.median(rates) / 1e3:.2f}", f"{ratio:.2f}"])
    return markdown(["preset", "parameters", "kB per CPU second", f"to {options.presets[0]}"], rows)


def with_small_steps(architecture: Architecture) -> Architecture:
    """Return the architecture with a batch of about STEP_BYTES of text."""
    config = architecture.load()
    assert config.data.dir is not None
    manifest = PreparedData.open(config.data.dir).manifest
    row = config.model.context_length * manifest.total("train", "bytes") / manifest.total("train", "ids")
    rows = max(1, round(STEP_BYTES / row))
    small = (f"training.batch_size={rows}", "training.micro_batch_size=null")
    return Architecture(architecture.config, (*architecture.settings, *small))


def measure(chosen: dict[str, Architecture], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return bytes per second of each architecture in each round of four steps."""
    steps = {name: stepper(architecture.load()) for name, architecture in chosen.items()}
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in Progress(range(rounds + 1), "measuring", unit=" rounds"):
        for name, step in steps.items():
            started = clock()
            read = sum(step(4 * turn + number) for number in range(1, 5))
            if turn:  # the first round warms up
                rates[name].append(read / (clock() - started))
    return rates


def stepper(config: RunConfig) -> Callable[[int], float]:
    """Return a function that runs one training step (forward, loss, backward, clipping, update) and returns its bytes
    of text."""
    data = open_data(config.data)
    loader, _ = build_loaders(config, data)
    model = STLM.from_config(config.model, data.tokenizer, seed=config.seed)
    for _ in begin_entropy_patching(model, loader, config.training.batch_size, Distributed(find_ranks())):
        pass  # the results are not needed
    optimizer = build_optimizer(model, config.training)
    objective = build_objective(config.training)
    bytes_per_id = torch.from_numpy(data.tokenizer.bytes_per_id)
    rows = config.training.batch_size
    bf16 = choose_precision(config.training.precision).name == "bf16"

    def step(number: int) -> float:
        batch = objective.prepare(batch_of(loader.rows(number, 0, rows), config.seed, number, 0))
        ids, bytes = batch.counts(bytes_per_id)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(batch.ids)
        nats, terms = objective.loss(output, batch)
        (sum([*output.auxiliary.values(), *terms.values()], nats) / ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        return float(bytes)

    return step


# ---------------------------------------------------------------------- quality


def quality(options: argparse.Namespace) -> str:
    """Return a table of bits per byte of every architecture after the same processor time."""
    chosen = architectures(options)
    rates = measured_rates(options, chosen)

    def steps_in(name: str, seconds: float) -> int:
        """Return the number of steps, with about 512 bytes a row, that fit into the time."""
        return max(20, int(seconds * rates[name] / (chosen[name].load().training.batch_size * BYTES_PER_ROW)))

    with ThreadPoolExecutor(options.jobs) as pool:
        trials = {
            (name, rate): pool.submit(
                trained, options, chosen[name], f"trial-{rate}", TRIAL_SEED, rate,
                steps_in(name, TRIAL_SHARE * options.seconds),
            )
            for name in chosen for rate in options.learning_rates
        }  # fmt: skip
        peaks = {
            name: min((trials[name, rate].result()["bits_per_byte"], rate) for rate in options.learning_rates)[1]
            for name in chosen
        }
        runs = {
            (name, seed): pool.submit(
                trained, options, chosen[name], f"seed-{seed}", seed, peaks[name], steps_in(name, options.seconds)
            )
            for seed in range(1, options.seeds + 1) for name in chosen
        }  # fmt: skip
        results = {key: run.result() for key, run in runs.items()}

    rows = []
    for name in chosen:
        mine = [results[name, seed] for seed in range(1, options.seeds + 1)]
        scores = [run["bits_per_byte"] for run in mine]
        rows.append([
            name, f"{parameters_of(chosen[name]):,}", f"{rates[name] / 1e3:.1f}",
            f"{mine[0]['bytes_seen'] / 1e6:.2f}", peaks[name], f"{statistics.mean(scores):.4f}",
            f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else "",
        ])  # fmt: skip
    rows.sort(key=lambda row: row[5])
    heads = [
        "architecture",
        "parameters",
        "kB/s",
        "MB read",
        "learning rate",
        "bits per byte",
        f"± ({options.seeds} seeds)",
    ]
    return markdown(heads, rows)


def measured_rates(options: argparse.Namespace, chosen: dict[str, Architecture]) -> dict[str, float]:
    """Return bytes per second on one core for each architecture, measured once and then kept in a file.

    Later measurements include an architecture measured before, and are scaled by it.
    """
    path = options.work / "rates.json"
    rates: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    missing = [name for name in chosen if name not in rates]
    if missing:
        torch.set_num_threads(1)
        known = [name for name in chosen if name in rates][:1]
        measured = measure({name: chosen[name] for name in (*known, *missing)}, options.rounds, time.process_time)
        found = {name: statistics.median(values) for name, values in measured.items()}
        scale = rates[known[0]] / found[known[0]] if known else 1.0
        rates |= {name: found[name] * scale for name in missing}
        path.write_text(json.dumps(rates, indent=2))
    return rates


def trained(
    options: argparse.Namespace, architecture: Architecture, run: str, seed: int, peak: str, steps: int
) -> dict[str, float]:
    """Train one run, and return its validation bits per byte and the bytes that it read."""
    run_dir = options.work / "runs" / f"{Path(architecture.config).stem}-{run}"
    settings = {
        "seed": seed, "training.max_steps": steps, "training.learning_rate": peak,
        "training.warmup_steps": max(1, steps // 20), "training.log_every_steps": max(1, steps // 20),
        "training.eval_every_steps": steps, "training.save_every_steps": steps, "training.keep_last": 1,
    }  # fmt: skip
    pretrain(architecture, run_dir, settings)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train, validation = ([each for each in records if each["split"] == split] for split in ("train", "validation"))
    return {"bits_per_byte": validation[-1]["bits_per_byte"], "bytes_seen": train[-1]["bytes_seen"]}


def pretrain(architecture: Architecture, run_dir: Path, settings: dict[str, Any]) -> None:
    """Train on one core, unless the run is complete."""
    command = [
        sys.executable, ROOT / "scripts" / "pretrain.py", "--config", architecture.config, "--run", run_dir,
        "--set", *architecture.settings, *(f"{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, command))}\n{done.stderr[-2000:]}")


def parameters_of(architecture: Architecture) -> int:
    """Return the number of unique parameters of the model."""
    config = architecture.load()
    with torch.device("meta"):
        return STLM(config.model, open_data(config.data).tokenizer).num_parameters()


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; columns after the first hold numbers."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows])


if __name__ == "__main__":
    main()
