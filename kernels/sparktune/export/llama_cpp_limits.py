"""What llama.cpp takes for granted of a family, where a configuration may say otherwise or nothing at all.

Its converter reads config.json as the hub has it. One that transformers wrote can lack a key, and some properties have no place
in a GGUF: llama.cpp then computes something else, loads without a word and answers nearly right.
"""

from __future__ import annotations

from typing import Any

from sparktune.export import hub_config
from sparktune.export.files import ExportError

NO_ROPE_EVERY = 4  # n_no_rope_layer_step in llama.cpp's src/models/smollm3.cpp; no key of a GGUF changes it


def complete(hparams: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the configuration with what llama.cpp has to be told, what the user should know).

    Errors: ExportError for a model that llama.cpp would run as another one.
    """
    architecture = next(iter(hparams.get("architectures") or []), "")
    notes = []
    hparams = hub_config.complete(hparams)
    if architecture == "SmolLM3ForCausalLM":
        _check_smollm3(hparams)
    rope = hparams.get("rope_parameters") or hparams.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "yarn" and rope.get("truncate") is False:
        notes.append("llama.cpp rounds the bounds of YaRN's ramp to whole dimensions, which this model does not.")
    return hparams, notes


def _check_smollm3(hparams: dict[str, Any]) -> None:
    layers = int(hparams["num_hidden_layers"])
    every = int(hparams.get("no_rope_layer_interval") or NO_ROPE_EVERY)
    given = hparams.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    known = [int((i + 1) % NO_ROPE_EVERY != 0) for i in range(layers)]
    if [int(bool(v)) for v in given] != known:
        raise ExportError(
            f"llama.cpp can't run it: its SmolLM3 has no RoPE in every {NO_ROPE_EVERY}th layer, and this one elsewhere "
            f"(no_rope_layers {given[:8]}).",
            "Export merged_16bit, and serve it with vLLM or transformers.",
        )
