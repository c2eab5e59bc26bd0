#!/bin/bash
# Train with one of the configurations in this folder:
#
#     configs/meshes/train.sh 7b-8x80gb --data_dir=O --out_dir=out/7b [more training flags]
#
# Names that begin with the number of GPUs of two machines (16x80gb) need HOSTS, the same on both:
#
#     HOSTS="10.0.0.1 10.0.0.2" configs/meshes/train.sh 70b-16x80gb --data_dir=O --out_dir=out/70b
#
# docs/launch/launch.sh says what else can be set, and docs/launch/README.md what the network needs. On one machine the
# monitor restarts the training after a crash; on two, start it again with the same command.

set -u
fail() { echo "train.sh: $1" >&2; exit 2; }

name=${1:-} folder=$(dirname "$0")
[ -f "$folder/$name.yaml" ] || fail "give one of $(basename -s .yaml "$folder"/*.yaml | xargs)"
shift
ranks=${name##*-} ranks=${ranks%%x*}
if [ "$ranks" -gt 8 ]; then
    [ -n "${HOSTS:-}" ] || fail "HOSTS is missing: give both machines, as in HOSTS=\"10.0.0.1 10.0.0.2\""
    DATA_DIR='' OUT_DIR=''
    for flag in "$@"; do
        case $flag in
            --data_dir=*) DATA_DIR=${flag#*=} ;;
            --out_dir=*) OUT_DIR=${flag#*=} ;;
        esac
    done
    [ -n "$DATA_DIR" ] && [ -n "$OUT_DIR" ] || fail "give --data_dir=... and --out_dir=..."
    export DATA_DIR OUT_DIR CONFIG="configs/meshes/$name.yaml" NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
    exec "$folder/../../docs/launch/launch.sh" "$@"
fi
cd "$folder/../.." || exit 2
PATH="$PWD/.venv/bin:$PATH"
exec python monitor_process.py -- python -m parallel.launch --nproc_per_node="$ranks" \
    train_my_ddp.py "configs/meshes/$name.yaml" "$@"
