#!/usr/bin/env bash
# Make the environment, prepare the default corpus, train the quickstart preset on it for a few minutes, evaluate the
# model (compared with general compressors), and generate text.
#
#     bash scripts/quickstart.sh
#
# Rerun the command to resume an interrupted run; after a finished one, it evaluates and generates again. Only pip uses
# the network.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ $# -gt 0 ]; then sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0"; [ "$1" = --help ] || [ "$1" = -h ] || exit 2; exit 0; fi

source "$ROOT/scripts/_setup.sh"
stlm_setup
cd "$ROOT"

# Print a command, then run it.
step() { printf '\n$ %s\n' "$1"; eval "$1"; }

SECONDS=0
step 'bash scripts/preprocess.sh'
# One rank needs no launcher: it starts faster, and receives Ctrl-C and kill directly.
step 'python scripts/pretrain.py --ds_config ds_configs/zero0.json --config quickstart --run runs/quickstart'
step 'python scripts/evaluate.py runs/quickstart'
step 'python scripts/generate.py runs/quickstart --prompt "The module" --max-ids 400'

activate=${VENV/#"$ROOT"\//}/bin/activate
cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s, without the installation. The run is in runs/quickstart. Next:

    source $activate
    python scripts/generate.py runs/quickstart                                 # a conversation
    bash scripts/preprocess.sh --input YOUR_TEXT --output data/yours           # a file, a folder, a .jsonl
    deepspeed scripts/pretrain.py --ds_config ds_configs/zero2.json --data data/yours --run runs/yours
END
