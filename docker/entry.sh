#!/bin/sh
# The image's entry point: where caches go, then the command. Nothing is written to the image's own file system.
#
# What is compiled (Triton, Inductor, extensions, CUDA's own cache, Unsloth's) lies in a folder named after the image, its Triton and
# the driver, so that a change of any of them starts cold instead of running what another compiled. Models are the same
# for all of them and lie beside it.
set -eu

root=${SPARKPROOF_CACHE:-/cache}
if ! mkdir -p "$root/home" 2>/dev/null || ! [ -w "$root/home" ]; then
  root=$(mktemp -d "${TMPDIR:-/tmp}/sparkproof-cache.XXXXXX") || {
    echo "sparkproof: neither ${SPARKPROOF_CACHE:-/cache} nor ${TMPDIR:-/tmp} can be written: mount a volume at /cache or --tmpfs /tmp:exec." >&2
    exit 2
  }
  echo "sparkproof: ${SPARKPROOF_CACHE:-/cache} can't be written by uid $(id -u); caches are in $root and go with this container." >&2
fi

driver=none
if [ -r /proc/driver/nvidia/version ]; then
  driver=$(sed -n 's/^NVRM version:.* \([0-9][0-9]*\.[0-9][0-9.]*\) .*/\1/p' /proc/driver/nvidia/version)
  driver=${driver:-unknown}
fi
compiled=$root/compiled/$(cat "${SPARKPROOF_SHARE:-/opt/sparkproof/share}/cache-key")-driver-$driver

export TRITON_CACHE_DIR="$compiled/triton" TORCHINDUCTOR_CACHE_DIR="$compiled/inductor"
export TORCH_EXTENSIONS_DIR="$compiled/extensions" CUDA_CACHE_PATH="$compiled/cuda"
export UNSLOTH_COMPILE_LOCATION="$compiled/unsloth" VLLM_CACHE_ROOT="$compiled/vllm"
export HF_HOME="${HF_HOME:-$root/huggingface}" XDG_CACHE_HOME="$root" HOME="$root/home"
# A uid that the image has no name for: getpass asks these before the password file.
export USER="${USER:-sparkproof}" LOGNAME="${LOGNAME:-sparkproof}"
export SPARKPROOF_IN_IMAGE=1 # for the report: where it ran

[ $# -gt 0 ] || set -- sparkproof doctor
exec "$@"
