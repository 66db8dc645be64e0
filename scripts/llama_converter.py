"""Put llama.cpp's own converter into an environment: `python3 scripts/llama_converter.py VENV`. Standard library only.

convert_hf_to_gguf.py is in no wheel. The source archive of llama-cpp-python carries the whole of llama.cpp at one commit; pip
fetches it from wherever it fetches everything else, checks its hash, and asks its build backend (scikit-build-core, in the
lock) for its name. Nothing is built: 2 MB of Python are taken out, of 77.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PIN = ROOT / "requirements" / "llama_cpp.txt"
WITHIN = PurePosixPath("share", "sparktune", "llama.cpp")  # of the environment; sparktune.export.llama_cpp looks there
FILES = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "LICENSE")
FOLDERS = ("conversion", "gguf-py/gguf")


def download(target: Path) -> list[str]:
    """Arguments for `python -m pip` that put the archive into `target`."""
    return [
        "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--no-build-isolation",
        "--no-binary", ":all:", "--require-hashes", "--dest", str(target), "-r", str(PIN),
    ]  # fmt: skip


def unpack(archive: Path, environment: Path) -> Path:
    """Take the converter out of `archive`, in place of an older one. Errors: FileNotFoundError if a part is not in it."""
    place = environment / WITHIN
    part = place.with_name("llama.cpp.part")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            inner = PurePosixPath(*PurePosixPath(member.name).parts[1:])  # llama_cpp_python-X/vendor/llama.cpp/...
            if member.isfile() and _wanted(inner):
                target = part / inner.relative_to("vendor/llama.cpp")
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())
    for name in (*FILES, *FOLDERS):
        if not (part / name).exists():
            raise FileNotFoundError(f"{archive.name} has no {name}")
    shutil.rmtree(place, ignore_errors=True)
    part.rename(place)
    return place


def _wanted(path: PurePosixPath) -> bool:
    if not path.is_relative_to("vendor/llama.cpp"):
        return False
    name = path.relative_to("vendor/llama.cpp")
    return str(name) in FILES or (path.suffix == ".py" and any(name.is_relative_to(folder) for folder in FOLDERS))


def main() -> None:
    """For the environment named on the command line."""
    environment = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        command = [str(environment / "bin" / "python"), "-m", "pip", *download(Path(folder))]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"pip could not fetch the archive that {PIN} names; its message is above.")
        print(unpack(next(Path(folder).glob("*.tar.gz")), environment))


if __name__ == "__main__":
    main()
