"""The types a weight can be stored in: how many bytes, which shapes, and what comes back.

`nf4` is bitsandbytes' (blocks of 64, scales quantised again; `nf4-plain` leaves the scales in fp32, the default of
BitsAndBytesConfig). The others are llama.cpp's names. A K-quant needs rows that are a multiple of 256, the rest of 32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparktune.export import ggml

NF4_BLOCK = 64
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
# What llama-quantize writes for any tensor, embeddings too, which no importance matrix covers (iq3_xxs needs one); by size.
# Left out: bf16, nvfp4 and ternary types, which err more than others of their bytes on trained weights.
GGUF_TYPES = (
    "q2_K", "q3_K", "iq3_s", "mxfp4", "iq4_xs", "iq4_nl", "q4_0", "q4_K", "q4_1", "q5_0", "q5_K", "q5_1", "q6_K",
    "q8_0", "f16",
)  # fmt: skip
NF4_TYPES = ("nf4", "bf16")


@dataclass(frozen=True)
class Type:
    """One way to store a matrix [rows, columns]."""

    name: str

    @classmethod
    def named(cls, name: str) -> Type:
        """From a name in any case. Errors: ValueError for one that is not known."""
        for known in (*GGUF_TYPES, *NF4_TYPES, "nf4-plain"):
            if known.lower() == name.strip().lower():
                return cls(known)
        raise ValueError(f"'{name}' is not a type: use {', '.join(GGUF_TYPES)} for GGUF, nf4 and bf16 for training.")

    @property
    def ggml(self) -> Any:
        """gguf's GGMLQuantizationType. Errors: KeyError for NF4, which GGUF does not have."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType[self.name.upper()]

    @property
    def lossless_16(self) -> bool:
        """Whether it is a 16-bit float."""
        return self.name in HALVES

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether rows of that length can be stored so."""
        if self.lossless_16:
            return True
        if self.name.startswith("nf4"):
            return shape[-1] % NF4_BLOCK == 0
        from gguf import GGML_QUANT_SIZES

        return bool(shape[-1] % GGML_QUANT_SIZES[self.ggml][0] == 0)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix of that shape, scales and tables with it."""
        count = math.prod(shape)
        if self.lossless_16:
            return 2 * count
        if self.name.startswith("nf4"):
            scales = -(-count // NF4_BLOCK)
            if self.name == "nf4-plain":
                return -(-count // 2) + 4 * scales + 64  # codes, fp32 scales, the 16 levels
            return (
                -(-count // 2) + scales + 4 * -(-scales // 256) + 64 + 1024 + 4
            )  # and the scales' own table and offset
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.ggml]
        return int(count // block * size)

    def round_trip(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """weight [rows, columns], any float -> the same in fp32 after storage, on its device.

        importance: [columns], what llama-quantize would take from an importance matrix; NF4 and 16 bits have no use for it.
        """
        if self.lossless_16:
            return weight.to(HALVES[self.name]).float()
        if self.name.startswith("nf4"):
            import bitsandbytes.functional as F

            nested = self.name == "nf4"
            codes, state = F.quantize_4bit(
                weight.float().contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=nested
            )
            back: Tensor = F.dequantize_4bit(codes, state)
            return back.reshape(weight.shape).float()
        from gguf.quants import dequantize

        rows = weight.float().cpu().numpy()
        columns = None if importance is None else importance.float().cpu().numpy()
        row_bytes = self.nbytes(tuple(rows.shape[-1:]))
        data = ggml.quantise(rows, self.ggml, row_bytes, columns)
        return torch.from_numpy(dequantize(data, self.ggml)).to(weight.device)
