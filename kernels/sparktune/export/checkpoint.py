"""A model folder's weights, one tensor at a time.

The layout is transformers' own: `config.json` beside `model.safetensors`, or beside several shards and
`model.safetensors.index.json`, whose `weight_map` says which shard holds which tensor.

gpt-oss' experts are stored in MXFP4, as `..._blocks` and `..._scales`: 32 values of 4 bits share a power of two. Each such pair
is one tensor here, dequantised when it is read, which is exact in bf16: no weight was quantised by us.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparktune.export.files import ExportError
from sparktune.export.tensors import FIX, Stored, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCKS, SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class Mxfp4:
    """Experts [E, in, out] stored as blocks [E, out, in / 32, 16] and scales [E, out, in / 32], bytes."""

    blocks: Stored
    scales: Stored

    @property
    def dtype(self) -> torch.dtype:
        """Of what `read` gives."""
        return torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `read` gives."""
        experts, out, groups, half = self.blocks.shape
        return experts, groups * half * 2, out

    def read(self) -> torch.Tensor:
        """Dequantised by transformers' own function."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        return convert_moe_packed_tensors(self.blocks.read(), self.scales.read(), dtype=self.dtype).contiguous()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Checkpoint:
    """A 16-bit (or fp32) base model on disk."""

    folder: Path
    config: dict[str, Any]
    shards: dict[str, list[str]]  # file name -> tensor names, in the file's order
    stored: dict[str, Stored | Mxfp4]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config and headers. Errors: ExportError for a quantised, incomplete or unreadable folder."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(f"{folder} has no readable config.json.", FIX) from error
        quantised = config.get("quantization_config")
        if quantised and quantised.get("quant_method") != "mxfp4":
            raise ExportError(
                f"{folder} is a {quantised.get('quant_method', 'quantised')} model: merging into it would quantise a second "
                "time.",
                "Give the 16-bit model that it was made from.",
            )
        index = folder / INDEX
        weight_map: dict[str, str] = {}
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise ExportError(f"{index} has no weight_map.", FIX) from error
        stored: dict[str, Stored | Mxfp4] = {}
        for name in sorted(set(weight_map.values())) or [SINGLE]:
            stored |= read_header(folder / name)
        if lost := sorted(set(weight_map) - set(stored)):
            raise ExportError(f"{folder} lacks {len(lost)} tensors of its index, {lost[:1]} first.", FIX)
        if quantised:
            stored = _paired(stored)
        shards: dict[str, list[str]] = {}
        for name, tensor in stored.items():
            file = tensor.file if isinstance(tensor, Stored) else tensor.blocks.file
            shards.setdefault(file.name, []).append(name)
        return cls(folder, config, shards, stored)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by name."""
        return {name: tensor.shape for name, tensor in self.stored.items()}

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        text = self.config.get("text_config") or {}
        return bool(self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))

    @property
    def parameters(self) -> int:
        """Number of stored parameters; tied ones count once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def in_mxfp4(self) -> set[str]:
        """Names of the tensors that are stored in MXFP4."""
        return {name for name, tensor in self.stored.items() if isinstance(tensor, Mxfp4)}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, shard by shard, one by one."""
        for names in self.shards.values():
            for name in names:
                yield name, self.stored[name].read()


def _paired(stored: dict[str, Stored | Mxfp4]) -> dict[str, Stored | Mxfp4]:
    """`stored` with one tensor in place of each pair of blocks and scales. Errors: ExportError for a half pair."""
    found: dict[str, Stored | Mxfp4] = {}
    for name, tensor in stored.items():
        stem = name.removesuffix(BLOCKS)
        if name.endswith(BLOCKS):
            scales = stored.get(stem + SCALES)
            if not isinstance(scales, Stored) or not isinstance(tensor, Stored):
                raise ExportError(f"{name} has no {SCALES.strip('_')} beside it.", FIX)
            found[stem] = Mxfp4(tensor, scales)
        elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in stored):
            found[name] = tensor
    return found
