"""A LoRA adapter as GGUF, for `llama-server --lora` and Ollama's ADAPTER, by llama.cpp's convert_lora_to_gguf.py.

llama.cpp has one alpha a file and takes each matrix's rank from its shape: scale = alpha / r. PEFT's scale is
alpha / sqrt(r) with rsLoRA, and may differ by module. So what is converted is the same adapter with one alpha, and the
rest of each scale in its B. LoRA on experts' stacks becomes one pair an expert, which llama.cpp stacks its own way.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from sparktune.export.files import ExportError, atomic_file, need_space
from sparktune.export.gguf import converting, model_folder
from sparktune.export.hf import Exported, exported, opened, write_json
from sparktune.export.llama_cpp import converter, folder
from sparktune.export.lora import CONFIG, WEIGHTS, Adapter

OUTTYPES = ("f32", "f16", "bf16", "q8_0")
SCRIPT = "convert_lora_to_gguf.py"
FIX = "Export the merged model as GGUF instead."


def export_lora_gguf(base: Path, adapter: Path, out: Path, outtype: str = "f16") -> Exported:
    """Write the adapter in `adapter`, trained over `base`, to the GGUF file `out`; `outtype` is one of OUTTYPES.

    Errors: ExportError for what llama.cpp's adapters can't hold, NoSpaceError before the first byte.
    """
    start = time.monotonic()
    if outtype not in OUTTYPES:
        raise ExportError(f"There is no type {outtype!r} for a LoRA GGUF.", f"Use one of {', '.join(OUTTYPES)}.")
    _, lora = opened(base, adapter)
    assert lora is not None
    tensors, alpha = as_llama_cpp(lora)
    size = sum(t.numel() for t in tensors.values()) * (4 if outtype == "f32" else 2)
    need_space(out, size, f"{size / 1e9:.3f} GB of LoRA matrices in {outtype}")
    with tempfile.TemporaryDirectory(prefix="sparktune-lora-") as temporary:
        source = Path(temporary)
        save_file(tensors, source / WEIGHTS)
        write_json(source / CONFIG, {"peft_type": "LORA", "lora_alpha": alpha})
        with model_folder(base, None, base.name, weights=False) as model, atomic_file(out) as part:
            with converting(adapter):
                _run(["--base", str(model), "--outfile", str(part), "--outtype", outtype, str(source)])
            if not part.is_file():
                raise ExportError(f"llama.cpp's converter wrote nothing for {adapter}.", FIX)
    return exported(out, len(tensors), 0, sum(t.numel() for t in tensors.values()), start)


def as_llama_cpp(lora: Adapter) -> tuple[dict[str, torch.Tensor], float]:
    """(tensors under the base's own names, alpha) of an adapter that acts the same. Errors: ExportError."""
    if lora.whole:
        raise ExportError(f"The adapter trained {min(lora.whole)} whole, which a LoRA GGUF can't hold.", FIX)
    if lora.embeddings:
        raise ExportError(f"The adapter has LoRA on {min(lora.embeddings)}, which is not converted here.", FIX)
    alpha = 0.0
    tensors: dict[str, torch.Tensor] = {}
    for name, place in lora.places.items():
        a, b = lora.pairs[place.source]
        if place.experts > 1:
            if place.expert is None:
                raise ExportError(f"The adapter trains {name}, whose experts lie in one tensor.", FIX)
            a, b = place.of_expert(a, b)
        wanted = (
            lora.scale(place.source, place.experts, place.parameter) * a.shape[0]
        )  # the alpha that this pair alone would have
        alpha = alpha or wanted
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = a.contiguous()
        tensors[f"{stem}.lora_B.weight"] = (b * (wanted / alpha)).contiguous()
    return tensors, alpha


def _run(arguments: list[str]) -> None:
    """llama.cpp's script, in this process."""
    before = sys.argv
    with converter():
        script = folder() / SCRIPT
        sys.argv = [str(script), *arguments]
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            sys.argv = before
