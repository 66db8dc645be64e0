"""llama.cpp's quantisation kernels, from the library that the installed xllamacpp carries.

`ggml_quantize_chunk` is what llama-quantize calls for every row, so the bytes are its bytes. It is called with ctypes, which
lets go of Python's lock: chunks of rows run on all cores.
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

from sparktune.export.files import ExportError

CHUNK = 1 << 20  # values a call
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    ),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [ctypes.c_int]),
    "ggml_validate_row_data": (ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]),
    "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
}


@functools.cache
def library() -> Any:
    """The loaded library. Errors: ExportError where it is missing or exports other functions."""
    spec = importlib.util.find_spec("xllamacpp")
    files = sorted(Path(spec.origin).parent.glob("xllamacpp*.so")) if spec and spec.origin else []
    if not files:
        raise ExportError("xllamacpp, whose llama.cpp quantises GGUF files, is not installed.", "pip install xllamacpp")
    found = ctypes.CDLL(str(files[0]))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(found, name, None)
        if function is None:
            raise ExportError(f"The installed xllamacpp has no {name}.", "Install the pinned one: make setup")
        function.restype, function.argtypes = result, arguments
    return found


def requires_imatrix(kind: Any) -> bool:
    """Whether llama.cpp refuses this type without an importance matrix."""
    return bool(library().ggml_quantize_requires_imatrix(int(kind)))


def quantise(rows: np.ndarray, kind: Any, row_bytes: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Bytes [rows, row_bytes] of `rows` [rows, width], fp32, in the GGML type `kind`.

    `weights` [width], fp32, is the importance of each column. Errors: ExportError where llama.cpp calls its result invalid.
    """
    ggml = library()
    name = (ggml.ggml_type_name(int(kind)) or b"").decode()
    if name.lower() != kind.name.lower():
        raise ExportError(
            f"xllamacpp's type {int(kind)} is {name}, not {kind.name}.", "Install the pinned one: make setup"
        )
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count, width = rows.shape
    out = np.empty((count, row_bytes), dtype=np.uint8)
    important = None
    if weights is not None:
        weights = np.ascontiguousarray(weights, dtype=np.float32)
        important = weights.ctypes.data

    def part(first: int, last: int) -> bool:
        source, target = rows[first:last].ctypes.data, out[first:last].ctypes.data
        size = ggml.ggml_quantize_chunk(int(kind), source, target, 0, last - first, width, important)
        if size != (last - first) * row_bytes:
            raise ExportError(f"llama.cpp wrote {size} bytes for {last - first} rows of {kind.name}.")
        return bool(ggml.ggml_validate_row_data(int(kind), target, size))

    step = max(1, CHUNK // width)
    starts = range(0, count, step)
    if len(starts) > 1:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            valid = all(pool.map(lambda i: part(i, min(count, i + step)), starts))
    else:
        valid = part(0, count)
    if not valid:
        raise ExportError(
            f"llama.cpp found values that are not finite in its {kind.name}.", "Look at the model's weights."
        )
    return out
