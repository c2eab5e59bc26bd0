#!/bin/bash
# Build the image with whichever of docker, podman and buildah is installed; --help lists the options.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# PyPI's torch 2.13 is built for CUDA 13.0 and brings its own cuBLAS, cuDNN and NCCL, so the small image is enough.
gpu_base=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04

usage() {
    cat <<TEXT
usage: docker/build.sh [options] [-- options of the tool]

  --target cpu|gpu     image to build (default: cpu)
  --tag NAME           the image's name (default: zero2all:cpu or zero2all:gpu)
  --base IMAGE         image to build on: Debian or Ubuntu, with or without Python 3.11 or 3.12
                       (default: as in docker/Dockerfile; for gpu $gpu_base)
  --tool NAME          docker, podman or buildah (default: the first that is installed)
  --torch-index URL    index of torch's builds for CPUs, or for another CUDA version
  --extras "WORDS"     further Python packages (default: none; for gpu liger-kernel)
  --pip-config FILE    pip.conf for the build; nothing of it stays in the image
  --print              show the command instead of running it
  --help               this text

Options after -- go to the tool unchanged: --network host, --isolation chroot, --volume DIR:DIR:ro, ...
TEXT
}

fail() {
    echo "build.sh: $1" >&2
    exit 2
}

target=cpu tag="" base="" tool="" torch_index="" extras="" pip_config="" print=0 has_extras=0
while [[ $# -gt 0 ]]; do
    case $1 in
    --help | -h)
        usage
        exit 0
        ;;
    --print)
        print=1
        shift
        continue
        ;;
    --)
        shift
        break
        ;;
    --target | --tag | --base | --tool | --torch-index | --extras | --pip-config) ;;
    *) fail "$1 is not an option here: see docker/build.sh --help; the tool's own options come after --." ;;
    esac
    [[ $# -gt 1 && $2 != --* ]] || fail "$1 needs a value: see docker/build.sh --help."
    case $1 in
    --target) target=$2 ;;
    --tag) tag=$2 ;;
    --base) base=$2 ;;
    --tool) tool=$2 ;;
    --torch-index) torch_index=$2 ;;
    --extras) extras=$2 has_extras=1 ;;
    --pip-config) pip_config=$2 ;;
    esac
    shift 2
done

[[ $target == cpu || $target == gpu ]] || fail "--target is cpu or gpu, not $target."
[[ -z $pip_config || -r $pip_config ]] || fail "$pip_config cannot be read: give --pip-config a pip.conf."
if [[ -z $tool ]]; then
    for name in docker podman buildah; do
        if command -v "$name" >/dev/null; then
            tool=$name
            break
        fi
    done
    [[ -n $tool ]] || fail "neither docker nor podman nor buildah is installed: install one of them."
fi
case $tool in
docker) command=(docker build) ;;
# Their default format, OCI, has no place for HEALTHCHECK.
podman) command=(podman build --format docker --layers) ;;
buildah) command=(buildah bud --format docker --layers) ;;
*) fail "--tool is docker, podman or buildah, not $tool." ;;
esac
command -v "$tool" >/dev/null || fail "$tool is not installed: install it, or leave out --tool."

if [[ -z $base && $target == gpu ]]; then
    base=$gpu_base
fi
revision=$(git -C "$root" rev-parse --short HEAD 2>/dev/null) || revision=unknown
command+=(--file "$root/docker/Dockerfile" --target "$target" --tag "${tag:-zero2all:$target}")
[[ -z $base ]] || command+=(--build-arg "BASE=$base")
[[ -z $torch_index ]] || command+=(--build-arg "TORCH_INDEX=$torch_index")
[[ $has_extras == 0 ]] || command+=(--build-arg "EXTRAS=$extras")
command+=(--build-arg "REVISION=$revision")
[[ -z $pip_config ]] || command+=(--secret "id=pip_conf,src=$pip_config")
command+=("$@" "$root")

if [[ $print == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
