#!/usr/bin/env bash
# Submit Slurm jobs from text to evaluated and exported models, each waiting for the one before: preprocess, then for
# each seed pretrain, evaluate and export. Print each command.
#
#     bash scripts/slurm/pipeline.sh [--name NAME] [--input PATH|HF_ID]... [--tokenizer SPEC] [--config PRESET|FILE]
#                                    [--ds_config FILE] [--seeds 1-3] [--to FORMAT]... [--dry-run]
#                                    [-- options of sbatch for pretrain]
#
# Data is prepared in data/NAME; the runs are runs/NAME-seed-1 …; --dry-run submits nothing. Defaults: the name of the
# config, the quickstart preset on the default corpus, ZeRO 0, seed 1, safetensors. For example, 2 nodes of 8 GPUs:
#
#     bash scripts/slurm/pipeline.sh --input texts/ --config mine.yaml --seeds 1-3 \
#         -- --nodes=2 --ntasks-per-node=8 --gpus-per-node=8
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

die() { echo "error: $*" >&2; exit 2; }

name="" config=quickstart seeds=1 dry_run="" prepare=() train=() nodes=() formats=()
while [ $# -gt 0 ]; do
    case $1 in
        --help|-h) sed -n '2,/^set/{/^# \{0,1\}/s///p}' scripts/slurm/pipeline.sh; exit ;;
        --dry-run) dry_run=yes; shift; continue ;;
        --) shift; nodes=("$@"); break ;;
    esac
    [ $# -gt 1 ] || die "$1: expected a value"
    case $1 in
        --name) name=$2 ;;
        --config) config=$2 ;;
        --seeds) seeds=$2 ;;
        --to) formats+=("$2") ;;
        --input|--tokenizer) prepare+=("$1" "$2") ;;
        --ds_config) train+=("$1" "$2") ;;
        *) die "unknown option $1; give options of sbatch after --" ;;
    esac
    shift 2
done
[[ $seeds =~ ^[0-9][0-9,-]*$ ]] || die "--seeds: got '$seeds', expected numbers such as 1-3 or 1,5,7"
[ ${#formats[@]} -gt 0 ] || formats=(safetensors)
[ -n "$name" ] || { name=${config##*/}; name=${name%.*}; }
[ -n "$dry_run" ] || command -v sbatch >/dev/null || die "no sbatch on this machine; --dry-run prints the commands"

# submit PLACEHOLDER COMMAND...: print the command and run it; JOB becomes the number of the job.
submit() {
    JOB=$1; shift
    printf '%q ' "$@"; echo
    if [ -z "$dry_run" ]; then
        JOB=$("$@")
        JOB=${JOB%%;*}  # number;cluster
        echo "  job $JOB"
    fi
}

# A job whose predecessor failed is removed from the queue; seeds do not wait for each other.
submit PREPROCESS sbatch --parsable scripts/slurm/preprocess.sbatch --output "data/$name" ${prepare[@]+"${prepare[@]}"}
submit PRETRAIN sbatch --parsable --dependency="afterok:$JOB" --kill-on-invalid-dep=yes --array="$seeds" \
    ${nodes[@]+"${nodes[@]}"} scripts/slurm/pretrain.sbatch "runs/$name" \
    --config "$config" --data "data/$name" ${train[@]+"${train[@]}"}
trained=$JOB
submit EVALUATE sbatch --parsable --dependency="aftercorr:$trained" --kill-on-invalid-dep=yes --array="$seeds" \
    scripts/slurm/evaluate.sbatch "runs/$name"
for format in "${formats[@]}"; do
    submit EXPORT sbatch --parsable --dependency="aftercorr:$trained" --kill-on-invalid-dep=yes --array="$seeds" \
        scripts/slurm/export.sbatch "runs/$name" "$format"
done
