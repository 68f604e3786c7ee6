"""Make the saved files that test_saved_files.py opens, with the code of the commit that is checked out:

    python tests/compatibility/make.py

Run it only to add files of a newer format; those that are there stay as an older commit wrote them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SAVED = Path("/tmp/stlm-saved")  # manifests record the paths of their inputs, here of no real machine

CONFIG = """\
data:
  dir: prepared
model:
  context_length: 32
  width: 16
  embedder: {kind: byte_patch, patching: {kind: fixed, patch_size: 4}, width: 8, num_layers: 1, num_heads: 1, window: 8}
  core: {kind: transformer, num_layers: 2, attention: {num_heads: 2}}
  head: {kind: byte_patch, num_layers: 1, num_heads: 1, window: 8}
training:
  precision: fp32
  max_steps: 8
  batch_size: 2
  learning_rate: 1e-2
  warmup_steps: 2
  log_every_steps: 1
  eval_every_steps: 8
  save_every_steps: 4
  ema_decay: 0.9
"""
TEXT = "\n\n".join(
    f"Entry {number}: the value of item {number * 7 % 31} is {number * number % 97}, and it was noted on day {number}."
    for number in range(120)
)


def main() -> None:
    """Write prepared/, run/ with its checkpoint of step 4, model.stlm, subwords/ and losses.json into saved/."""
    shutil.rmtree(SAVED, ignore_errors=True)
    SAVED.mkdir()
    (SAVED / "text.txt").write_text(TEXT)
    (SAVED / "config.yaml").write_text(CONFIG)

    def script(name: str, *arguments: str) -> None:
        subprocess.run([sys.executable, ROOT / "scripts" / name, *arguments], cwd=SAVED, check=True)

    prepare = ("preprocess.py", "--input", "text.txt", "--documents", "paragraphs", "--validation-fraction", "0.2")
    script(*prepare, "--output", "prepared")
    script(*prepare, "--output", "subwords", "--tokenizer", "sentencepiece:296")
    script("pretrain.py", "--config", "config.yaml", "--run", "run")
    script("convert_checkpoint.py", "run", "--to", "artifact", "--bits", "8", "--output", "model.stlm")

    sys.path.insert(0, str(ROOT))
    from stlm import STLM

    records = [json.loads(line) for line in (SAVED / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {
        "train": {record["step"]: record["loss"] for record in records if record["split"] == "train"},
        "validation": next(record["loss"] for record in records if record["split"] == "validation"),
        "model": STLM.load(SAVED / "run" / "checkpoints" / "step_00000004").log_likelihood(TEXT[:500]),
        "artifact": STLM.load(SAVED / "model.stlm").log_likelihood(TEXT[:500]),
    }
    (SAVED / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
    shutil.rmtree(SAVED / "run" / "checkpoints" / "step_00000008")  # the test runs these steps again
    for left in ("run/tensorboard", "run/train.log", "run/stacks", "prepared/report.html", "subwords/report.html"):
        path = SAVED / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    environment = SAVED / "run" / "environment.json"
    environment.write_text(environment.read_text().replace(f"{ROOT}/", ""))
    shutil.copytree(SAVED, HERE / "saved", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
