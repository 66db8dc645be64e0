"""Ollama's chat templates, rendered by Go's own text/template: `go/render.go`, compiled once and kept in the cache.

Whether Ollama would feed a model the same text as transformers does can so be told without Ollama: template parity.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from filelock import FileLock

SOURCE = Path(__file__).parent / "go" / "render.go"
INSTALL = "sudo apt-get install golang-go"
TIMEOUT_S = 240  # compiling the standard library's parts the first time, on a busy machine


def compiler() -> str | None:
    """Path of `go`, or of GCC's Go, or None."""
    return next((found for name in ("go", "gccgo", "gccgo-12") if (found := shutil.which(name))), None)


def build(cache_dir: Path) -> Path:
    """The renderer's binary. Errors: RuntimeError with the compiler's words."""
    go = compiler()
    if go is None:
        raise RuntimeError(f"there is no Go compiler: {INSTALL}")
    digest = hashlib.sha256(SOURCE.read_bytes() + go.encode()).hexdigest()[:16]
    binary = cache_dir / "go" / f"render-{digest}"
    binary.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{binary}.lock"):
        if not binary.is_file():
            part = binary.with_suffix(".part")
            command = [go, "build", "-o", str(part), str(SOURCE)]
            if Path(go).name != "go":
                command = [go, "-O1", "-o", str(part), str(SOURCE)]
            env = {**os.environ, "GO111MODULE": "off", "CGO_ENABLED": "0", "GOCACHE": str(binary.parent / "build")}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            if done.returncode:
                raise RuntimeError(f"{go} could not compile {SOURCE.name}: {done.stderr.strip()[:500]}")
            part.rename(binary)
            shutil.rmtree(binary.parent / "build", ignore_errors=True)
    return binary


def render(binary: Path, template: str, system: str, conversations: list[list[dict[str, Any]]]) -> list[str]:
    """Each conversation as Ollama would give it to the model. Errors: ValueError for a template that Go refuses."""
    request = json.dumps({"template": template, "system": system, "conversations": conversations})
    done = subprocess.run(
        [str(binary)], input=request, capture_output=True, text=True, encoding="utf-8", timeout=60, check=False
    )
    if done.returncode:
        raise ValueError(f"Go's text/template refuses the template: {done.stderr.strip()[:300]}")
    texts: list[str] = json.loads(done.stdout)
    return texts
