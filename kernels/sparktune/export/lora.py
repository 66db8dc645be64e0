"""A PEFT adapter as weight updates: W' = W + scale * B A, with scale = alpha / r (alpha / sqrt(r) for rsLoRA).

A is (r, in), B is (out, r), W is (out, in); the product and the sum are done in fp32 and rounded once, by whoever
writes the result. r is read from A itself; alpha from `adapter_config.json`, with its per-module `alpha_pattern`.

Only plain LoRA on linear layers is merged here. What changes the arithmetic (DoRA, LoRA biases, trained embeddings,
extra modules) is refused by name: a merge that leaves a part out gives a model that nobody trained.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparktune.export.files import ExportError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
PEFT_FIX = "Merge it with peft's own merge_and_unload() over the 16-bit base."


@dataclass
class Adapter:
    """One LoRA adapter, read whole (it is small)."""

    folder: Path
    config: dict[str, Any]
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]  # module -> (A, B), fp32
    used: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Load and check. Errors: ExportError for a missing, unreadable, unsupported or non-finite adapter."""
        fix = "Give the folder that PEFT's save_pretrained() wrote."
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ExportError(f"{folder} has no readable PEFT adapter ({error}).", fix) from error
        _refuse_unsupported(config)
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name.removeprefix(PREFIX))
            if not match:
                raise ExportError(f"The adapter holds {name}, which is not a plain LoRA matrix.", PEFT_FIX)
            if not torch.isfinite(tensor).all():
                raise ExportError(f"The adapter's {name} is not finite.", "Train again: this run diverged.")
            halves.setdefault(match[1], {})[match[2]] = tensor.float()
        for module, pair in halves.items():
            if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                raise ExportError(f"The adapter's A and B of {module} don't belong together.", fix)
        if not halves:
            raise ExportError(f"The adapter in {folder} holds no LoRA matrices.", fix)
        return cls(folder, config, {module: (pair["A"], pair["B"]) for module, pair in halves.items()})

    def scale(self, module: str) -> float:
        """alpha / r of one module, or alpha / sqrt(r) with rsLoRA."""
        rank = self.pairs[module][0].shape[0]
        alpha = float(self.config["lora_alpha"])
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = float(value)
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` in fp32 with its update, if it has one; otherwise as it came."""
        module = name.removesuffix(".weight")
        if module not in self.pairs:
            return weight
        a, b = self.pairs[module]
        if weight.shape != (b.shape[0], a.shape[1]):
            raise ExportError(
                f"The adapter's {module} is for a {b.shape[0]} x {a.shape[1]} weight, the base's is "
                f"{' x '.join(map(str, weight.shape))}.",
                "Give the base model that the adapter was trained on.",
            )
        self.used.add(module)
        return torch.addmm(weight.float(), b, a, alpha=self.scale(module))

    def check_fits(self, names: set[str]) -> None:
        """Raise ExportError unless every module of the adapter is a weight of the base."""
        lost = sorted(m for m in self.pairs if f"{m}.weight" not in names)
        if lost:
            raise ExportError(
                f"The adapter trains {lost[0]}, which the base model does not store"
                f"{f' (and {len(lost) - 1} more)' if len(lost) > 1 else ''}.",
                "Give the base model that the adapter was trained on; a tied lm_head can't take an update of its own.",
            )

    def check_trained(self) -> None:
        """Raise ExportError while B is zero everywhere, as LoRA starts: the export would be the base model."""
        if not any(b.any() for _, b in self.pairs.values()):
            raise ExportError("The adapter's B matrices are all zero: nothing was trained.", "Train before exporting.")

    def check_used(self) -> None:
        """Raise ExportError if an update was never applied: a guard against a merge that forgets."""
        lost = sorted(set(self.pairs) - self.used)
        if lost:
            raise ExportError(f"{len(lost)} updates of the adapter were never merged, {lost[0]} first.")


def _refuse_unsupported(config: dict[str, Any]) -> None:
    kind = str(config.get("peft_type", "LORA"))
    if kind != "LORA":
        raise ExportError(f"The adapter is of type {kind}; only LORA can be merged here.", PEFT_FIX)
    unusual = [
        key
        for key in ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
                    "target_parameters", "use_qalora", "alora_invocation_tokens", "arrow_config", "megatron_config",
                    "layer_replication")
        if config.get(key)
    ]  # fmt: skip
    if config.get("bias", "none") != "none":
        unusual.append(f"bias={config['bias']}")
    if unusual:
        raise ExportError(f"The adapter uses {', '.join(unusual)}, which is not merged here.", PEFT_FIX)
