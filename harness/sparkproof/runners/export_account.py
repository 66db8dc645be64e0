"""What the record keeps of an export besides its assertions: measurements, evidence, and what to do next."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparkproof.results import Assertion, Measurement
from sparkproof.runners import export_judge
from sparkproof.runners.export_rounded_judge import FORMAT_LOST
from sparkproof.scenario import ExportScenario


def reference_sentence(name: str) -> str:
    """What the export was compared with, for a reader."""
    return f"Compared with {name}: {REFERENCES[name]}."


REFERENCES = {
    "base16+adapter": "the 16-bit base with the adapter beside it, computed in fp32",
    "base4+adapter": "the 4-bit base that training ran over, with the adapter, computed in fp32",
}


def measurements(
    scenario: ExportScenario,
    reference: np.ndarray,
    exported: np.ndarray,
    written: dict[str, Any],
    seen: dict[str, Any],
    questions: dict[str, Any],
) -> list[Measurement]:
    """Divergence, agreement, size and times. A generation too short to time gives none."""
    device = seen.get("device", "cpu")
    where = {"consumer": scenario.consumer, "device": device, "reference": scenario.reference}
    found = []
    if seen["answers"] is not None and reference.shape == exported.shape:
        values = [float(v) for v in export_judge.kl(reference, exported) if np.isfinite(v)]
        agree, clear = export_judge.agreement(reference, exported, scenario.margin)
        if values:
            found += [
                _measured("KL, mean", sum(values) / len(values), "nats", False, where, samples=values),
                _measured("KL, largest", max(values), "nats", False, where),
            ]
        if clear:
            found.append(_measured("top-1 agreement", agree / clear, "fraction", True, {**where, "positions": clear}))
    answers = seen["answers"]
    found += [
        _measured("export size", seen["file"]["bytes"] / 2**20, "MiB", False, where),
        _measured("export time", written["exported"]["seconds"], "s", False, where),
    ]
    if answers is None:
        return found
    found.append(_measured("load time", answers["load_s"], "s", False, where))
    if answers["tokens_per_s"] > 0:
        found.append(_measured("generation", answers["tokens_per_s"], "tokens/s", True, where))
    return found


def _measured(
    name: str, value: float, unit: str, higher: bool, where: dict[str, Any], samples: list[float] | None = None
) -> Measurement:
    return Measurement(
        name=name, value=value, unit=unit, higher_is_better=higher, samples=samples or [], conditions=where
    )


def evidence(
    scenario: ExportScenario,
    reference: np.ndarray,
    exported: np.ndarray,
    questions: dict[str, Any],
    written: dict[str, Any],
    seen: dict[str, Any],
) -> dict[str, Any]:
    """Divergence a text, what was said to the canary, what was made of what and with which versions."""
    texts: list[dict[str, Any]] = []
    start = 0
    for sequence in questions["sequences"]:
        end = start + len(sequence["positions"])
        if seen["answers"] is not None and reference.shape == exported.shape:
            value = float(export_judge.kl(reference[start:end], exported[start:end]).mean())
            texts.append({"text": sequence["text"], "positions": end - start, "kl_nats": export_judge.number(value)})
        start = end
    return {
        **scenario.place,
        "source": scenario.source,
        "reference": scenario.reference,
        "base": written["base"],
        "exported": written["exported"],
        "texts": texts,
        "canary": {
            "prompt": questions["canary_prompt"],
            "reference": questions["answers"]["canary"],
            "exported": (seen["answers"] or {}).get("canary", ""),
        },
        "weights": seen["weights"] or {},
        "metadata": seen["file"]["metadata"],
        "backend": seen.get("backend", {}),
        "versions": seen.get("versions", {}),
    }


def next_step(assertions: list[Assertion]) -> str:
    """What to look at first, by the first assertion that did not hold."""
    for a in assertions:
        if not a.passed and FORMAT_LOST in a.detail:
            return "The file is right and is read right: take a larger type for this model, or a dynamic mix of types."
        if not a.passed:
            return next((hint for start, hint in HINTS.items() if a.name.startswith(start)), "")
    return ""


_OFF = "Compare the formats of this run: if all are off, the merge is wrong; if one is, its writer or consumer."
_READ = "The consumer makes something else of the file than its weights say: look at its rope.* and attention keys."
HINTS = {
    "files that": "The export was cut short or copied in part: export again, and compare sizes.",
    "times that": "The adapter was merged more than once, not at all, or at another scale than alpha / r.",
    "distance of": "Weights differ from base + update beyond rounding: see what the evidence says they look like.",
    "generation ends": "The stop tokens were lost: compare eos_token_id in generation_config.json, or the GGUF's.",
    "conversations fed": "The consumer adds or drops special tokens: look at add_bos_token and at the template's beginning.",
    "tensors of the file": "The file holds other weights than base and adapter: look at the tensors that the evidence names.",
    "tensors of": "Look at the types with `gguf-dump FILE` or in the safetensors headers: not what was asked for.",
    "parameters": "The file lacks tensors or rows: compare its tensors with the base's.",
    "file size": "Export again with enough disk space.",
    "weights that": "The file lacks a weight that the configuration asks for: compare tie_word_embeddings with the base's.",
    "tokens that": "The vocabulary was padded or cut: compare `vocab_size` of the base with the export.",
    "RoPE of": "The file's rotary frequencies are not the base's: look at its rope.* keys and rope_freqs.weight.",
    "tokens of": "The vocabulary was cut or padded: compare `vocab_size` of the base with the export.",
    "conversations that Go": "Compare the Modelfile's TEMPLATE with chat_template.jinja where they part.",
    "template that Ollama": "Look at `ollama show --template` beside the Modelfile: Ollama took another, or none.",
    "answer of Ollama to the bare": "Try the GGUF in llama.cpp: if it is right there, this Ollama reads it otherwise.",
    "answer of Ollama through": "Compare the Modelfile's TEMPLATE and PARAMETER stop with the chat template.",
    "stop texts": "Compare the Modelfile's PARAMETER stop lines with the end of an answer in the chat template.",
    "prompts that Ollama": "It adds or drops tokens: look at add_bos_token and at the template's beginning.",
    "first tokens": "Weights or tokenizer are off: try the same file in llama.cpp.",
    "mean KL(the file": _READ,
    "canary answer as": _READ,
    "mean KL": _OFF,
    "top-1": _OFF,
    "hard strings": "The tokenizer or its pre-tokenizer id is not the base model's: look at `tokenizer.ggml.pre`.",
    "chat template": "The template was lost or changed on the way: compare the base's chat_template.jinja.",
    "conversations": "The consumer renders the template otherwise: update it, or simplify the template.",
    "canary": "The adapter is not in the export, or at another scale: compare KL on the canary's answer.",
}
