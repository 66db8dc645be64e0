"""Which programs read an export, what each needs to be here, and the process it runs in.

vLLM pins a torch of its own and so lives in an environment of its own: its case's last process is that
environment's Python, which sees this package and nothing else of ours.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
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
}  # fmt: skip
VLLM = {  # one process, in sight of the watchdog; nothing is told to anyone
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip


INSTALL_VLLM = "python3 -m venv vllm && vllm/bin/pip install vllm && export SPARKPROOF_VLLM_PYTHON=$PWD/vllm/bin/python"


@dataclass(frozen=True)
class Lacking:
    """Why a consumer can't run here, and what would change that."""

    sentence: str
    fix: str
    reason_class: ReasonClass = ReasonClass.SOFTWARE


def lacking(scenario: ExportScenario, cache_dir: Path) -> Lacking | None:
    """What writing or reading this export needs and is not here."""
    needed = [*PACKAGES[scenario.consumer], *(("gguf",) if scenario.format.startswith("gguf_") else ())]
    absent = [name for name in dict.fromkeys(needed) if importlib.util.find_spec(name) is None]
    if absent:
        return Lacking(
            f"The consumer {scenario.consumer} needs {', '.join(absent)}, which is not installed.",
            f"pip install {' '.join(absent)}",
        )
    if scenario.consumer == "vllm" and not vllm_python(cache_dir).exists():
        return Lacking(
            "vLLM is not installed; it needs an environment of its own, named by SPARKPROOF_VLLM_PYTHON.", INSTALL_VLLM
        )
    return None


def vllm_python(cache_dir: Path) -> Path:
    """The Python of vLLM's environment: SPARKPROOF_VLLM_PYTHON, else `vllm` in the cache."""
    return Path(os.environ.get("SPARKPROOF_VLLM_PYTHON") or cache_dir / "vllm" / "bin" / "python")


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
