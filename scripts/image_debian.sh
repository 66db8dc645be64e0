#!/usr/bin/env bash
# Build the image where there is no Docker engine and no way to NVIDIA's registry: on a Debian base, with buildah, and try it with
# podman as a user would run it: read-only, without privileges, without network.
#
#   scripts/image_debian.sh [amd64|arm64] [cpu|none|serve]
#
# cpu and none say which llama.cpp the image for training gets; serve builds vLLM's image instead.
#
# Needs root and, from Debian, buildah, podman, runc and mmdebstrap (for arm64 also qemu-user-static, arch-test and catatonit). Debian's Python
# is 3.13, which the lock serves too; the CUDA side is compiled, never run. docs/image.md has what it takes in time and space.
set -euo pipefail
cd "$(dirname "$0")/.."

arch=${1:-amd64} what=${2:-none}
base=localhost/sparkproof-debian:$arch
image=localhost/sparkproof-debian-test:$arch
work=${TMPDIR:-/tmp}/sparkproof-image-$arch
podman=(podman --runtime runc --cgroup-manager cgroupfs)

stop() {
  echo "image: $1" >&2
  exit 2
}
say() {
  echo "image: $(date +%T) $1"
}

case $arch in amd64 | arm64) ;; *) stop "$arch is not known: amd64 or arm64." ;; esac
target=runtime lock=LOCK llama=none
case $what in
  cpu | none) llama=$what ;;
  serve) target=serve lock=SERVE_LOCK image=localhost/sparkproof-debian-serve:$arch ;;
  *) stop "$what is not known: cpu, none or serve." ;;
esac
[ "$(id -u)" = 0 ] || stop "root is needed: sudo scripts/image_debian.sh $arch $what"
for tool in buildah podman runc mmdebstrap; do
  command -v "$tool" >/dev/null || stop "$tool is missing: sudo apt install buildah podman runc mmdebstrap"
done
mkdir -p "$work"
# 46 GB were used at the peak: three stages of 8 GB, each copied once on its way into the store, and the packages' cache.
store=$(podman info --format '{{.Store.GraphRoot}}')
room=$(df --output=avail -B1G "$store" | tail -1 | tr -dc 0-9)
[ "$room" -ge 50 ] || stop "50 GB must be free for the layers and their copies, and $room are under $store: podman image prune --all gives back what no container uses."

isolation=(--isolation chroot) emulated=() limit=${TRIAL_LIMIT_S:-1800}
if [ "$arch" != "$(dpkg --print-architecture)" ]; then
  [ "$arch" = arm64 ] || stop "only arm64 is tried under emulation here."
  [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
  update-binfmts --enable qemu-aarch64 || stop "qemu is missing: sudo apt install qemu-user-static binfmt-support arch-test catatonit"
  # An emulated torch reads the host's processors and crashes: a description of an arm64 one in its place. Only the OCI
  # isolation honours that mount.
  printf 'processor\t: %d\nBogoMIPS\t: 100.00\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics asimdhp\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n' 0 1 > "$work/cpuinfo"
  isolation=(--isolation oci --runtime runc -v "$work/cpuinfo:/proc/cpuinfo:ro")
  # Vectors of 128 bits, as a GB10's cores have: with qemu's own 512, torch's products with 8 columns are wrong.
  # Compiling Python is most of an emulated import: what one process compiled, the next may take.
  install -d -o 10001 -g 10001 "$work/bytecode"
  emulated=(--init --security-opt mask=/sys/devices/system/cpu -v "$work/cpuinfo:/proc/cpuinfo:ro"
    -v "$work/bytecode:/bytecode" -e PYTHONPYCACHEPREFIX=/bytecode -e PYTHONDONTWRITEBYTECODE=
    -e "QEMU_CPU=max,sve128=on,sve256=off,sve512=off")
  limit=${TRIAL_LIMIT_S:-5400}
fi

if ! podman image exists "$base"; then
  say "making a Debian base for $arch"
  mmdebstrap --quiet --variant=minbase --arch="$arch" --include=ca-certificates,python3,python3-venv trixie "$work/base.tar"
  podman import --arch "$arch" "$work/base.tar" "$base"
  rm "$work/base.tar"
fi

say "building $image ($target, llama.cpp: $llama)"
echo 'system-certs = true' > "$work/uv.toml"
buildah --storage-driver "$(podman info --format '{{.Store.GraphDriverName}}')" bud "${isolation[@]}" --format docker --pull-never --layers --platform "linux/$arch" \
  --ulimit nofile=1024:1024 --ulimit nproc=4096:4096 -v /etc/ssl/certs:/etc/ssl/certs:ro -v "$work/uv.toml:/etc/uv/uv.toml:ro" \
  --build-arg BASE_IMAGE="$base" --build-arg PYTHON=python3 --build-arg LLAMA="$llama" --build-arg COMPILE_BYTECODE="${COMPILE_BYTECODE:-1}" \
  --build-arg JOBS="$(nproc)" --build-arg REVISION="$(git rev-parse HEAD)" --build-arg VERSION="$(git describe --tags --always)" \
  --build-arg "$lock=$(sha256sum "docker/$target.lock" | cut -d' ' -f1)" --target "$target" -t "$image" -f docker/Dockerfile .
podman image inspect "$image" --format 'image: {{.Architecture}} {{.Size}} bytes {{.Digest}}'

# As a user runs it: nothing may be written but /tmp and the cache. Each step has a limit of its own; an emulated crash is a failure.
run() {
  local limit=$1
  shift
  timeout "$limit" "${podman[@]}" run --rm "${emulated[@]}" --network=none --read-only --cap-drop=all \
    --security-opt no-new-privileges --ulimit nofile=1024:1024 --ulimit nproc=4096:4096 --shm-size 1g \
    --tmpfs /tmp:rw,exec,mode=1777 --tmpfs /cache:rw,exec,mode=1777 -v "$PWD/docker/trial.py:/trial.py:ro" \
    --entrypoint sparkproof-entry "$image" "$@"
}
if [ "$target" = serve ]; then
  say "imports up to the server, and a Triton compile for sm_121 by this architecture's ptxas"
  run "$limit" python /trial.py serve
  say "done"
  exit
fi
say "imports, a Triton compile for sm_121 by this architecture's ptxas, and a LoRA step inside it"
run "$limit" python /trial.py
say "sparkproof doctor inside it (1 would say that it found an error of the machine)"
run "$limit" sparkproof doctor --no-network && code=0 || code=$?
[ "$code" -le 1 ] || stop "doctor ended with $code."
say "done: doctor gave $code"
