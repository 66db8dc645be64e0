"""The doors to the host: files, commands, environment. Probes take a `Host`, so that tests can give them another one.

Nothing here raises for what a machine may lack, and nothing waits longer than it was told to: a process that is stuck
in the kernel (a wedged CUDA context cannot even be killed) is left behind after its timeout.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Ran:
    """How a command ended. `error` is empty when it ran to its end with exit code 0."""

    code: int | None
    out: str = ""
    err: str = ""
    error: str = ""


@dataclass
class Host:
    """This machine, or a stand-in: `root` replaces / for every file that probes read."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def path(self, absolute: str) -> Path:
        """Where an absolute path of the host lies."""
        return self.root / absolute.lstrip("/")

    def text(self, absolute: str) -> str | None:
        """The content of a file, or None when it is absent or unreadable."""
        try:
            return self.path(absolute).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def exists(self, absolute: str) -> bool:
        """Whether a path exists (and may be seen)."""
        try:
            return self.path(absolute).exists()
        except OSError:
            return False

    def glob(self, folder: str, pattern: str) -> list[Path]:
        """Entries of a folder, sorted; [] when there is no such folder."""
        try:
            return sorted(self.path(folder).glob(pattern))
        except OSError:
            return []

    def which(self, name: str) -> str | None:
        """The path of a program on PATH."""
        return shutil.which(name, path=self.environ.get("PATH"))

    def run(self, argv: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None) -> Ran:
        """Run a command, silent and bounded; what it wrote before a timeout is kept."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                process = subprocess.Popen(
                    list(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env={**self.environ, "LC_ALL": "C.UTF-8", **(env or {})},
                )
            except FileNotFoundError:
                return Ran(None, error=f"{argv[0]} is not installed")
            except OSError as e:
                return Ran(None, error=f"{argv[0]} cannot be started: {e.strerror or e}")
            error = ""
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                error = f"no answer within {timeout_s:g} s"
            finally:
                _end(process)
            stdout, stderr = _content(out), _content(err)
        if not error and process.returncode:
            error = _last_line(stderr) or _last_line(stdout) or f"exit code {process.returncode}"
        return Ran(process.returncode, stdout, stderr, error)

    def run_python(
        self, module: str, timeout_s: float, env: Mapping[str, str] | None = None, args: Sequence[str] = ()
    ) -> Ran:
        """Run a module of this package in a fresh Python with this one's import path.

        What it imports leaves no byte code behind, and its GPU code no entry in the driver's cache.
        """
        kept = {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_CACHE_DISABLE": "1",
        }
        return self.run([sys.executable, "-m", module, *args], timeout_s, {**kept, **(env or {})})


@contextlib.contextmanager
def scratch_caches() -> Iterator[dict[str, str]]:
    """Variables that give a child empty caches of its own: nothing warm hides a failure, nothing is left behind."""
    with tempfile.TemporaryDirectory(prefix="sparkproof-") as folder:
        names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
        yield {name: f"{folder}/{name.lower()}" for name in names}


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)


def _content(stream: IO[bytes], limit: int = 2_000_000) -> str:
    stream.seek(0)
    return stream.read(limit).decode("utf-8", errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else ""
