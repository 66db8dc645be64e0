"""One tensor of a GGUF, made when it is written: out of llama.cpp's lazy one, in fp32, into its type."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from sparktune.export import ggml
from sparktune.export.files import ExportError
from sparktune.export.gguf_types import PLAIN
from sparktune.export.progress import Progress


class Streamed:
    """A tensor that is made when it is written; what the writer asks of an array, and no more."""

    before = total = 0  # bytes of the file before this tensor, and of all

    def __init__(
        self, gguf: Any, name: str, info: Any, kind: Any, weights: np.ndarray | None, progress: Progress
    ) -> None:
        self.gguf, self.name, self.kind, self.weights, self.progress = gguf, name, kind, weights, progress
        self.lazy = info.tensor
        self.shape = tuple(info.shape)
        self.row_bytes = self._row_bytes()
        self.nbytes = math.prod(self.shape[:-1]) * self.row_bytes
        if weights is not None and weights.size != math.prod(self.shape[:-2]) * self.shape[-1]:
            if name != "token_embd.weight":
                raise ExportError(f"The importance matrix has {weights.size} values for {name}, {list(self.shape)}.")
            self.weights = None

    def _row_bytes(self) -> int:
        block, size = self.gguf.GGML_QUANT_SIZES[self.kind]
        return int(self.shape[-1] // block * size)

    def tofile(self, file: Any) -> None:
        """Make and write it."""
        made = self.lazy
        if isinstance(made, self.gguf.lazy.LazyChunkedTensor):
            for chunk in made._chunks:
                self._write(np.asarray(chunk()), file)
        else:
            self._write(self.gguf.LazyNumpyTensor.to_eager(made), file)
        self.lazy = None
        self.progress(self.name, self.before + self.nbytes, self.total)

    def _write(self, data: np.ndarray, file: Any) -> None:
        if data.dtype == np.uint8:  # in its type already
            file.write(np.ascontiguousarray(data).data)
            return
        if not np.isfinite(data).all():
            raise ExportError(f"{self.name} is not finite.", "Look at the model's weights.")
        if self.kind.name in PLAIN:
            kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
            plain = torch.from_numpy(np.ascontiguousarray(data)).to(kinds[self.kind.name])
            if not torch.isfinite(plain).all():
                raise ExportError(
                    f"{self.name} has values beyond fp16's 65504.", "Export q8_0 or bf16, or keep bf16 safetensors."
                )
            file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
            return
        stack = data.reshape(-1, self.shape[-2], self.shape[-1])
        for i, rows in enumerate(stack):
            weights = self.weights
            if weights is not None:
                weights = weights.reshape(-1, self.shape[-1])[i]
            file.write(ggml.quantise(rows, self.kind, self.row_bytes, weights).data)
