#!/usr/bin/env bash
# Fine-tune the quickstart model to answer questions: write questions about the default corpus with answers, train on
# the answers alone, evaluate, and ask new questions. The model learns the form of answers and little of their content.
# It takes a few minutes on two cores. Only pip uses the network.
#
#     bash scripts/instruct.sh
#
# The quickstart model is trained first if it is missing. Rerun the command to resume an interrupted run.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ $# -gt 0 ]; then sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0"; [ "$1" = --help ] || [ "$1" = -h ] || exit 2; exit 0; fi

source "$ROOT/scripts/_setup.sh"
stlm_setup
cd "$ROOT"

# Print a command, then run it.
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
