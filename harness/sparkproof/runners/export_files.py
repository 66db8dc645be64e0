"""What is in an exported file: every tensor's type and size, read from the file and not from who wrote it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

METADATA = (
    "general.architecture", "general.file_type", "general.type", "tokenizer.ggml.model", "tokenizer.ggml.pre",
    "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_bos_token",
)  # fmt: skip


def inspect(path: Path) -> dict[str, Any]:
    """Types, shapes, number of parameters, bytes and (for a GGUF) the metadata that a consumer acts on.

    `broken` has a sentence for each file that ends early, can't be read, or is named by an index and not there.
    """
    return inspect_gguf(path) if path.suffix == ".gguf" else inspect_safetensors(path)


def _broken(sentences: list[str]) -> dict[str, Any]:
    return {"tensors": {}, "parameters": 0, "bytes": 0, "metadata": {}, "broken": sentences}


def inspect_safetensors(folder: Path) -> dict[str, Any]:
    """From the headers of all safetensors of a folder."""
    tensors: dict[str, dict[str, Any]] = {}
    size, broken = 0, []
    index = folder / "model.safetensors.index.json"
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    files = sorted({*folder.glob("*.safetensors"), *(folder / name for name in named)})
    for file in files:
        try:
            header, end = _header(file)
        except (OSError, ValueError) as error:
            broken.append(f"{file.name} can't be read: {error}")
            continue
        if file.stat().st_size != end:
            broken.append(f"{file.name} has {file.stat().st_size} bytes; its header says {end}")
        size += end
        tensors |= {name: {"type": t["dtype"], "shape": t["shape"]} for name, t in header.items()}
    if broken or not files:
        return _broken(broken or ["there is no safetensors file"])
    return {"tensors": tensors, "parameters": _parameters(tensors), "bytes": size, "metadata": {}, "broken": []}


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file, and where its last byte should be."""
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header: dict[str, Any] = json.loads(f.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)


def inspect_gguf(file: Path) -> dict[str, Any]:
    """Through the `gguf` library's reader, which raises on a file that ends too early."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, IndexError, KeyError) as error:
        return _broken([f"{file.name} can't be read to its end: {error}"])
    tensors = {
        t.name: {"type": t.tensor_type.name, "shape": [int(d) for d in reversed(t.shape)]} for t in reader.tensors
    }
    metadata = {key: reader.fields[key].contents() for key in METADATA if key in reader.fields}
    return {
        "tensors": tensors,
        "parameters": _parameters(tensors),
        "bytes": file.stat().st_size,
        "metadata": metadata,
        "broken": [],
    }


def _parameters(tensors: dict[str, dict[str, Any]]) -> int:
    return sum(math.prod(t["shape"]) for name, t in tensors.items() if name != "rope_freqs.weight")
