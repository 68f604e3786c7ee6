#!/usr/bin/env bash
# Start scripts/pretrain.py on all nodes of a hostfile with DeepSpeed's launcher, and print the command.
#
#     bash scripts/multinode.sh [--hostfile FILE] [--launcher pdsh|openmpi] [--master_addr ADDRESS] [--master_port PORT]
#                               [--dry-run] [options of scripts/pretrain.py]
#
# Each line of the hostfile names a node and its ranks: `node1 slots=8`. The nodes share this folder and the environment,
# and accept ssh without a password. Defaults: ./hostfile, pdsh, the first node's address for ssh, 29500.
# Ranks get environment variables that begin with PYTHON or NCCL; list others in .deepspeed_env, one NAME=value a line.
#
# Before the start, the script checks that all nodes can be reached and that the port is free. --dry-run checks nothing
# and only prints the command. Exit code: 2 after a user error, else that of the training.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() { printf 'error: %s\n' "$@" >&2; exit 2; }

hostfile=hostfile launcher=pdsh address="" port=29500 dry_run="" options=()
while [ $# -gt 0 ]; do
    name=${1%%=*}
    case $name in
        --help|-h) sed -n '2,/^set/{/^# \{0,1\}/s///p}' "$0"; exit ;;
        --dry-run) dry_run=yes; shift; continue ;;
        --hostfile|--launcher|--master_addr|--master_port) ;;
        *) options+=("$1"); shift; continue ;;
    esac
    if [ "$name" = "$1" ]; then
        [ $# -gt 1 ] || die "$name: expected a value"
        value=$2; shift 2
    else
        value=${1#*=}; shift
    fi
    case $name in
        --hostfile) hostfile=$value ;;
        --launcher) launcher=$value ;;
        --master_addr) address=$value ;;
        --master_port) port=$value ;;
    esac
done

case $launcher in
    pdsh) needs=pdsh package=pdsh ;;
    openmpi) needs=mpirun package=openmpi-bin ;;
    *) die "--launcher: got '$launcher', expected pdsh or openmpi" ;;
esac
[[ $port =~ ^[0-9]{1,5}$ ]] && ((port > 0 && port < 65536)) || die "--master_port: got '$port', expected 1 to 65535"

# --- the hostfile (without one, DeepSpeed would train on this machine alone) -----------------------------------------

[ -f "$hostfile" ] || die "there is no hostfile '$hostfile'; name one with --hostfile, with lines such as 'node1 slots=8'"
nodes=() number=0
while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*(#.*)?$ ]] \
        || die "$hostfile:$number: got '$line', expected a name and its number of ranks: 'node1 slots=8'"
    node=${BASH_REMATCH[1]}
    case " ${nodes[*]-} " in *" $node "*) die "$hostfile:$number: $node is listed twice" ;; esac
    nodes+=("$node")
done < "$hostfile"
[ ${#nodes[@]} -gt 0 ] || die "$hostfile lists no node; expected lines such as 'node1 slots=8'"

# --- the command -----------------------------------------------------------------------------------------------------

source "$ROOT/scripts/_setup.sh"
stlm_setup
# The address of the first node in ssh's configuration; the other nodes must reach it too.
[ -n "$address" ] || address=$(ssh -G "${nodes[0]}" | sed -n 's/^hostname //p')

command=(deepspeed --hostfile "$hostfile" --force_multi --launcher "$launcher"
    --master_addr "$address" --master_port "$port")
if [ "$launcher" = openmpi ]; then  # DeepSpeed does not pass these on to mpirun
    command+=(--launcher_args "-x MASTER_ADDR=$address -x MASTER_PORT=$port")
fi
command+=("$ROOT/scripts/pretrain.py" ${options[@]+"${options[@]}"})
printf '%q ' "${command[@]}"; echo
[ -z "$dry_run" ] || exit 0

# --- the nodes -------------------------------------------------------------------------------------------------------

command -v $needs >/dev/null || die "no $needs on this machine; on Debian: apt-get install $package"
answers=$(mktemp -d)
trap 'rm -rf "$answers"' EXIT
printf -v here 'cd %q && test -x %q && test -f %q' "$PWD" "$VENV/bin/python" "$ROOT/scripts/pretrain.py"
for node in "${nodes[@]}"; do
    ssh -o BatchMode=yes -o ConnectTimeout=10 "$node" "$here" </dev/null >"$answers/$node" 2>&1 \
        || echo $? >"$answers/$node.code" &
done
wait
problems=()
for node in "${nodes[@]}"; do
    [ -f "$answers/$node.code" ] || continue
    if [ "$(cat "$answers/$node.code")" = 255 ]; then
        problems+=("$hostfile: $node cannot be reached: $(tr -d '\r' <"$answers/$node" | tail -n 1)")
    else
        problems+=("$node does not see $PWD, $VENV or $ROOT, which all nodes must share")
    fi
done
[ ${#problems[@]} = 0 ] || die "${problems[@]}"
printf -v listens 'exec 2>/dev/null 3<>/dev/tcp/%q/%q' "$address" "$port"
if ssh -o BatchMode=yes "${nodes[0]}" "bash -c '$listens'" </dev/null; then
    die "port $port of ${nodes[0]} is in use, maybe by another run; choose another with --master_port"
fi

rm -rf "$answers"
exec "${command[@]}"
