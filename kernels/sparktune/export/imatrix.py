"""llama.cpp's importance matrix: how much each input of a linear layer matters, from running a text through the model.

The GGUF form that llama-imatrix writes holds, for a weight W, `W.in_sum2` [experts, inputs], sums of squared inputs, and
`W.counts` [experts], how many were summed. llama-quantize weighs rounding errors by their mean (tools/quantize/quantize.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparktune.export.files import ExportError

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """Mean squared inputs by GGUF tensor name, fp32 [experts * inputs]."""

    values: dict[str, np.ndarray]
    file: str
    chunks: int


def read_imatrix(path: Path) -> Importance:
    """Errors: ExportError for a file that is none, or has values that are not finite."""
    from gguf import GGUFReader

    fix = "Give the GGUF file that llama-imatrix wrote."
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} can't be read as an importance matrix ({error}).", fix) from error
    tensors = {t.name: t.data for t in reader.tensors}
    values = {}
    for name in (n.removesuffix(SUMS) for n in tensors if n.endswith(SUMS)):
        if name + COUNTS not in tensors:
            raise ExportError(f"{path} has no counts for {name}.", fix)
        counts = np.asarray(tensors[name + COUNTS], dtype=np.float32).reshape(-1, 1)
        sums = np.asarray(tensors[name + SUMS], dtype=np.float32).reshape(len(counts), -1)
        # llama-quantize weighs the columns of an expert that the text never reached alike
        mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).reshape(-1).astype(np.float32)
        if not np.isfinite(mean).all():
            raise ExportError(f"{path} has values for {name} that are not finite.", fix)
        values[name] = mean
    if not values:
        raise ExportError(f"{path} holds no importance matrix.", fix)
    field = reader.get_field("imatrix.chunk_count")
    return Importance(values, path.name, int(field.contents()) if field is not None else 0)
