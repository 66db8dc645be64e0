"""Ollama's template language without Ollama: a program of Go's own text/template, built here once and kept in the cache.

Ollama's templates are Go's, so Go is who can say what one becomes; what Ollama does around them (joining messages of one role,
where the system prompt goes) is in `go/ollama_template.go`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

SOURCE = Path(__file__).with_name("go") / "ollama_template.go"
BUILD_S, RENDER_S = 300, 60


def available() -> bool:
    """Whether Go's compiler is on the path."""
    return shutil.which("go") is not None


def build(cache_dir: Path) -> Path:
    """The program, built if this version of it is not in the cache yet; nothing is fetched.

    Errors: RuntimeError with the compiler's words.
    """
    version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = cache_dir / "go"
    program = folder / f"ollama-template-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not program.exists():
            made = program.with_suffix(".part")
            env = {
                **os.environ, "GO111MODULE": "off", "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "",
                "GOCACHE": str(folder / "build"), "GOPATH": str(folder / "path"),
            }  # fmt: skip
            done = subprocess.run(
                ["go", "build", "-o", str(made), str(SOURCE)],
                env=env, capture_output=True, encoding="utf-8", timeout=BUILD_S, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"go build failed: {done.stderr.strip()[-500:]}")
            made.replace(program)
            shutil.rmtree(folder / "build", ignore_errors=True)  # the standard library's objects, 100 MB
    return program


def render(program: Path, template: str, system: str, conversations: Sequence[list[dict[str, str]]]) -> list[str]:
    """The text that Ollama makes of each conversation. Errors: ValueError for what Go does not take for a template."""
    asked = json.dumps({"template": template, "system": system, "conversations": conversations})
    done = subprocess.run(
        [str(program)], input=asked, capture_output=True, encoding="utf-8", timeout=RENDER_S, check=False
    )
    if done.returncode:
        raise ValueError(done.stderr.strip())
    texts: list[str] = json.loads(done.stdout)
    return texts
