"""llama.cpp's own quantisers, called in the library that xllamacpp ships: byte for byte what llama-quantize writes.

`ggml_quantize_chunk` quantises whole rows of fp32 with, where given, an importance for each column (llama.cpp's imatrix: the
mean square of the activation that the column meets). Going back is `gguf.quants.dequantize`, in numpy.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

_ROWS_AT_ONCE = 1 << 20  # weights a thread takes at a time


class NoLlamaCppError(RuntimeError):
    """llama.cpp's quantisers can't be had."""


def quantize(weight: np.ndarray, kind: Any, importance: np.ndarray | None) -> np.ndarray:
    """weight [rows, columns] fp32 -> uint8 [rows, bytes a row]; `kind` is gguf's GGMLQuantizationType.

    importance: [columns] fp32, or None. Columns must be a multiple of the type's block.
    """
    from gguf import GGML_QUANT_SIZES

    call = _library().ggml_quantize_chunk
    block, size = GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    weight = np.ascontiguousarray(weight, np.float32)
    out = np.empty((rows, columns // block * size), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    step = max(1, _ROWS_AT_ONCE // columns)

    def some(start: int) -> None:
        count = min(step, rows - start)
        pointer = None if weights is None else weights.ctypes.data
        done = call(
            int(kind), weight[start:].ctypes.data, out[start:].ctypes.data, 0, count, columns, pointer
        )  # fmt: skip
        if done != count * out.shape[1]:
            raise RuntimeError(f"llama.cpp wrote {done} bytes of {kind.name} where {count * out.shape[1]} were due.")

    with ThreadPoolExecutor(_threads()) as pool:  # ctypes lets go of the interpreter's lock
        list(pool.map(some, range(0, rows, step)))
    return out


def dequantize(data: np.ndarray, kind: Any) -> np.ndarray:
    """uint8 [rows, bytes a row] -> fp32 [rows, columns]."""
    from gguf.quants import dequantize as back

    result: np.ndarray = back(data, kind)
    return result


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1


@functools.cache
def _library() -> ctypes.CDLL:
    """The shared object inside xllamacpp. Errors: NoLlamaCppError."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [f for folder in folders for f in sorted(Path(folder).glob("xllamacpp*.so"))]
    if not files:
        raise NoLlamaCppError("GGUF types are measured with llama.cpp's quantisers: pip install xllamacpp.")
    library = ctypes.CDLL(str(files[0]))
    if not hasattr(library, "ggml_quantize_chunk"):
        raise NoLlamaCppError(f"{files[0].name} does not let its quantisers be called: install the pinned xllamacpp.")
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library
