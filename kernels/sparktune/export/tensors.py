"""Safetensors files one tensor at a time, read and written through plain file access.

A mapped file counts every page that was touched as memory of the process until the map is closed, so a model in one file
would look as large as itself; on a machine whose GPU shares the memory it also is. Here the peak is one tensor.

The format is 8 bytes of header length, a JSON header of {name: {dtype, shape, data_offsets}}, and the data
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparktune.export.files import ExportError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FIX = "Give the folder of the 16-bit base model, as save_pretrained() or the hub made it."


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    file: Path
    offset: int  # from the start of the file
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own; the kernel may forget the file's pages."""
        data = bytearray(self.nbytes)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            view, done = memoryview(data), 0
            while done < len(data):
                count = file.readinto(view[done:])
                if not count:
                    raise ExportError(f"{self.file} ends before its tensors do.", FIX)
                done += count
            os.posix_fadvise(file.fileno(), self.offset, self.nbytes, os.POSIX_FADV_DONTNEED)
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file. Errors: ExportError for one that is unreadable or shorter than it says."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is cut short")
            header: dict[str, Any] = json.loads(file.read(length))
        found = {
            name: Stored(path, 8 + length + t["data_offsets"][0], DTYPES[t["dtype"]], tuple(t["shape"]))
            for name, t in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} can't be read as safetensors ({error}).", FIX) from error
    end = max((t.offset + t.nbytes for t in found.values()), default=8 + length)
    if end != path.stat().st_size:
        raise ExportError(
            f"{path} can't be read as safetensors: it has {path.stat().st_size} bytes and its header speaks of {end}.",
            FIX,
        )
    return found


def write_file(
    path: Path, plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> int:
    """Write a safetensors file of `plan`, whose `tensors` come in its order, one at a time; return the data's bytes.

    Errors: ExportError when what comes is not what was planned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in plan.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    left = iter(plan.items())
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            wanted = next(left, None)
            if wanted is None or wanted != (name, (tensor.dtype, tuple(tensor.shape))):
                raise ExportError(f"{name} was not written as planned: {tensor.dtype}, {list(tensor.shape)}.")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if missing := [name for name, _ in left]:
        raise ExportError(f"{len(missing)} tensors were never written, {missing[0]} first.")
    return offset
