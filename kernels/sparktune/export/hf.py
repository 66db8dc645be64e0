"""Folders that transformers and PEFT load: the adapter alone, or merged into the 16-bit base.

Merging happens in the 16-bit base, never in the 4-bit one that was trained over: NF4 would quantise the sum again and
lose most of a small update. So the merged model is base16 + adapter, which differs from the base4 + adapter that
training saw by the quantisation error of the base; a comparison has to name its reference.

Each weight is W' = round(W + scale * B A), the sum in fp32, rounded once to 16 bits. Tensors are read, merged and written one
after another, so the peak is the largest tensor in fp32; tied embeddings stay tied, because what the base does not store
is not written.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparktune.export import hub_config
from sparktune.export.checkpoint import INDEX, SINGLE, Checkpoint
from sparktune.export.files import ExportError, atomic_folder, need_space
from sparktune.export.lora import CONFIG, WEIGHTS, Adapter
from sparktune.export.progress import Progress, silent
from sparktune.export.tensors import write_file

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
IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    size_bytes: int
    tensors: int
    merged: int  # tensors that took an update
    parameters: int
    seconds: float
    types: dict[str, str] = field(default_factory=dict)  # GGUF: tensor -> the type it has in the file
    fallbacks: dict[str, str] = field(default_factory=dict)  # GGUF: tensor -> the type that its shape did not allow
    notes: list[str] = field(default_factory=list)  # what the user should know

    def to_json(self) -> dict[str, Any]:
        """The record's form."""
        counts: dict[str, int] = {}
        for kind in self.types.values():
            counts[kind] = counts.get(kind, 0) + 1
        return {
            "path": str(self.path), "size_bytes": self.size_bytes, "tensors": self.tensors, "merged": self.merged,
            "parameters": self.parameters, "seconds": self.seconds, "type_counts": counts,
            "fallbacks": len(self.fallbacks), "notes": self.notes,
        }  # fmt: skip


def tokenizer_folder(base: Path, adapter: Path | None) -> Path:
    """The adapter's folder if training saved a tokenizer there (it is what the model has seen), else the base's."""
    return adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else base


def opened(base: Path, adapter: Path | None) -> tuple[Checkpoint, Adapter | None]:
    """Base and adapter, if there is one, which fit each other. Errors: ExportError."""
    checkpoint = Checkpoint.open(base)
    if adapter is None:
        return checkpoint, None
    lora = Adapter.read(adapter)
    lora.check_fits(checkpoint.shapes, checkpoint.tied, checkpoint.config)
    lora.check_trained()
    return checkpoint, lora


def save_adapter(model: Any, out: Path) -> Path:
    """Write a live PEFT model's adapter to `out`, whole. Errors: ExportError when B is all zero or not finite."""
    with atomic_folder(out) as part:
        model.save_pretrained(part, safe_serialization=True)
        Adapter.read(part).check_trained()
    return out


def export_adapter(base: Path, adapter: Path, out: Path, base_name: str = "") -> Exported:
    """Copy the adapter with the tokenizer it needs; `base_name` (a hub id) replaces a path of this machine."""
    start = time.monotonic()
    _, lora = opened(base, adapter)
    assert lora is not None
    size = (adapter / WEIGHTS).stat().st_size
    need_space(out, size, f"{size / 1e9:.2f} GB of LoRA matrices")
    with atomic_folder(out) as part:
        shutil.copyfile(adapter / WEIGHTS, part / WEIGHTS)
        config = dict(lora.config)
        if base_name:
            config["base_model_name_or_path"] = base_name
        write_json(part / CONFIG, config)
        copy_tokenizer(base, adapter, part)
        copy_files(base, part, OTHER_FILES[1:])
    pairs = [t for pair in lora.pairs.values() for t in pair] + list(lora.whole.values())
    return exported(out, len(pairs), 0, sum(t.numel() for t in pairs), start)


def export_merged(
    base: Path,
    adapter: Path | None,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int | None = None,
    progress: Progress = silent,
) -> Exported:
    """Merge `adapter` (None: nothing) into the 16-bit model in `base`; `out` becomes a folder for `from_pretrained`.

    dtype: of the floating-point weights written; by default the base's own, bf16 where that is fp32. A base in MXFP4 is
        dequantised, and its folder is a plain 16-bit one.
    shard_bytes: the most a file holds; by default the shards are the base's.

    Errors: ExportError (a base or adapter that can't be merged), NoSpaceError before the first byte.
    """
    start = time.monotonic()
    checkpoint, lora = opened(base, adapter)
    target = sixteen_bit(checkpoint, dtype)
    plan = {
        name: (target if stored.dtype.is_floating_point else stored.dtype, stored.shape)
        for name, stored in checkpoint.stored.items()
    }
    need_space(out, 2 * checkpoint.parameters, f"{checkpoint.parameters / 1e9:.2f} G parameters x 2 bytes")
    with atomic_folder(out) as part:
        write_shards(part, checkpoint, lora, plan, shard_bytes, progress)
        config = {
            k: v for k, v in checkpoint.config.items() if k not in ("torch_dtype", "dtype", "quantization_config")
        }
        write_json(part / "config.json", {**hub_config.complete(config), "dtype": str(target).removeprefix("torch.")})
        copy_tokenizer(base, adapter, part)
        copy_files(base, part, (*OTHER_FILES, *IMAGE_FILES))
    return exported(out, len(plan), len(lora.used) if lora else 0, checkpoint.parameters, start)


def sixteen_bit(checkpoint: Checkpoint, asked: torch.dtype | None) -> torch.dtype:
    """The 16-bit type to write. Errors: ExportError for another one."""
    stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16")
    target = asked or (torch.float16 if stored == "float16" else torch.bfloat16)
    if target not in (torch.float16, torch.bfloat16):
        raise ExportError(f"{target} is not a 16-bit type.", "Use torch.bfloat16 or torch.float16.")
    return target


def write_shards(
    part: Path,
    checkpoint: Checkpoint,
    lora: Adapter | None,
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    shard_bytes: int | None,
    progress: Progress,
) -> None:
    """The merged tensors of `plan`, and the index where there are several files."""
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in plan.items()}
    shards = checkpoint.shards if shard_bytes is None else _split(sizes, shard_bytes)
    total, done = sum(sizes.values()), 0

    def merged(names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal done
        for name in names:
            weight = checkpoint.stored[name].read()
            if lora is not None:
                weight = lora.apply(name, weight)
            yield name, rounded(name, weight, plan[name][0])
            done += sizes[name]
            progress(name, done, total)

    for file, names in shards.items():
        write_file(part / file, {name: plan[name] for name in names}, merged(names))
    if lora is not None:
        lora.check_used()
    if len(shards) > 1 or SINGLE not in shards:
        weight_map = {name: file for file, names in shards.items() for name in names}
        metadata = {"total_parameters": checkpoint.parameters, "total_size": total}
        write_json(part / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _split(sizes: dict[str, int], most: int) -> dict[str, list[str]]:
    """File name -> tensors, none over `most` bytes unless one tensor alone is."""
    groups: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def rounded(name: str, value: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """`value` rounded once to `target`. Errors: ExportError on overflow."""
    if not value.is_floating_point():
        return value
    out = value.to(target).contiguous()
    if not torch.isfinite(out).all():
        raise ExportError(f"{name} does not fit {target}.", "Use torch.bfloat16, which has fp32's range.")
    return out


def copy_tokenizer(base: Path, adapter: Path | None, target: Path) -> None:
    """The tokenizer that the model has seen; of the base's, what a newer transformers no longer saves."""
    source = tokenizer_folder(base, adapter)
    copy_files(source, target, TOKENIZER_FILES)
    if source != base and not (source / "tokenizer.model").is_file():
        copy_files(base, target, ("tokenizer.model",))


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Those of `names` that `source` has."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_json(path: Path, data: Any) -> None:
    """`data` as a file that people can read."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def exported(out: Path, tensors: int, merged: int, parameters: int, start: float, **more: Any) -> Exported:
    """The account of what now lies at `out`, begun at `start` of time.monotonic()."""
    files = [out] if out.is_file() else [f for f in out.iterdir() if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    return Exported(out, size, tensors, merged, parameters, time.monotonic() - start, **more)
