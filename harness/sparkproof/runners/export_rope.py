"""The rotary frequencies that a GGUF's own keys give, against those that transformers computes for the base.

llama.cpp rotates pair i of a head by position * freq_base^(-2 i / d) / factors[i] / scale, with `rope_freqs.weight` for the
factors (Llama 3's scaling) and `rope.scaling.factor` for a linear one. Yarn is computed by llama.cpp as it runs, so its kind,
factor and original context are compared instead. Families with two ropes are compared by that of their global attention.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def measure(file: Path, base: Path) -> dict[str, Any] | None:
    """`apart`, the largest relative difference of a frequency, and `said`, what the file holds; None for what has no rope."""
    import numpy as np
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config: Any = AutoConfig.from_pretrained(base).get_text_config()
    rope = dict(config.rope_parameters or {})
    rope = dict(rope.get("full_attention", rope))
    kind = rope.get("rope_type", "default")
    reader = GGUFReader(file)
    arch = reader.fields["general.architecture"].contents()
    dims = _value(reader, f"{arch}.rope.dimension_count") or _value(reader, f"{arch}.attention.key_length")
    theta = _value(reader, f"{arch}.rope.freq_base")
    if dims is None or theta is None or "rope_theta" not in rope:
        return None
    scaling = _value(reader, f"{arch}.rope.scaling.type") or "none"
    factor = float(_value(reader, f"{arch}.rope.scaling.factor") or 1.0)
    if kind == "yarn":
        original = _value(reader, f"{arch}.rope.scaling.original_context_length")
        wanted = [rope["factor"], rope["original_max_position_embeddings"], rope["rope_theta"]]
        found = [factor if scaling == "yarn" else math.nan, original, theta]
        apart = max(abs(float(f or math.nan) / float(w) - 1) for f, w in zip(found, wanted, strict=True))
        return {"apart": apart, "said": f"{scaling}, factor {factor:g}, from a context of {original}"}
    if kind not in ("default", "linear", "llama3"):
        return None
    steps = np.arange(0, int(dims), 2, dtype=np.float64) / int(dims)
    ours = float(rope["rope_theta"]) ** -steps
    if kind != "default":
        compute = ROPE_INIT_FUNCTIONS[kind]
        given = {"rope_parameters": rope, "head_dim": int(dims), "hidden_size": int(dims), "num_attention_heads": 1}
        plain = type("Config", (), {**given, "standardize_rope_params": lambda self: None})()
        ours = compute(plain, torch.device("cpu"))[0].double().numpy()
    factors = next((np.asarray(t.data, np.float64) for t in reader.tensors if t.name == "rope_freqs.weight"), 1.0)
    theirs = float(theta) ** -steps / factors / (factor if scaling == "linear" else 1.0)
    said = f"base {theta:g}, scaling {scaling} {factor:g}, {'with' if np.ndim(factors) else 'without'} factors"
    return {"apart": float(np.abs(theirs / ours - 1).max()), "said": said}


def _value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None
