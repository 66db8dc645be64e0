"""Build llama.cpp's own tools for this machine's CPU: `python scripts/llama_tools.py FOLDER`. Needs cmake and a C++ compiler.

llama-quantize, llama-imatrix and llama-perplexity are in no wheel. The source is the archive that the converter comes from
(`llama_converter.py`): pinned, its hash checked by pip. Takes some 7 minutes on two cores, once: a folder that has the tools of
the same pin is left as it is. CMAKE_BUILD_PARALLEL_LEVEL says how many compilers run at a time; one a core if it is not set.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from llama_converter import PIN, download

TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
)  # fmt: skip


def built(folder: Path) -> bool:
    """Whether `folder` has every tool, of the pin that this checkout names."""
    mark = folder / "pin"
    return all((folder / t).is_file() for t in TOOLS) and mark.is_file() and mark.read_text(encoding="utf-8") == pin()


def pin() -> str:
    """What the mark of a build says: the hash of the pin's file."""
    return hashlib.sha256(PIN.read_bytes()).hexdigest()


def build(folder: Path) -> None:
    """Fetch the source with this interpreter's pip, build it, and put the tools into `folder`.

    Errors: SystemExit with a sentence where a program is missing, or the step that failed.
    """
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            sys.exit(f"llama.cpp's tools are built with {program}, which is not here: sudo apt install cmake g++")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llama-tools-") as work:
        _step("fetch the source", sys.executable, "-m", "pip", *download(Path(work)))
        with tarfile.open(next(Path(work).glob("*.tar.gz"))) as tar:
            tar.extractall(work, filter="data")
        tree = next(Path(work).glob("llama_cpp_python-*")) / "vendor" / "llama.cpp"
        ninja = ("-G", "Ninja") if shutil.which("ninja") else ()
        _step("configure", "cmake", "-S", str(tree), "-B", f"{work}/build", *ninja, *OPTIONS)
        level = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
        _step("build", "cmake", "--build", f"{work}/build", "--parallel", level, "--target", *TOOLS)
        for tool in TOOLS:
            shutil.copy2(Path(work, "build", "bin", tool), folder / tool)
    (folder / "pin").write_text(pin(), encoding="utf-8")  # last: what is cut off is built anew


def _step(name: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"llama.cpp's tools: could not {name}: {(done.stderr or done.stdout)[-3000:]}")


def main() -> None:
    """For the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    if not built(folder):
        build(folder)
    print(folder)


if __name__ == "__main__":
    main()
