#!/bin/bash
# Train on several hosts, started by hand. Run the same command on each of them, in any order, within 10 minutes:
#
#     HOSTS="10.0.0.1 10.0.0.2" DATA_DIR=/data/tokens OUT_DIR=/runs/mine docs/launch/launch.sh [more training flags]
#
# HOSTS            all hosts, the same list everywhere. Give addresses on the fast network: all traffic uses it, and
#                  nothing listens elsewhere. The first host has rank 0 and the log.
# DATA_DIR         the tokens. Each host needs them, at the same path or on a shared file system.
# OUT_DIR          the run directory, shared or local to each host
# NPROC_PER_NODE   processes per host; default: its number of GPUs, or 1 without GPUs
# CONFIG           the training's configuration; default docs/launch/train.yaml
# PORT             port of the rendezvous on the first host; default 29400
#
# Relative paths start in the project's folder. To stop all hosts after a save, touch OUT_DIR/stop on one of them. After
# that, or after a crash, the same command goes on from the newest checkpoint.

set -u
fail() { echo "launch.sh: $1" >&2; exit 2; }

[ -n "${HOSTS:-}" ] || fail 'HOSTS is missing: give all hosts, as in HOSTS="10.0.0.1 10.0.0.2"'
[ -n "${DATA_DIR:-}" ] || fail 'DATA_DIR is missing: give the directory of the tokens'
[ -n "${OUT_DIR:-}" ] || fail 'OUT_DIR is missing: give the run directory'
cd "$(dirname "$0")/../.." || exit 2
PATH="$PWD/.venv/bin:$PATH"
command -v python > /dev/null || fail "python is missing: make the environment with \`make setup\`"

# Find out which of the hosts this one is, and which interface has that address.
own=$(ip -o address | awk '{ sub("/.*", "", $4); sub("@.*", "", $2); print $4, $2 }')
node_rank='' interface='' number=0
for host in $HOSTS; do
    address=$(getent ahosts "$host" | awk '{ print $1; exit }')
    [ -n "$address" ] || fail "$host has no address that this host knows: write addresses into HOSTS"
    [ "$number" -gt 0 ] || first=$address
    if [ -z "$node_rank" ]; then
        interface=$(awk -v address="$address" '$1 == address { print $2; exit }' <<< "$own")
        [ -z "$interface" ] || node_rank=$number
    fi
    number=$((number + 1))
done
[ -n "$node_rank" ] ||
    fail "none of HOSTS ($HOSTS) is an address of this host, which has $(awk '{ print $1 }' <<< "$own" | xargs)"
[ "$number" -eq 1 ] || [ "$interface" != lo ] ||
    fail "HOSTS names this host by a loopback address, which no other host reaches: write its address on the network"

# Settings of the libraries that carry the traffic; variables that are already set stay. By default both libraries
# choose an interface by its name, or by the address of the host's own name: on a host with several, or with Docker's,
# the others may not be able to reach it.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$interface}"   # "=": this one only, not all with this prefix
# WARN: silent, except for the cause of an error. INFO shows at the start which network NCCL chooses, and why.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# InfiniBand and RoCE: the adapters of this network, on hosts that also have others.
#export NCCL_IB_HCA==mlx5_0,mlx5_1
# How long an adapter waits for an answer: 4.096 us x 2^20 = 4.3 s, seven times; 22 (17 s) if a switch needs longer.
#export NCCL_IB_TIMEOUT=22
# Ethernet instead, to find out whether InfiniBand is to blame.
#export NCCL_IB_DISABLE=1
# Seconds that the ranks may take to save after SIGTERM to the launcher (from torch 2.13 on; before, always 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

if [ -z "${NPROC_PER_NODE:-}" ]; then
    NPROC_PER_NODE=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU')
    [ "$NPROC_PER_NODE" -gt 0 ] || NPROC_PER_NODE=1
fi

# max_restarts=0: an error is shown once, and restarting is left to you or the monitor.
exec python -m parallel.launch --nnodes="$number" --node_rank="$node_rank" --nproc_per_node="$NPROC_PER_NODE" \
    --max_restarts=0 --rdzv_endpoint="$first:${PORT:-29400}" --rdzv_conf=timeout=600 \
    train_my_ddp.py "${CONFIG:-docs/launch/train.yaml}" --data_dir="$DATA_DIR" --out_dir="$OUT_DIR" --resume "$@"
