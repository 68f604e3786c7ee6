#!/usr/bin/env bash
# Run every check of the project: ruff, codespell, mypy on the two packages, and the tests. Needs only Python and pip's
# index: the environment is made first.
#
#     bash scripts/test.sh                        run the tests that take seconds
#     bash scripts/test.sh --all                  run the slow tests too (README's long commands, wheels, a cluster, …).
#                                                 Root on Debian gets Slurm, Open MPI, pdsh and sshd installed;
#                                                 elsewhere tests that need a missing one are skipped
#     bash scripts/test.sh tests/model -k causal  pass other arguments to pytest
#
# Exit code: that of pytest. If ruff, codespell or mypy finds a problem, its exit code, and no test runs.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0"; exit; fi

which_tests=()   # pyproject.toml leaves the slow ones out
if [ "${1:-}" = --all ]; then
    which_tests=(-m "")
    shift
    bash "$ROOT/tests/integration/run.sh" --install
    with_oldest_deepspeed=yes
fi

source "$ROOT/scripts/_setup.sh"
stlm_setup dev
cd "$ROOT"

ruff check .
ruff format --check .
codespell
mypy

# One worker for each core, with one thread: for models this small that is faster than threads inside one process, and
# sums are the same on every machine. A worker runs all tests of a file, so that shared fixtures are made once.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=1

# The environment has the newest DeepSpeed that is tested; the tests marked `deepspeed` also run with the oldest one that
# setup.py allows, which is kept in a folder of the environment.
if [ "${with_oldest_deepspeed:-}" = yes ]; then
    oldest=$(sed -n 's/.*"deepspeed>=\([0-9.]*\).*/\1/p' setup.py)
    kept="$VENV/deepspeed-$oldest"
    if [ ! -d "$kept" ]; then
        rm -rf "$kept.part"
        python -m pip install --quiet --disable-pip-version-check --no-deps --target "$kept.part" "deepspeed==$oldest"
        mv "$kept.part" "$kept"
    fi
    echo "tests marked deepspeed, with DeepSpeed $oldest:"
    PYTHONPATH="$kept${PYTHONPATH:+:$PYTHONPATH}" python -m pytest -q -n 2 --dist loadfile -m deepspeed tests/training
fi

exec python -m pytest -n $((cores < 8 ? cores : 8)) --dist loadfile ${which_tests[@]+"${which_tests[@]}"} "$@"
