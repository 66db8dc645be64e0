"""Every format that `sparktune.export` writes, and whose speed is measured with it.

What sparktune writes and nothing here reads is written and weighed all the same, and its row says who measures its reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparkproof.errors import UserError
from sparkproof.runners import export_formats

LLAMA = "llama.cpp"
OVER_BASE = "lora_gguf"  # needs the base itself as GGUF, which is made once and not timed


@dataclass(frozen=True)
class Way:
    """Who reads a format, or why its reading is not measured here."""

    consumer: str
    elsewhere: str = ""


FORMATS: dict[str, Way] = {
    "adapter": Way("peft"),
    "merged_16bit": Way("transformers"),
    "merged_4bit": Way("transformers"),
    **{name: Way(LLAMA) for name in export_formats.FORMATS if name.startswith("gguf_")},
    OVER_BASE: Way(LLAMA),
    "ollama": Way(
        "ollama",
        "its GGUF is that of gguf_q4_k_m; `ollama run --verbose` tells Ollama's speed, and `ollama ps` where it ran",
    ),
    "vllm": Way("vllm"),
    "vllm_adapter": Way("vllm"),
}


def chosen(given: Sequence[str]) -> list[str]:
    """Formats in the table's order, of names in lists with commas; none: all; `gguf`: every GGUF. Errors: UserError."""
    from sparkproof.catalog import nearest

    wanted: set[str] = set()
    for name in (part.strip() for item in given for part in item.split(",")):
        if name == "gguf":
            wanted |= {f for f in FORMATS if f.startswith("gguf_")}
        elif name in FORMATS:
            wanted.add(name)
        elif name:
            raise UserError(f"There is no export format '{name}'.", nearest(name, list(FORMATS)))
    return [f for f in FORMATS if not wanted or f in wanted]


def filename(format_: str) -> str:
    """What an export of the format is called."""
    return f"{format_}.gguf" if format_.startswith("gguf_") or format_ == OVER_BASE else format_
