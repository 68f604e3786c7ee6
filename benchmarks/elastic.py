"""Loss curves of runs that are killed and resumed at another size, compared with an uninterrupted run.

    python benchmarks/elastic.py [--steps 60] [--kill-at 20] [--only "1 -> 2 ranks" ...]

One run on one rank is uninterrupted. All ranks of each other run are killed with SIGKILL as soon as the checkpoint of
step 20 exists; the run resumes on other ranks, at another ZeRO stage, or in another precision. The table shows the
largest difference of its losses from those of the first run, over all steps, and the last step up to which they are
equal digit for digit. Exits with 1 if a difference is above its tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from stlm.evals.report import table
from stlm.training.distributed.ranks import free_port

CONFIG = """
model: {context_length: 64, width: 64, core: {num_layers: 2, attention: {num_heads: 4}}}
training: {batch_size: 8, learning_rate: 2e-3, warmup_steps: 10, log_every_steps: 1}
"""
ROUNDING = 1e-5  # nats per id, for sums in another order


class Part(NamedTuple):
    """The ranks, ZeRO stage and settings of one part of a run."""

    ranks: int = 1
    stage: int = 0
    settings: tuple[str, ...] = ()


class Way(NamedTuple):
    """A run in two parts."""

    name: str
    before: Part
    after: Part
    tolerance: float = ROUNDING
    recipe: tuple[str, ...] = ()  # settings of both parts, and of the uninterrupted run


BF16 = ("training.precision=bf16",)
MUON = ("training.optimizer=muon", "training.ema_decay=0.99")
WAYS = [
    Way("1 rank", Part(), Part(), 0.0),
    Way("2 ranks", Part(2), Part(2)),
    Way("1 -> 2 ranks", Part(), Part(2)),
    Way("2 -> 1 ranks", Part(2), Part()),
    Way("2 ranks, ZeRO 2 -> 0", Part(2, 2), Part(2, 0)),
    Way("2 ranks, ZeRO 3 -> 1", Part(2, 3), Part(2, 1)),
    Way("ZeRO 3 on 2 -> ZeRO 2 on 1", Part(2, 3), Part(1, 2)),
    Way("micro-batches of 2 -> 8", Part(settings=("training.micro_batch_size=2",)), Part()),
    Way("Muon, ZeRO 3 on 2 -> 0 on 1", Part(2, 3), Part(), recipe=MUON),
    Way("fp32 -> bf16", Part(), Part(settings=BF16), 5e-2),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: 60)")
    parser.add_argument("--kill-at", type=int, default=20, help="step of the checkpoint before the kill (default: 20)")
    parser.add_argument("--only", nargs="+", choices=[way.name for way in WAYS], help="some of the rows")
    options = parser.parse_args()
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.yaml").write_text(CONFIG)
        command = [
            sys.executable,
            ROOT / "scripts/preprocess.py",
            "--input",
            ROOT / "docs",
            "--output",
            folder / "data",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        references: dict[tuple[str, ...], dict[int, float]] = {}
        for way in WAYS:
            if options.only and way.name not in options.only:
                continue
            if way.recipe not in references:
                whole = f"reference {len(references)}"
                run(folder, whole, Part(), way.recipe, options)
                references[way.recipe] = losses(folder / whole)
            expected = references[way.recipe]
            killed = run(folder, way.name, way.before, way.recipe, options, kill=True)
            run(folder, way.name, way.after, way.recipe, options)
            found = losses(folder / way.name)
            assert sorted(found) == sorted(expected), "every step is logged once"
            differences = [abs(found[step] - expected[step]) for step in sorted(expected)]
            same = next((step for step, value in enumerate(differences) if value), len(differences))
            agrees = max(differences) <= way.tolerance
            failed |= not agrees
            digits = "all" if same == len(differences) else f"to step {same}"
            figures = [f"{max(differences):.1e}", digits, f"{way.tolerance:g}", "yes" if agrees else "NO"]
            rows.append([way.name, str(killed), *figures])
    heads = ["killed and continued", "at step", "largest difference", "digit for digit", "tolerance", "agrees"]
    print(f"losses in nats per id over {options.steps} steps, against one rank that is never stopped")
    print(table(rows, heads, "lrrrrl"))
    return int(failed)


def run(
    folder: Path, name: str, part: Part, recipe: tuple[str, ...], options: argparse.Namespace, kill: bool = False
) -> int:  # fmt: skip
    """Train to the end, or kill the run at the checkpoint of `kill_at`; return the step of the newest checkpoint."""
    settings = [*recipe, f"training.max_steps={options.steps}", f"training.save_every_steps={options.kill_at}"]
    precision = [] if any("precision" in setting for setting in part.settings) else ["training.precision=fp32"]
    command = [
        sys.executable, str(ROOT / "scripts/pretrain.py"), "--config", str(folder / "tiny.yaml"),
        "--data", str(folder / "data"), "--run", str(folder / name),
        "--ds_config", str(ROOT / f"ds_configs/zero{part.stage}.json"),
        "--set", *settings, *precision, *part.settings,
    ]  # fmt: skip
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(part.ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": str(part.ranks)}
    logs = [open(folder / f"{name}-{rank}.log", "w") for rank in range(part.ranks)]  # noqa: SIM115 (closed below)
    processes = [
        subprocess.Popen(
            command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log, stderr=log
        )
        for rank, log in enumerate(logs)
    ]
    complete = folder / name / f"checkpoints/step_{options.kill_at:08d}/COMPLETE"
    while kill and not complete.is_file() and all(process.poll() is None for process in processes):
        time.sleep(0.001)
    if kill:
        for process in processes:  # before waiting for any: a rank that sees another end would end by itself
            process.send_signal(signal.SIGKILL)
    for process in processes:
        code = process.wait()
        if code != (-signal.SIGKILL if kill else 0):
            sys.exit(f"{name}: a rank ended with {code}:\n{(folder / f'{name}-0.log').read_text()}")
    for log in logs:
        log.close()
    return max(int(path.parent.name[-8:]) for path in folder.glob(f"{name}/checkpoints/step_*/COMPLETE"))


def losses(run_dir: Path) -> dict[int, float]:
    """Return the training loss of each step."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["split"] == "train"}


if __name__ == "__main__":
    sys.exit(main())
