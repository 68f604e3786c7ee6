#!/usr/bin/env bash
# Trains a tiny model on two nodes that are this machine, with the real programs of a cluster, which are started and
# stopped for it.
#
#     bash tests/integration/run.sh slurm|ssh|mpi...     one or more of them; none named: all
#     bash tests/integration/run.sh --install ...        only installs what they need (root on Debian)
#
#     slurm   slurmctld, two slurmd and munged: the jobs in scripts/slurm/
#     ssh     a sshd with two names, and pdsh: scripts/multinode.sh
#     mpi     Open MPI: mpirun, alone, over ssh, and below DeepSpeed's launcher
#
# What is missing is installed where that is possible; elsewhere its tests are skipped, and say for want of what.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0"; exit; fi
only_install=""
[ "${1:-}" != --install ] || { only_install=yes; shift; }
[ $# -gt 0 ] || set -- slurm ssh mpi

packages=() tests=() missing=""
PATH=$PATH:/usr/sbin:/sbin  # where Debian keeps daemons
for part in "$@"; do
    case $part in
        slurm) needs=(slurmctld slurmd sbatch munged) of=(slurm-wlm munge) ;;
        ssh) needs=(sshd ssh pdsh) of=(openssh-server openssh-client pdsh) ;;
        mpi) needs=(mpirun sshd ssh) of=(openmpi-bin openssh-server openssh-client) ;;
        *) echo "error: got '$part', expected slurm, ssh or mpi" >&2; exit 2 ;;
    esac
    packages+=("${of[@]}")
    tests+=("tests/integration/test_$part.py")
    for program in "${needs[@]}"; do command -v "$program" >/dev/null || missing="$missing $program"; done
done

if [ -n "$missing" ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq install --yes --no-install-recommends "${packages[@]}"; } >&2 \
        || echo "could not be installed:$missing; the tests that need them are skipped" >&2
elif [ -n "$missing" ]; then
    echo "not installed, which takes root on Debian:$missing; the tests that need them are skipped" >&2
fi
[ -z "$only_install" ] || exit 0

source "$ROOT/scripts/_setup.sh"
stlm_setup dev
cd "$ROOT"
exec python -m pytest -m "" "${tests[@]}"
