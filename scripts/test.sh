#!/usr/bin/env bash
# Run every check of the project: ruff, codespell, mypy on the two packages, and the tests. Needs only Python and pip's
# index: the environment is made first.
#
#     bash scripts/test.sh                        the tests that take seconds each
#     bash scripts/test.sh --all                  the slow ones as well (README's long commands, wheels, a cluster, …);
#                                                 root on Debian also gets the Slurm, Open MPI, pdsh and sshd that they
#                                                 take, and skip without
#     bash scripts/test.sh tests/model -k causal  anything else goes to pytest as it is
#
# Exit code: pytest's; if ruff, codespell or mypy finds something, its exit code, and no test is run.
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

# One thread in each worker, one worker on each core: for models this small that is faster than threads inside one
# process, and sums come out the same on every machine. All tests of a file stay together, so that what they share is
# made once.
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
