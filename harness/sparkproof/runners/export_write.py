"""Each format's way through `sparktune.export`, and what the result must hold by its sources' own headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# How `export_gguf` says that llama.cpp has no place for a family, and `export_ollama` that Ollama can't say a chat template.
UNKNOWN = ("NotImplementedError", "can't be written for Ollama", "llama.cpp can't run it")
# And for the tokenizer of one that is made on the spot, which is no family's own. Of a real model these are failures.
UNKNOWN_MADE = ("which no known one does",)


def write(format_: str, base: Path, name: str, adapter: Path, out: Path) -> dict[str, Any]:
    """Export, and say what was written. Errors: ExportError."""
    from sparktune import export

    if format_ == "adapter":
        done = export.export_adapter(base, adapter, out, name)
    elif format_ == "merged_16bit":
        done = export.export_merged(base, adapter, out)
    elif format_ == "merged_4bit":
        done = export.export_merged_4bit(base, adapter, out)
    elif format_ == "lora_gguf":
        done = export.export_lora_gguf(base, adapter, out)
    elif format_ == "ollama":
        done = export.export_ollama(base, out, "q4_k_m", adapter)
    elif format_ == "vllm":
        done = export.export_vllm(base, adapter, out)
    elif format_ == "vllm_adapter":
        done = export.export_vllm_adapter(base, adapter, out, name)
    elif format_.startswith("gguf_"):
        done = export.export_gguf(base, out, format_.removeprefix("gguf_"), adapter, f"{name} fine-tuned")  # type: ignore[arg-type]
    elif format_.startswith("ollama_"):
        done = export.export_ollama(base, out, format_.removeprefix("ollama_"), adapter, f"{name} fine-tuned")
    else:
        raise ValueError(f"unknown format {format_}")
    return done.to_json()


def unsupported(error: Exception, made: bool) -> bool:
    """Whether an ExportError says that there is no such format, not that something went wrong.

    `made`: the model was made on the spot (`tiny:...`), with a tokenizer that is no family's own.
    """
    return any(word in str(error) for word in (*UNKNOWN, *(UNKNOWN_MADE if made else ())))


def weights_of(out: Path) -> Path:
    """The file or folder of an export that holds its tensors."""
    inside = sorted(out.glob("*.gguf")) if out.is_dir() else []
    return inside[0] if inside else out


def comparable(format_: str) -> bool:
    """Whether the file holds merged weights."""
    return format_ != "adapter"


def expected(format_: str, stored: dict[str, Any], adapter_parameters: int) -> dict[str, Any]:
    """Number of parameters and the base's 16-bit type."""
    kinds = {t["type"] for t in stored["tensors"].values()}
    parameters: int = stored["parameters"]
    if format_ == "adapter":
        parameters = adapter_parameters
    return {"parameters": parameters, "type": "F16" if kinds == {"F16"} else "BF16"}
