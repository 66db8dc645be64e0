"""docker/llama.sh with made-up tools: what the CUDA build of llama.cpp finds at run time, with no variable and no driver."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "llama.sh"
PROGRAMS = ("quantize", "perplexity", "imatrix", "server", "cli", "export-lora")
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")

PIP = """#!/bin/bash
set -e
while [ "$1" != --dest ]; do shift; done
mkdir -p x/llama_cpp_python-1/vendor/llama.cpp/gguf-py
cd x/llama_cpp_python-1/vendor/llama.cpp && touch CMakeLists.txt LICENSE convert_hf_to_gguf.py && cd -
tar -C x -czf "$2/llama_cpp_python-1.tar.gz" llama_cpp_python-1
"""
# Configures by remembering the run path, and builds one library over cuBLAS and the driver, and programs over it.
CMAKE = """#!/bin/bash
set -e
for a; do case $a in -DCMAKE_INSTALL_RPATH=*) rpath=${a#*=} ;; esac; done
if [ "$1" = -G ]; then
  mkdir -p "$6/bin" && echo "-Wl,-rpath,${rpath//;/:}" > "$6/rpath"
  exit
fi
cd "$2/bin"
echo 'int cublas(void); int cuInit(unsigned); int ggml(void) { return cublas() + cuInit(0); }' | gcc -shared -fPIC -w -x c - \\
  -o libggml-cuda.so "$(cat ../rpath)" -L"$CUDA/lib" -L"$CUDA/lib/stubs" -l:libcublas.so -lcuda
echo '#include <stdio.h>
int ggml(void); int main(int n, char **v) { if (n < 2) printf("%d\\n", ggml()); return n > 1; }' > main.c
for p in quantize perplexity imatrix server cli export-lora; do
  gcc -w main.c -o llama-$p "$(cat ../rpath)" -L. -l:libggml-cuda.so -Wl,--allow-shlib-undefined
done
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cuda(tmp_path: Path) -> Path:
    """A toolkit as NVIDIA's wheels unpack it: versioned libraries only."""
    cuda = tmp_path / "cuda"
    executable(cuda / "bin" / "nvcc", "#!/bin/sh\n")
    (cuda / "include").mkdir()
    (cuda / "include" / "cuda.h").write_text("CUresult CUDAAPI cuInit(unsigned int Flags);\n")
    (cuda / "lib").mkdir()
    library = [
        "gcc",
        "-shared",
        "-fPIC",
        "-x",
        "c",
        "-",
        "-Wl,-soname,libcublas.so.13",
        "-o",
        cuda / "lib/libcublas.so.13",
    ]
    subprocess.run(library, input="int cublas(void) { return 100; }\n", text=True, check=True)
    return cuda


def build(tmp_path: Path, cuda: Path, cmake: str = CMAKE) -> subprocess.CompletedProcess[str]:
    executable(tmp_path / "tools" / "pip", PIP)
    executable(tmp_path / "tools" / "cmake", cmake)
    environ = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "TOOLS": str(tmp_path / "tools"), "CUDA": str(cuda)}
    return subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")], env=environ | {"LLAMA": "cuda", "ARCHITECTURES": "121", "JOBS": "1"},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_what_is_built_finds_cudas_libraries_with_no_variable(tmp_path: Path, cuda: Path) -> None:
    """And needs the driver's alone, for which the stub stands: it answers 34, CUDA_ERROR_STUB_LIBRARY, as NVIDIA's does."""
    done = build(tmp_path, cuda)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    assert sorted(p.name for p in (out / "bin").iterdir()) == sorted(f"llama-{p}" for p in PROGRAMS)
    assert (out / "kind").read_text() == "cuda\n"
    environ = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(cuda / "lib" / "stubs")}
    said = subprocess.run([str(out / "bin" / "llama-cli")], env=environ, capture_output=True, text=True, check=False)
    assert said.stdout == "134\n", said.stderr


def test_a_library_that_is_nowhere_stops_the_build(tmp_path: Path, cuda: Path) -> None:
    """As when the run path named llama.cpp's own folder alone."""
    done = build(tmp_path, cuda, CMAKE.replace("rpath=${a#*=}", "rpath='$ORIGIN/../lib'"))
    assert done.returncode == 1
    assert "llama.cpp: what was built lacks libraries:" in done.stderr and "libcublas.so.13 => not found" in done.stderr
    assert not (tmp_path / "out" / "kind").exists()
