"""A model folder's weights, one tensor at a time: the peak is one tensor to read, one shard to write.

The layout is transformers' own: `config.json` beside `model.safetensors`, or beside several shards and
`model.safetensors.index.json`, whose `weight_map` says which shard holds which tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparktune.export.files import ExportError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A 16-bit (or fp32) base model on disk."""

    folder: Path
    config: dict[str, Any]
    shards: dict[str, list[str]]  # file name -> tensor names, in the file's order
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config and headers. Errors: ExportError for a quantised, incomplete or unreadable folder."""
        fix = "Give the folder of the 16-bit base model, as save_pretrained() or the hub made it."
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(f"{folder} has no readable config.json.", fix) from error
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "quantised")
            raise ExportError(
                f"{folder} is a {method} model: merging into it would quantise a second time.",
                "Give the 16-bit model that it was made from.",
            )
        index = folder / INDEX
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        else:
            names = [SINGLE]
        shards: dict[str, list[str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            try:
                with safe_open(folder / name, framework="pt") as shard:
                    shards[name] = list(shard.keys())
                    for key in shards[name]:
                        shapes[key] = tuple(shard.get_slice(key).get_shape())
            except (OSError, SafetensorError) as error:
                raise ExportError(f"{folder / name} can't be read as safetensors ({error}).", fix) from error
        if index.is_file() and set(shapes) != set(weight_map):
            lost = sorted(set(weight_map) - set(shapes))
            raise ExportError(f"{folder} lacks {len(lost)} tensors of its index, {lost[:1]} first.", fix)
        return cls(folder, config, shards, shapes)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def parameters(self) -> int:
        """Number of stored parameters; tied ones count once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def read(self, shard: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one shard, one by one."""
        with safe_open(self.folder / shard, framework="pt") as file:
            for name in self.shards[shard]:
                yield name, file.get_tensor(name)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, shard by shard."""
        for shard in self.shards:
            yield from self.read(shard)
