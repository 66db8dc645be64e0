"""Keys that a family's config.json has on the hub, and one that transformers wrote lacks.

transformers' class takes them for granted. What reads a folder without transformers does not: llama.cpp's converter then writes a
softmax for DeepSeek V3's router, and vLLM makes no place for the router's bias and refuses the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the keys that it lacks; what it says itself holds."""
    architecture = next(iter(config.get("architectures") or []), "")
    lacking = {key: value for key, value in KEYS.get(architecture, {}).items() if not config.get(key)}
    return {**config, **lacking}
