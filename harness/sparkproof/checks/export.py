"""What serves and converts models afterwards: can it use the GPU?"""

from __future__ import annotations

from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass

NO_GPU = NotApplicable("no NVIDIA GPU", ReasonClass.GPU)
INVALID_LIBRARIES = ("cuda",)


@check("export.llama_cpp")
def llama_cpp(facts: Facts) -> Answer:
    """Row 55."""
    found = facts.llama_cpp
    if found.path is None:
        return NotApplicable("llama.cpp is not installed")
    if not facts.has_nvidia_hardware:
        return NO_GPU
    if found.cuda is None:
        return NotRead("whether llama.cpp can use the GPU")
    if found.cuda:
        return Ok(f"{found.path} can use the GPU")
    return Found(f"{found.path} lists no CUDA device, and no libggml-cuda lies beside it")


@check("export.ollama")
def ollama(facts: Facts) -> Answer:
    """Row 53."""
    found = facts.ollama
    if found.path is None:
        return NotApplicable("Ollama is not installed")
    if not facts.has_nvidia_hardware:
        return NO_GPU
    if found.library in INVALID_LIBRARIES:
        return Found(f"OLLAMA_LLM_LIBRARY={found.library}")
    if found.on_cpu:
        return Found(
            f"`ollama ps`: {', '.join(found.on_cpu)} at 100% CPU; OLLAMA_LLM_LIBRARY={found.library or 'not set'}",
            cause="Ollama did not take the GPU for it: no library for it, or no memory left on it.",
            fix="sudo systemctl restart ollama && journalctl -u ollama -n 50 --no-pager",
        )
    return Ok(f"{', '.join(found.running) or 'no model is loaded'}; OLLAMA_LLM_LIBRARY={found.library or 'not set'}")
