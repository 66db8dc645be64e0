"""A GGUF's own weights for transformers: each tensor of the file dequantised and put back where the base has it.

What transformers then says is what the file's numbers say, whatever reads them: it parts what the format lost (from the 16-bit
model to these) from what the consumer makes of the file (from these to its own answers), which should be next to nothing.

A tensor of the file that is no rounding of what it should be is named and not taken over: the right one stands in its place.
So a wrong tensor in the file parts consumer and transformers too, and is never mistaken for what the format loses.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from sparkproof.runners.export_formats import ROUNDING
from sparkproof.runners.export_layout import GENERATED, Unplaceable, copy_without_weights, place, shapes_of

LARGEST = 20_000_000  # parameters: each takes 50 bytes of memory here, with its place in the file


def write(file: Path, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Make the folder `out`: the model in `base` with the numbers of the GGUF `file`, which should hold it with `adapter` merged.

    The result: `strays`, a sentence for each tensor of the file that is no rounding of its source, and `missing`, the base's
    tensors that the file does not hold whole, and `kinds`, the type of each in the file. Errors: Unplaceable.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    wanted = merged(base, adapter)
    placed = place(base)
    made = {name: value.copy().reshape(-1) for name, value in wanted.items()}
    met = {name: np.zeros(value.size, dtype=bool) for name, value in wanted.items()}
    strays = []
    kinds: dict[str, str] = {}
    for t in GGUFReader(file).tensors:
        if t.name in GENERATED:
            continue
        if t.name not in placed:
            strays.append(f"{t.name} is not the base's")
            continue
        value = np.asarray(dequantize(t.data, t.tensor_type), dtype=np.float32).reshape(-1) - placed[t.name].added
        right = np.empty_like(value)
        if sum(len(here) for _, _, here in placed[t.name].sources) != value.size:
            strays.append(f"{t.name} has {value.size} numbers, which is not what the base gives it")
            continue
        for name, there, here in placed[t.name].sources:
            kinds[name] = t.tensor_type.name
            right[here] = wanted[name].reshape(-1)[there]
            met[name][there] = True
        apart = float(np.linalg.norm(value - right) / max(float(np.linalg.norm(right)), 1e-30))
        if not apart <= ROUNDING[t.tensor_type.name]:
            strays.append(
                f"{t.name} is {apart:.2g} away, and {t.tensor_type.name} rounds by {ROUNDING[t.tensor_type.name]:g}"
            )
            continue
        for name, there, here in placed[t.name].sources:
            made[name][there] = value[here]
    copy_without_weights(base, out)
    tensors = {name: value.reshape(wanted[name].shape) for name, value in made.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    missing = sorted(name for name, seen in met.items() if not seen.all())
    return {"strays": strays, "missing": missing, "kinds": kinds}


def merged(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """The base's tensors with the adapter in them, fp32: merged by PEFT itself, and named as transformers saves them.

    Errors: Unplaceable where that is too large, or has other tensors than the base.
    """
    import torch
    from peft import PeftModel
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    shapes = shapes_of(base)
    count = sum(math.prod(shape) for shape in shapes.values())
    if count > LARGEST:
        raise Unplaceable(
            f"It has {count / 1e6:.0f} M parameters; up to {LARGEST / 1e6:.0f} M are held in memory for this."
        )
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole: Any = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with tempfile.TemporaryDirectory(prefix="sparkproof-merged-") as folder:
        whole.save_pretrained(folder)
        found = {n: t for file in sorted(Path(folder).glob("*.safetensors")) for n, t in load_file(file).items()}
    if {name: value.shape for name, value in found.items()} != shapes:
        other = sorted(set(found) ^ set(shapes)) or ["shapes"]
        raise Unplaceable(f"transformers saves it with other tensors than the base has: {', '.join(other[:3])}.")
    return found
