#!/usr/bin/env bash
# From nothing to a trained, scored, talking model: makes the environment, prepares the default text, trains the
# quickstart preset on it for some minutes, scores the model beside general compressors, and lets it write.
#
#     bash scripts/quickstart.sh
#
# Interrupted, the same command goes on where it was; finished, it only scores and writes again. Nothing is read from the
# network but what pip installs.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ $# -gt 0 ]; then sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0"; [ "$1" = --help ] || [ "$1" = -h ] || exit 2; exit 0; fi

source "$ROOT/scripts/_setup.sh"
stlm_setup
cd "$ROOT"

# What is shown is what is run.
step() { printf '\n$ %s\n' "$1"; eval "$1"; }

SECONDS=0
step 'bash scripts/preprocess.sh'
# One rank, which needs no launcher: it starts sooner, and Ctrl-C and kill reach it directly.
step 'python scripts/pretrain.py --ds_config ds_configs/zero0.json --config quickstart --run runs/quickstart'
step 'python scripts/evaluate.py runs/quickstart'
step 'python scripts/generate.py runs/quickstart --prompt "The module" --max-ids 400'

activate=${VENV/#"$ROOT"\//}/bin/activate
cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s, installation not counted. The run is in runs/quickstart. To go on:

    source $activate
    python scripts/generate.py runs/quickstart                                 # type prompts, read what it writes
    bash scripts/preprocess.sh --input YOUR_TEXT --output data/yours           # a file, a folder, a .jsonl
    deepspeed scripts/pretrain.py --ds_config ds_configs/zero2.json --data data/yours --run runs/yours
END
