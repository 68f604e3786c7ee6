#!/usr/bin/env bash
# From the quickstart model to one that answers: questions over the embedded text, their answers, fine-tuning on the
# answers alone, and new questions to see what was learned: the form of an answer, hardly yet its content. Some minutes on
# two cores; nothing comes from the network but what pip installs.
#
#     bash scripts/instruct.sh
#
# Trains the quickstart model first if it is missing. Interrupted, the same command goes on where it was.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ $# -gt 0 ]; then sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0"; [ "$1" = --help ] || [ "$1" = -h ] || exit 2; exit 0; fi

source "$ROOT/scripts/_setup.sh"
stlm_setup
cd "$ROOT"

# What is shown is what is run.
step() { printf '\n$ %s\n' "$1"; eval "$1"; }

[ -e runs/quickstart ] || step 'python scripts/pretrain.py --config quickstart --run runs/quickstart'
[ -e data/instructions.jsonl ] || step 'python scripts/make_instructions.py --output data/instructions.jsonl'
step 'python scripts/preprocess.py --input data/instructions.jsonl --conversations --tokenizer-from runs/quickstart --output data/instructions'
[ -e data/instructions/plans/best_fit-512 ] || step 'python scripts/preprocess.py plan data/instructions --packing best_fit --context-length 512'
step 'python scripts/pretrain.py --data data/instructions --run runs/instruct --set training.init_from=runs/quickstart data.packing=best_fit training.max_steps=1500 training.learning_rate=2e-3 training.eval_every_steps=500'
step 'python scripts/evaluate.py runs/instruct'
for question in 'Spell model.' 'Write module in capitals.' 'First word of: the file is open' 'Count the words: the file is open'; do
    step "python scripts/generate.py runs/instruct --chat --temperature 0 --prompt '$question'"
done
