#!/bin/bash
# Train on several hosts, started by hand. The same command on each of them, in any order, within 10 minutes:
#
#     HOSTS="10.0.0.1 10.0.0.2" DATA_DIR=/data/tokens OUT_DIR=/runs/mine docs/launch/launch.sh [more training flags]
#
# HOSTS            all hosts, the same list everywhere. Give the addresses of the fast network: the traffic takes it;
#                  nothing listens elsewhere. The first host has rank 0 and the log.
# DATA_DIR         the tokens. Each host needs them, at the same path or on a common file system.
# OUT_DIR          the run directory: common or each host's own, both work.
# NPROC_PER_NODE   processes a host; default: its GPUs, or 1 without any.
# CONFIG           what is trained; default docs/launch/train.yaml
# PORT             of the rendezvous, on the first host; default 29400
#
# Relative paths count from the project's folder. To stop all hosts after a save: touch OUT_DIR/stop, on one of them.
# After that, or after a crash, the same command goes on from the newest checkpoint.

set -u
fail() { echo "launch.sh: $1" >&2; exit 2; }

[ -n "${HOSTS:-}" ] || fail 'HOSTS is missing: give all hosts, as in HOSTS="10.0.0.1 10.0.0.2"'
[ -n "${DATA_DIR:-}" ] || fail 'DATA_DIR is missing: give the directory of the tokens'
[ -n "${OUT_DIR:-}" ] || fail 'OUT_DIR is missing: give the run directory'
cd "$(dirname "$0")/../.." || exit 2
PATH="$PWD/.venv/bin:$PATH"
command -v python > /dev/null || fail "python is missing: make the environment with \`make setup\`"

# Which of the hosts this one is, and behind which interface it has that address.
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

# The settings of the libraries that carry the traffic: here, never inside the program. What is set already stays.
# Both would otherwise take an interface by its name, or by what the host's own name resolves to: on a host with
# several, or with Docker's, that may be one that the others cannot reach.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$interface}"   # "=" is this one; without, all whose names begin so
# WARN: silent, but for the cause of an error. INFO shows at start which network NCCL takes, and why.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# InfiniBand and RoCE: the adapters of this network, on hosts that have others, too.
#export NCCL_IB_HCA==mlx5_0,mlx5_1
# How long an adapter waits for an answer: 4.096 us x 2^20 = 4.3 s, seven times; 22 (17 s) where a switch needs longer.
#export NCCL_IB_TIMEOUT=22
# Ethernet instead, to find out whether InfiniBand is to blame.
#export NCCL_IB_DISABLE=1
# SIGTERM to the launcher: how many seconds its ranks may take to save (from torch 2.13 on; before, 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

if [ -z "${NPROC_PER_NODE:-}" ]; then
    NPROC_PER_NODE=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU')
    [ "$NPROC_PER_NODE" -gt 0 ] || NPROC_PER_NODE=1
fi

# max_restarts=0: what went wrong is shown once, and starting again is left to whoever looks at it, or to the monitor.
exec python -m parallel.launch --nnodes="$number" --node_rank="$node_rank" --nproc_per_node="$NPROC_PER_NODE" \
    --max_restarts=0 --rdzv_endpoint="$first:${PORT:-29400}" --rdzv_conf=timeout=600 \
    train_my_ddp.py "${CONFIG:-docs/launch/train.yaml}" --data_dir="$DATA_DIR" --out_dir="$OUT_DIR" --resume "$@"
