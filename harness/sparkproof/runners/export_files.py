"""What is in an exported file: every tensor's type and size, read from the file and not from who wrote it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def inspect(path: Path) -> dict[str, Any]:
    """Types, shapes, number of parameters, bytes and (for a GGUF) the metadata that a consumer acts on."""
    return inspect_gguf(path) if path.suffix == ".gguf" else inspect_safetensors(path)


def inspect_safetensors(folder: Path) -> dict[str, Any]:
    """From the headers of all safetensors of a folder."""
    tensors: dict[str, dict[str, Any]] = {}
    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
        if file.stat().st_size != end:
            raise ValueError(f"{file.name} has {file.stat().st_size} bytes; its header says {end}")
        size += end
        tensors |= {name: {"type": t["dtype"], "shape": t["shape"]} for name, t in header.items()}
    return {"tensors": tensors, "parameters": _parameters(tensors), "bytes": size, "metadata": {}}


def inspect_gguf(file: Path) -> dict[str, Any]:
    """Through the `gguf` library's reader, which fails on a file that ends too early."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    tensors = {
        t.name: {"type": t.tensor_type.name, "shape": [int(d) for d in reversed(t.shape)]} for t in reader.tensors
    }
    wanted = ("general.architecture", "general.file_type", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    metadata = {key: reader.fields[key].contents() for key in wanted if key in reader.fields}
    return {
        "tensors": tensors,
        "parameters": _parameters(tensors),
        "bytes": file.stat().st_size,
        "metadata": metadata,
    }


def _parameters(tensors: dict[str, dict[str, Any]]) -> int:
    return sum(math.prod(t["shape"]) for name, t in tensors.items() if name != "rope_freqs.weight")
