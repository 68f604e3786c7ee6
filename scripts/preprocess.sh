#!/usr/bin/env bash
# Prepare text for training: run scripts/preprocess.py in the project's environment, which is made first if missing.
# All arguments are passed on; without any, the default corpus is prepared. Options: bash scripts/preprocess.sh --help
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

source "$ROOT/scripts/_setup.sh"
stlm_setup
exec python "$ROOT/scripts/preprocess.py" "$@"
