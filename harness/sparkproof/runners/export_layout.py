"""Where each number of a GGUF comes from in the base's safetensors: llama.cpp's converter, asked with labels in place of weights.

The converter renames tensors and moves what is in them: rows of Q and K into another order, experts onto a stack, one latent
projection into two, one of them transposed. No table of that per family is kept here: the base is written three times with
labels for weights (which tensor, which row, which column), each goes through the converter in fp32, and what comes out says
where everything came from. Some norms get 1 added on the way; labels are multiples of 4, so that shows too.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STEP = 4  # between labels: what is added on the way (0 or 1) can be told from the label
LIMIT = 1 << 24  # integers beyond it have no fp32
GENERATED = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)  # of the configuration, not of weights
WEIGHTS = (".safetensors", ".safetensors.index.json")


class Unplaceable(Exception):
    """llama.cpp computes with a tensor of this model, or has one that is not the base's: nothing can be put back."""


@dataclass(frozen=True)
class Placed:
    """One tensor of the GGUF."""

    sources: list[tuple[str, np.ndarray, np.ndarray]]  # (the base's tensor, flat positions in it, flat positions here)
    added: float  # to every number on the way


def place(base: Path) -> dict[str, Placed]:
    """Every tensor of a GGUF made of the model in the folder `base`, by its name, but those that are in no base.

    Takes the base's size in fp32 twice on the disk for a moment. Errors: Unplaceable; ExportError where llama.cpp does not
    know the model.
    """
    from sparktune.export import export_gguf

    shapes = shapes_of(base)
    names = list(shapes)
    kinds: list[Callable[[str, tuple[int, int]], np.ndarray]] = [
        lambda name, shape: np.full(shape, names.index(name), dtype=np.float32),
        lambda name, shape: np.broadcast_to(np.arange(shape[0], dtype=np.float32)[:, None], shape),
        lambda name, shape: np.broadcast_to(np.arange(shape[1], dtype=np.float32)[None], shape),
    ]
    largest = max([len(names), *(n for s in shapes.values() for n in flat(s))])
    if largest * STEP >= LIMIT:
        raise Unplaceable(f"A tensor of {largest} rows or columns is too large to be labelled.")
    with tempfile.TemporaryDirectory(prefix="sparkproof-layout-") as scratch:
        read = []
        for number, label in enumerate(kinds):
            labelled, file = Path(scratch, "labelled"), Path(scratch, f"{number}.gguf")
            copy_without_weights(base, labelled)
            _write(labelled, {n: STEP * label(n, flat(s)).reshape(s) for n, s in shapes.items()})
            export_gguf(labelled, file, "f32")  # type: ignore[arg-type]
            shutil.rmtree(labelled)
            read.append(_values(file))
        return {name: _placed(name, names, shapes, [r[name] for r in read]) for name in read[0]}


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor whose leading dimensions are one."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def shapes_of(base: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of a folder's safetensors."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="np") as f:
            found |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    return found


def copy_without_weights(base: Path, out: Path) -> None:
    """Everything else of a model's folder."""
    out.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, out / file.name)


def _write(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _values(file: Path) -> dict[str, np.ndarray]:
    from gguf import GGUFReader

    return {t.name: np.asarray(t.data).reshape(-1) for t in GGUFReader(file).tensors if t.name not in GENERATED}


def _placed(name: str, names: list[str], shapes: dict[str, tuple[int, ...]], labels: list[np.ndarray]) -> Placed:
    whole: list[Any] = []
    for values in labels:
        label = np.floor(values / STEP)
        added = np.unique(values - STEP * label)
        if len(added) != 1 or added[0] not in (0, 1) or values.min() < 0:
            raise Unplaceable(f"llama.cpp does more to {name} than move its numbers.")
        whole.append(label.astype(np.int64))
    tensor, row, column = whole
    sources = []
    for i in np.unique(tensor):
        here = np.flatnonzero(tensor == i)
        width = flat(shapes[names[i]])[1]
        sources.append((names[i], row[here] * width + column[here], here))
    return Placed(sources, float(labels[0][0] - STEP * tensor[0]))
