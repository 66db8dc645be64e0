"""Folders that transformers and PEFT load: the adapter alone, or merged into the 16-bit base.

Merging happens in the 16-bit base, never in the 4-bit one that was trained over: NF4 would quantise the sum again and
lose most of a small update. So the merged model is base16 + adapter, which differs from the base4 + adapter that
training saw by the quantisation error of the base; a comparison has to name its reference.

Each weight is W' = round(W + scale * B A), the sum in fp32, rounded once to 16 bits. Shards are rewritten one after
another, so the peak is near one shard; tied embeddings stay tied, because what the base does not store is not written.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparktune.export.checkpoint import INDEX, Checkpoint
from sparktune.export.files import ExportError, atomic_folder, need_space
from sparktune.export.lora import CONFIG, WEIGHTS, Adapter

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
OTHER_FILES = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    size_bytes: int
    tensors: int
    merged: int  # tensors that took an update
    parameters: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The record's form."""
        return {**asdict(self), "path": str(self.path)}


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """The adapter's folder if training saved a tokenizer there (it is what the model has seen), else the base's."""
    return adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else base


def save_adapter(model: Any, out: Path) -> Path:
    """Write a live PEFT model's adapter to `out`, whole. Errors: ExportError when B is all zero or not finite."""
    with atomic_folder(out) as part:
        model.save_pretrained(part, safe_serialization=True)
        Adapter.read(part).check_trained()
    return out


def export_adapter(base: Path, adapter: Path, out: Path, base_name: str = "") -> Exported:
    """Copy the adapter with the tokenizer it needs; `base_name` (a hub id) replaces a path of this machine."""
    start = time.monotonic()
    checkpoint, lora = Checkpoint.open(base), Adapter.read(adapter)
    lora.check_fits(set(checkpoint.shapes), checkpoint.tied)
    lora.check_trained()
    need_space(out, (adapter / WEIGHTS).stat().st_size)
    with atomic_folder(out) as part:
        shutil.copyfile(adapter / WEIGHTS, part / WEIGHTS)
        config = dict(lora.config)
        if base_name:
            config["base_model_name_or_path"] = base_name
        _write_json(part / CONFIG, config)
        _copy(tokenizer_folder(base, adapter), part, TOKENIZER_FILES)
        _copy(base, part, OTHER_FILES[1:])
    pairs = [t for pair in lora.pairs.values() for t in pair] + list(lora.whole.values())
    return _exported(out, len(pairs), 0, sum(t.numel() for t in pairs), start)


def export_merged(base: Path, adapter: Path, out: Path, dtype: torch.dtype | None = None) -> Exported:
    """Merge `adapter` into the 16-bit model in `base`; `out` becomes a folder for `from_pretrained`.

    `dtype` is the type of the floating-point weights written: by default the base's own, bf16 where that is fp32.
    Errors: ExportError (a base or adapter that can't be merged), NoSpaceError before the first byte.
    """
    start = time.monotonic()
    checkpoint, lora = Checkpoint.open(base), Adapter.read(adapter)
    lora.check_fits(set(checkpoint.shapes), checkpoint.tied)
    lora.check_trained()
    stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16")
    target = dtype or (torch.float16 if stored == "float16" else torch.bfloat16)
    if target not in (torch.float16, torch.bfloat16):
        raise ExportError(f"{target} is not a 16-bit type.", "Use torch.bfloat16 or torch.float16.")
    need_space(out, 2 * checkpoint.parameters)
    with atomic_folder(out) as part:
        total = 0
        for shard in checkpoint.shards:
            tensors = {}
            for name, weight in checkpoint.read(shard):
                merged = lora.apply(name, weight)
                tensors[name] = _rounded(name, merged, target) if merged.is_floating_point() else merged
            total += sum(t.nbytes for t in tensors.values())
            save_file(tensors, part / shard, metadata={"format": "pt"})
            (part / shard).chmod(0o644)
        lora.check_used()
        if (base / INDEX).is_file():
            index = json.loads((base / INDEX).read_text(encoding="utf-8"))
            index["metadata"] = {**index.get("metadata", {}), "total_size": total}
            _write_json(part / INDEX, index)
        config = {k: v for k, v in checkpoint.config.items() if k not in ("torch_dtype", "dtype")}
        _write_json(part / "config.json", {**config, "dtype": str(target).removeprefix("torch.")})
        _copy(tokenizer_folder(base, adapter), part, TOKENIZER_FILES)
        _copy(base, part, OTHER_FILES)
    return _exported(out, len(checkpoint.shapes), len(lora.used), checkpoint.parameters, start)


def _rounded(name: str, value: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """`value` rounded once to `target`. Errors: ExportError on overflow."""
    out = value.to(target).contiguous()
    if not torch.isfinite(out).all():
        raise ExportError(f"{name} does not fit {target}.", "Use torch.bfloat16, which has fp32's range.")
    return out


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _exported(out: Path, tensors: int, merged: int, parameters: int, start: float) -> Exported:
    files = [out] if out.is_file() else [f for f in out.iterdir() if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    return Exported(out, size, tensors, merged, parameters, time.monotonic() - start)
