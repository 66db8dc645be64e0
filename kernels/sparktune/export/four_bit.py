"""Merged, then quantised to NF4: a folder that transformers loads in 4 bits without quantising again.

This rounds twice: the merge is the 16-bit one, and its result is quantised, so the small changes that training made are
rounded as coarsely as the base. It is what `load_in_4bit=True` would make of the merged 16-bit folder, at a quarter of its
bytes; to serve the model as trained, export that folder or the adapter.

The layout is bitsandbytes': codes [n / 2, 1], and beside them what QuantState.as_dict packs: scales, in 8 bits with scales of
their own, and tables. Embeddings, head and what is no linear layer stay in 16 bits, as transformers would choose.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparktune.export.checkpoint import INDEX, SINGLE, Checkpoint
from sparktune.export.files import ExportError, atomic_folder, need_space
from sparktune.export.hf import (
    IMAGE_FILES,
    OTHER_FILES,
    Exported,
    copy_files,
    copy_tokenizer,
    exported,
    opened,
    rounded,
    sixteen_bit,
    write_json,
)
from sparktune.export.places import stored_name
from sparktune.export.progress import Progress, silent

BITS = 4.2  # a weight, with double-quantised scales: 4 + 8 / 64 + 32 / 64 / 256, rounded up
BLOCK, PIECE = 64, 1 << 20  # weights
NOTE = "Merged in 16 bits and quantised to NF4 afterwards: this rounds the trained change a second time."


def export_merged_4bit(
    base: Path,
    adapter: Path | None,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int = 2_000_000_000,
    progress: Progress = silent,
) -> Exported:
    """Merge `adapter` into the 16-bit model in `base` and quantise the sum to NF4; `out` is a folder for transformers.

    dtype: what stays in 16 bits, and what the layers compute in. shard_bytes: the most that is held, and that a file has.
    Errors: ExportError, also for models with experts, NoSpaceError before the first byte.
    """
    start = time.monotonic()
    checkpoint, lora = opened(base, adapter)
    target = sixteen_bit(checkpoint, dtype)
    linear = linear_weights(checkpoint)
    small = sum(torch.Size(checkpoint.shapes[name]).numel() for name in linear)
    large = checkpoint.parameters - small
    need_space(
        out, int(small * BITS / 8 + large * 2),
        f"{small / 1e9:.2f} G parameters x {BITS} bits and {large / 1e9:.2f} G x 2 bytes",
    )  # fmt: skip
    with atomic_folder(out) as part:
        files = _Shards(part, shard_bytes)
        done = 0
        for name, stored in checkpoint.stored.items():
            weight = stored.read()
            weight = rounded(name, weight if lora is None else lora.apply(name, weight), target)
            files.add(quantised(name, weight) if name in linear else {name: weight})
            trim()
            done += 2 * weight.numel()
            progress(name, done, 2 * checkpoint.parameters)
        count = files.close(checkpoint.parameters)
        if lora is not None:
            lora.check_used()
        config = {k: v for k, v in checkpoint.config.items() if k not in ("torch_dtype", "dtype")}
        kind = str(target).removeprefix("torch.")
        write_json(part / "config.json", {**config, "dtype": kind, "quantization_config": quantisation(kind)})
        copy_tokenizer(base, adapter, part)
        copy_files(base, part, (*OTHER_FILES, *IMAGE_FILES))
    return exported(out, count, len(lora.used) if lora else 0, checkpoint.parameters, start, notes=[NOTE])


def trim() -> None:
    """Give freed memory back to the system: glibc keeps what lies below a held tensor, which came to most of a model."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def linear_weights(checkpoint: Checkpoint) -> set[str]:
    """The stored tensors that transformers would quantise. Errors: ExportError for a model with experts."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    config = AutoConfig.from_pretrained(checkpoint.folder)
    config.quantization_config = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if any(p.dim() == 3 for p in model.parameters()):
        raise ExportError(
            "The model has experts, which transformers keeps in 16 bits: its 4-bit folder would be most of the 16-bit one.",
            "Export merged_16bit and load it with FastLanguageModel and load_in_4bit=True, which quantises experts too.",
        )
    skipped = set(get_keys_to_not_convert(model))
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not any(name == s or name.endswith(f".{s}") for s in skipped):
            stored = stored_name(f"{name}.weight", checkpoint.shapes)
            if stored is None:
                raise ExportError(
                    f"The base does not store {name}.weight.", "Give the folder of the 16-bit base model."
                )
            found.add(stored)
    return found


def quantised(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes stores for a linear layer's `weight` [out, in].

    Its CPU code holds 14 bytes a weight on the way, so it gets pieces: blocks don't know each other. The scales are quantised
    together, less their mean, as its own `compress_statistics` does.
    """
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise

    pieces = [quantize_4bit(piece, quant_type="nf4", blocksize=BLOCK) for piece in weight.reshape(-1).split(PIECE)]
    codes = torch.cat([code for code, _ in pieces])
    scales = torch.cat([state.absmax for _, state in pieces])
    offset = scales.mean()
    small, nested = quantize_blockwise(scales - offset, blocksize=256)
    state = QuantState(
        absmax=small, shape=weight.shape, dtype=weight.dtype, blocksize=BLOCK, code=pieces[0][1].code, quant_type="nf4",
        offset=offset, state2=nested,
    )  # fmt: skip
    return {name: codes, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def quantisation(kind: str) -> dict[str, Any]:
    """config.json's `quantization_config`; `kind` is what the layers compute in."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-any-return]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    ).to_dict()


class _Shards:
    """Files of at most `most` bytes; how many there are is known at the end, and so are their names."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self.held: dict[str, torch.Tensor] = {}
        self.written: list[list[str]] = []
        self.bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.held and sum(t.nbytes for t in (*self.held.values(), *tensors.values())) > self.most:
            self._write()
        self.held |= tensors

    def _write(self) -> None:
        self.bytes += sum(t.nbytes for t in self.held.values())
        save_file(self.held, self.folder / f"{len(self.written)}.part", metadata={"format": "pt"})
        self.written.append(list(self.held))
        self.held = {}

    def close(self, parameters: int) -> int:
        """Name the files and write their index; return the number of tensors."""
        self._write()
        count = len(self.written)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
        for i, name in enumerate(names):
            (self.folder / f"{i}.part").rename(self.folder / name)
            (self.folder / name).chmod(0o644)
        if count > 1:
            weight_map = {t: name for name, tensors in zip(names, self.written, strict=True) for t in tensors}
            metadata = {"total_parameters": parameters, "total_size": self.bytes}
            write_json(self.folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
        return sum(len(tensors) for tensors in self.written)
