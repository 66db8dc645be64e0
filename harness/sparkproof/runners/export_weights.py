"""The exported weights themselves, against W + scale * B A from the 16-bit base and the adapter: no consumer is asked.

Logits say that something is off; this says what. With D = scale * B A the adapter's own update and R = W' - W what the file has
beyond the base, over all matrices that the adapter trains:

    times     <R, D> / <D, D>                1 where it was merged once, 2 where twice, 1.25 where the scale is 1.25 of it
    distance  |W' - (W + D)| / |W + D|       what rounding to the file's type makes, and no more

Where the distance is beyond rounding, the same is computed for what is known to go wrong (not merged, twice, transposed, the
base quantised to NF4 first), and the nearest is named. llama.cpp wants the rows of Q and K of some families in another order:
the order that fits better is taken, since a wrong one shows in the logits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparkproof.runners.export_formats import ROUNDING

WHOLE = 20_000_000  # parameters: up to here every matrix is read, beyond it those of the first, middle and last layer
LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass
class Trained:
    """One matrix that the adapter trains."""

    name: str  # as the base's safetensors call it
    base: Tensor  # fp32
    update: Tensor  # fp32, scale * B A


def measure(path: Path, base: Path, adapter: Path, format_: str) -> dict[str, Any]:
    """`times`, `distance` (the largest against its type's rounding), `ratio` of the two, `type`, `checked`, `nearest`.

    A matrix that the file does not hold under the base's name and shape, or llama.cpp's, is left out and not in `checked`.
    """
    stored = _stored(path, base)
    dot = norm = 0.0
    worst: dict[str, Any] = {"ratio": 0.0, "distance": 0.0, "type": "", "name": ""}
    checked, off = 0, []
    for m in trained(base, adapter):
        found = stored(m)
        if found is None:
            continue
        kind, value = found
        checked += 1
        residual = value - m.base
        dot += float((residual * m.update).sum(dtype=torch.float64))
        norm += float(m.update.square().sum(dtype=torch.float64))
        distance = _apart(value, m.base + m.update)
        ratio = distance / ROUNDING[kind]
        if not ratio <= worst["ratio"]:
            worst = {"ratio": ratio, "distance": distance, "type": kind, "name": m.name}
        if not ratio <= 1:
            off.append((m, value))
    return {
        **worst, "times": dot / norm if norm else math.nan, "checked": checked,
        "nearest": _nearest(off, dot / norm if norm else math.nan) if off else "", "off": len(off),
    }  # fmt: skip


def trained(base: Path, adapter: Path) -> Iterator[Trained]:
    """The matrices that the adapter trains, one at a time; of a large model those of three layers."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    halves = load_file(adapter / "adapter_model.safetensors")
    where: dict[str, Path] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            where |= dict.fromkeys(f.keys(), file)
    modules = [n.removesuffix(".lora_A.weight") for n in halves if n.endswith(".lora_A.weight")]
    names = {f"{m.removeprefix('base_model.model.')}.weight": m for m in modules}
    for name in chosen([n for n in names if n in where], sum(t.numel() for t in halves.values())):
        a, b = (halves[f"{names[name]}.lora_{x}.weight"].float() for x in "AB")
        scale = float(config["lora_alpha"]) / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        with safe_open(where[name], framework="pt") as f:
            yield Trained(name, f.get_tensor(name).float(), scale * (b @ a))


def chosen(names: list[str], adapter_parameters: int) -> list[str]:
    """All, or of a large adapter those of the first, middle and last layer."""
    layers = sorted({int(m[1]) for n in names if (m := LAYER.search(n))})
    if adapter_parameters * 20 <= WHOLE or len(layers) < 4:
        return names
    kept = {layers[0], layers[len(layers) // 2], layers[-1]}
    return [n for n in names if not (m := LAYER.search(n)) or int(m[1]) in kept]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _nearest(off: list[tuple[Trained, Tensor]], times: float) -> str:
    """Which known fault explains the matrices that are off, or that none does."""
    fits: dict[str, float] = {}
    whole = min(abs(times - n) for n in (0, 1, 2)) < 0.02
    for m, value in off:
        tried = {
            "the base without the update": m.base,
            "the update added twice": m.base + 2 * m.update,
            # a scale fitted to the file always fits a little better than the whole number it is
            f"the update at {times:.3g} of its scale": None if whole else m.base + times * m.update,
            "the update transposed": m.base + m.update.T if m.base.shape[0] == m.base.shape[1] else None,
            "the weight transposed": (m.base + m.update).T if m.base.shape[0] == m.base.shape[1] else None,
            "the update over a 4-bit base": _nf4(m.base) + m.update,
            "the update over a 4-bit layer that was repacked": _nf4(m.base, repacked=True) + m.update,
        }
        for name, guess in tried.items():
            if guess is not None:
                fits[name] = fits.get(name, 0.0) + _apart(value, guess) / len(off)
    best = min(fits, key=lambda name: fits[name])
    return best if fits[best] < 0.02 else "nothing known: the values are others"


def _nf4(weight: Tensor, repacked: bool = False) -> Tensor:
    """What quantising to NF4 and back leaves, as training loads it; `repacked` as bitsandbytes does on CPUs with AVX512-BF16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.to(torch.bfloat16), quant_type="nf4")
    if repacked:
        if weight.shape[0] % 32 or weight.shape[1] % 64:  # bitsandbytes leaves those as they are
            return weight
        shape = packed.shape
        other = quantize_4bit(weight.to(torch.bfloat16), quant_type="nf4")[1]  # its state is changed on the way
        packed = _convert_weight_packed_for_cpu(packed, other)[0].reshape(shape)
    return dequantize_4bit(packed, state).float()


def _stored(path: Path, base: Path) -> Any:
    """A function from a trained matrix to (type, its fp32 value) in the exported file, or None."""
    return _in_gguf(path, base) if path.suffix == ".gguf" else _in_safetensors(path)


def _in_safetensors(folder: Path) -> Any:
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            where |= dict.fromkeys(f.keys(), file)
    kinds = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

    def read(m: Trained) -> tuple[str, Tensor] | None:
        if m.name not in where:
            return None
        with safe_open(where[m.name], framework="pt") as f:
            value = f.get_tensor(m.name)
        return (kinds[value.dtype], value.float()) if value.shape == m.base.shape and value.dtype in kinds else None

    return read


def _in_gguf(file: Path, base: Path) -> Any:
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    name = str(reader.fields["general.architecture"].contents())
    arch = next(a for a, n in MODEL_ARCH_NAMES.items() if n == name)
    heads = {k: int(reader.fields[f"{name}.attention.{field}"].contents())
             for k, field in (("q_proj", "head_count"), ("k_proj", "head_count_kv"))
             if f"{name}.attention.{field}" in reader.fields}  # fmt: skip
    layers = int(reader.fields[f"{name}.block_count"].contents())
    names = get_tensor_name_map(arch, layers)
    tensors = {t.name: t for t in reader.tensors}

    def read(m: Trained) -> tuple[str, Tensor] | None:
        t = tensors.get(names.get_name(m.name, try_suffixes=(".weight",)) or "")
        if t is None or tuple(reversed(t.shape.tolist())) != tuple(m.base.shape):
            return None
        value = torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float().reshape(m.base.shape)
        for part, count in heads.items():
            if f".{part}." in m.name:
                pairs = value.reshape(count, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
                if _apart(pairs, m.base + m.update) < _apart(value, m.base + m.update):
                    value = pairs
        return t.tensor_type.name, value

    return read
