#!/bin/bash
# Entry point of a container: starts sshd if requested, then replaces itself with the command, so that signals reach it.
set -euo pipefail

usage() {
    cat <<'TEXT'
zero2all: train a language model from scratch. A container runs the given command in /zero2all:

  python -m demo.run                                        the whole pipeline on a small corpus, about ten minutes
  python train_my_ddp.py --help                             every flag of the training
  python -m parallel.launch --nproc_per_node=2 train_my_ddp.py --data_dir=/data --out_dir=out/mine ...
  python monitor_process.py -- python -m parallel.launch ...  the same with a monitor; exit code 75 after a stop
  python generate.py --model out/mine --prompt "Once upon a time"
  python serve.py --model out/mine --host 0.0.0.0           an OpenAI-compatible API and a chat page, at port 8000
  bash                                                      look around
  sshd                                                      only an SSH server, for monitor_process.py --hosts

Volumes: /data (token files), /zero2all/out (runs), /cache (models of Hugging Face, compiled kernels).
ZERO2ALL_SSHD=1 starts the SSH server beside the command. It admits the keys in
/run/zero2all/authorized_keys as user zero2all, at port 2222 (ZERO2ALL_SSHD_PORT).
docs/docker.md has the rest.
TEXT
}

fail() {
    echo "entrypoint: $1" >&2
    exit 2
}

# Write an sshd_config for a server that belongs to this user and admits nobody else.
prepare_sshd() {
    local keys=${ZERO2ALL_AUTHORIZED_KEYS:-/run/zero2all/authorized_keys} home=${ZERO2ALL_SSHD_DIR:-$HOME/sshd}
    local port=${ZERO2ALL_SSHD_PORT:-2222} user environment="" name
    [[ $EUID != 0 ]] || fail "sshd does not run as root here: leave out --user."
    user=$(id --user --name 2>/dev/null) || fail "sshd needs a user with a name: leave out --user."
    [[ -r $keys ]] || fail "sshd needs public keys: mount a file of them at $keys."
    [[ $port =~ ^[0-9]{4,5}$ ]] || fail "ZERO2ALL_SSHD_PORT is $port: give a number above 1023."
    if ! { mkdir -p "$home" && chmod 700 "$home"; }; then
        fail "$home cannot be made the user's own: name a directory for sshd's key in ZERO2ALL_SSHD_DIR."
    fi
    # Copied, because a mounted file keeps its owner from the host, which sshd would refuse.
    install -m 600 "$keys" "$home/authorized_keys"
    # Made once for each volume, so that clients see the same host every time.
    [[ -f $home/ssh_host_ed25519_key ]] || ssh-keygen -q -t ed25519 -N "" -C zero2all -f "$home/ssh_host_ed25519_key"
    # A session does not inherit the container's environment.
    for name in PATH LD_LIBRARY_PATH PYTHONUNBUFFERED XDG_CACHE_HOME HF_HOME TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR \
        MPLCONFIGDIR; do
        if [[ -n ${!name:-} ]]; then
            environment+=" \"$name=${!name}\""
        fi
    done
    sshd_config=$home/sshd_config
    cat >"$sshd_config" <<TEXT
Port $port
HostKey $home/ssh_host_ed25519_key
AuthorizedKeysFile $home/authorized_keys
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
AllowUsers $user
UsePAM no
PidFile none
X11Forwarding no
AllowAgentForwarding no
AllowTcpForwarding no
Subsystem sftp internal-sftp
SetEnv$environment
TEXT
    /usr/sbin/sshd -t -f "$sshd_config" || fail "sshd refuses $sshd_config."
    echo "sshd: port $port, user $user, host key $(ssh-keygen -l -f "$home/ssh_host_ed25519_key" | cut -d' ' -f2)" >&2
}

# A user known only from --user has no home.
[[ -w ${HOME:-/} ]] || export HOME=/tmp

case ${1:-help} in
help | --help | -h)
    usage
    exit 0
    ;;
sshd)
    [[ $# == 1 ]] || fail "sshd takes no arguments: see the variables ZERO2ALL_SSHD_PORT and ZERO2ALL_AUTHORIZED_KEYS."
    prepare_sshd
    exec /usr/sbin/sshd -D -e -f "$sshd_config"
    ;;
-*)
    fail "$1 is not a command: begin with one, such as python train_my_ddp.py $1."
    ;;
esac

case ${ZERO2ALL_SSHD:-0} in
0 | "") ;;
1)
    prepare_sshd
    # sshd goes into the background by itself.
    /usr/sbin/sshd -f "$sshd_config"
    ;;
*) fail "ZERO2ALL_SSHD is ${ZERO2ALL_SSHD}: give 1 to start sshd, 0 not to." ;;
esac

exec "$@"
