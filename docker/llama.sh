#!/usr/bin/env bash
# Build llama.cpp into the folder given, from the source archive that llama.lock has the hash of. LLAMA: cuda, cpu or none.
# TOOLS (pip, cmake, ninja) and CUDA (bin, include, lib) are the image's unless given.
set -euo pipefail

out=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tools=${TOOLS:-/opt/tools/bin}
cuda=${CUDA:-/opt/sparkproof/cuda}
programs=(llama-quantize llama-perplexity llama-imatrix llama-server llama-cli llama-export-lora)

stop() {
  echo "llama.cpp: $1" >&2
  exit 1
}

case ${LLAMA:?} in
  cuda) [ -x "$cuda/bin/nvcc" ] || stop "LLAMA=cuda needs nvcc, and $cuda/bin has none: build with --build-arg LLAMA=cpu." ;;
  cpu | none) ;;
  *) stop "LLAMA=$LLAMA is not known: cuda, cpu or none." ;;
esac

work=$(mktemp -d)
PATH=$tools:$PATH "$tools/pip" download --disable-pip-version-check --quiet --require-hashes --no-deps --no-binary :all: \
  --no-build-isolation --dest "$work" -r "$here/llama.lock"
tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
tree=$(echo "$work"/llama_cpp_python-*/vendor/llama.cpp)
[ -f "$tree/CMakeLists.txt" ] || stop "the archive has no vendor/llama.cpp."

mkdir -p "$out"
cp -r "$tree"/convert_*.py "$tree/gguf-py" "$tree/LICENSE" "$out/"
[ ! -d "$tree/conversion" ] || cp -r "$tree/conversion" "$out/"
if [ "$LLAMA" != none ]; then
  # GGML_NATIVE off: the image runs on other processors of its architecture too. Instructions beyond the baseline: what GB10's
  # cores have, and AVX2 on x86 (ggml's default there).
  options=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
    -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON)
  rpath="\$ORIGIN/../lib"
  [ "$(uname -m)" != aarch64 ] || options+=(-DGGML_CPU_ARM_ARCH=armv8.6-a)
  if [ "$LLAMA" = cuda ]; then
    # The wheels bring versioned libraries; the linker asks for the plain names.
    for library in "$cuda"/lib/lib*.so.*; do
      ln -sf "$(basename "$library")" "${library%%.so.*}.so"
    done
    [ -e "$cuda/lib64" ] || ln -s lib "$cuda/lib64"
    # cudart and cuBLAS are nowhere else, and no variable of the image names their folder to the loader.
    rpath+=";$cuda/lib"
    # The driver's library comes from the host at run time; to link against, a library of its functions' names does, each
    # answering CUDA_ERROR_STUB_LIBRARY. NVIDIA's toolkit has such a stub, its wheels do not.
    mkdir -p "$cuda/lib/stubs"
    grep -ohE '\bcu[A-Z][A-Za-z0-9]*(_v[0-9]+)?(_ptsz|_ptds)?\b' "$cuda/include/cuda.h" | sort -u \
      | sed 's/.*/int &(void) { return 34; }/' | gcc -shared -fPIC -fno-builtin -w -x c -Wl,-soname,libcuda.so.1 -o "$cuda/lib/stubs/libcuda.so" -
    ln -sf libcuda.so "$cuda/lib/stubs/libcuda.so.1"
    # NCCL is for several GPUs; off, so that a base that happens to have it makes no other build.
    options+=(-DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF "-DCMAKE_CUDA_ARCHITECTURES=${ARCHITECTURES:?}"
      "-DCMAKE_CUDA_COMPILER=$cuda/bin/nvcc" "-DCUDAToolkit_ROOT=$cuda")
  fi
  PATH=$tools:$PATH cmake -G Ninja -S "$tree" -B "$work/build" "${options[@]}" "-DCMAKE_INSTALL_RPATH=$rpath"
  PATH=$tools:$PATH cmake --build "$work/build" --parallel "${JOBS:?}" --target "${programs[@]}"
  mkdir -p "$out/bin" "$out/lib"
  for program in "${programs[@]}"; do
    cp "$work/build/bin/$program" "$out/bin/"
  done
  cp -P "$work"/build/bin/lib*.so* "$out/lib/"
  # The stub in the driver's place, since a build has no GPU; everything else must be found without the variable.
  [ "$LLAMA" != cuda ] || export LD_LIBRARY_PATH=$cuda/lib/stubs
  needs=$(ldd "$out"/bin/* "$out"/lib/lib*.so) || stop "what was built can't be read."
  missing=$(grep 'not found' <<<"$needs" | sort -u || true)
  [ -z "$missing" ] || stop "what was built lacks libraries: $missing"
  "$out/bin/llama-quantize" --help >/dev/null || [ $? = 1 ] || stop "what was built does not start."
fi
printf '%s\n' "$LLAMA" > "$out/kind"
rm -rf "$work"
