#!/usr/bin/env bash
# Text to shards: scripts/preprocess.py in the project's environment, which is made first where there is none.
# All arguments are passed on; with none the embedded default corpus is prepared. Options: bash scripts/preprocess.sh --help
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

source "$ROOT/scripts/_setup.sh"
stlm_setup
exec python "$ROOT/scripts/preprocess.py" "$@"
