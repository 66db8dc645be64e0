"""A PEFT adapter as weight updates: W' = W + scale * B A, with scale = alpha / r (alpha / sqrt(r) for rsLoRA).

A is (r, in), B is (out, r), W is (out, in); the product and the sum are done in fp32 and rounded once, by whoever
writes the result. r is read from A itself; alpha from `adapter_config.json`, with its per-module `alpha_pattern`. LoRA on an
embedding is A (r, vocabulary), B (width, r) and W + scale * (B A)^T.

Modules that were trained whole (`modules_to_save`: embeddings and head, usually) replace the base's. LoRA on experts'
stacks (`target_parameters`) is merged expert by expert, whichever way the base stores them (`sparktune.export.places`).
What changes the arithmetic (DoRA, LoRA biases) is refused by name: a merge that leaves a part out gives a model that
nobody trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparktune.export.files import ExportError
from sparktune.export.places import Place, find_places

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
PEFT_FIX = "Merge it with peft's own merge_and_unload() over the 16-bit base."
EMBEDDING = "lora_embedding_"


@dataclass
class Adapter:
    """One LoRA adapter, read whole (it is small)."""

    folder: Path
    config: dict[str, Any]
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]  # module -> (A, B), fp32
    whole: dict[str, torch.Tensor] = field(default_factory=dict)  # tensor of modules_to_save -> its value, fp32
    embeddings: set[str] = field(default_factory=set)  # those of `pairs` that are on an embedding
    places: dict[str, Place] = field(default_factory=dict)  # tensor of the base -> its update, see `check_fits`
    used: set[str] = field(default_factory=set)  # tensors of the base that took their update

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
        whole: dict[str, torch.Tensor] = {}
        embeddings: set[str] = set()
        saved = set(config.get("modules_to_save") or [])
        tied = {"lm_head", "embed_tokens"} if saved and config.get("ensure_weight_tying") else set()  # PEFT writes both
        for name, tensor in tensors.items():
            match = re.fullmatch(rf"(.+)\.(?:lora_|{EMBEDDING})([AB])(?:\.weight)?", name.removeprefix(PREFIX))
            owners = {m for m in saved | tied if f".{name}".rpartition(".")[0].endswith(f".{m}")}
            if name.removesuffix(".base_layer.weight") != name:
                continue  # PEFT may add the embedding that its LoRA is on: the base's own
            if not match and not owners:
                raise ExportError(f"The adapter holds {name}, which is not a plain LoRA matrix.", PEFT_FIX)
            if not torch.isfinite(tensor).all():
                raise ExportError(f"The adapter's {name} is not finite.", "Train again: this run diverged.")
            if match:
                halves.setdefault(match[1], {})[match[2]] = tensor.float()
                if f".{EMBEDDING}" in name:
                    embeddings.add(match[1])
            else:
                whole[name.removeprefix(PREFIX)] = tensor.float()
        for module in saved:
            if not any(f".{name}".rpartition(".")[0].endswith(f".{module}") for name in whole):
                raise ExportError(f"The adapter says modules_to_save={module} and does not hold it.", fix)
        for module, pair in halves.items():
            if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                raise ExportError(f"The adapter's A and B of {module} don't belong together.", fix)
        if not halves:
            raise ExportError(f"The adapter in {folder} holds no LoRA matrices.", fix)
        pairs = {module: (pair["A"], pair["B"]) for module, pair in halves.items()}
        return cls(folder, config, pairs, whole, embeddings)

    def scale(self, module: str, experts: int = 1, parameter: str = "") -> float:
        """alpha / r of one module, or alpha / sqrt(r) with rsLoRA.

        A of a stack of experts holds r rows for each, and its patterns speak of the `parameter`, not of the module.
        """
        rank = self.pairs[module][0].shape[0] // experts
        alpha = float(self.config["lora_alpha"])
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", parameter or module):
                alpha = float(value)
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` in fp32, where it lies, with its update, or what replaces it, if it has one; otherwise as it came.

        `name` is the base's (after `check_fits`) or, of a linear layer, PEFT's.
        """
        place = self.places.get(name) or Place(name if name in self.whole else name.removesuffix(".weight"))
        if place.source in self.whole:
            if weight.shape != self.whole[place.source].shape:
                raise ExportError(
                    f"The adapter's {name} is {list(self.whole[place.source].shape)}, the base's {list(weight.shape)}.",
                    "Give the base model that the adapter was trained on; added tokens are not merged here.",
                )
            self.used.add(name)
            return self.whole[place.source].to(weight.device)
        if place.source not in self.pairs:
            return weight
        a, b = (t.to(weight.device) for t in self.pairs[place.source])
        if place.source in self.embeddings:
            a, b = b.T, a.T
        merged = place.merge(weight, a, b, self.scale(place.source, place.experts, place.parameter), name)
        self.used.add(name)
        return merged

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]], tied: bool, config: Mapping[str, Any]) -> None:
        """Find every update's place among the base's tensors. Errors: ExportError for one that has none.

        A tied model stores its embedding alone, so a head that was trained whole is dropped here if it is the same.
        """
        head, embedding = "lm_head.weight", [n for n in self.whole if n.endswith("embed_tokens.weight")]
        if tied and (head in self.whole or embedding or self.embeddings):
            same = head in self.whole and embedding and torch.equal(self.whole[head], self.whole[embedding[0]])
            if self.embeddings or not same:
                raise ExportError(
                    "The base ties its head to its embedding, and the adapter trained them apart.",
                    "Train with get_peft_model(ensure_weight_tying=True), which keeps them one.",
                )
            if head not in shapes:
                del self.whole[head]
        sizes = {module: (b.shape[0], a.shape[1], a.shape[0]) for module, (a, b) in self.pairs.items()}
        self.places, lost = find_places(sizes, list(self.whole), shapes, config)
        if lost:
            raise ExportError(
                f"The adapter trains {lost[0]}, which the base model does not store"
                f"{f' (and {len(lost) - 1} more)' if len(lost) > 1 else ''}.",
                "Give the base model that the adapter was trained on; a tied lm_head can't take an update of its own.",
            )

    def check_trained(self) -> None:
        """Raise ExportError while B is zero everywhere, as LoRA starts: the export would be the base model."""
        if not self.whole and not any(b.any() for _, b in self.pairs.values()):
            raise ExportError("The adapter's B matrices are all zero: nothing was trained.", "Train before exporting.")

    def check_used(self) -> None:
        """Raise ExportError if an update was never applied: a guard against a merge that forgets."""
        lost = sorted(set(self.places) - self.used)
        if lost:
            raise ExportError(f"{len(lost)} updates of the adapter were never merged, that of {lost[0]} first.")


def _refuse_unsupported(config: dict[str, Any]) -> None:
    kind = str(config.get("peft_type", "LORA"))
    if kind != "LORA":
        raise ExportError(f"The adapter is of type {kind}; only LORA can be merged here.", PEFT_FIX)
    unusual = [
        key
        for key in ("use_dora", "lora_bias", "fan_in_fan_out", "trainable_token_indices", "use_qalora",
                    "alora_invocation_tokens", "arrow_config", "megatron_config", "layer_replication")
        if config.get(key)
    ]  # fmt: skip
    if config.get("bias", "none") != "none":
        unusual.append(f"bias={config['bias']}")
    if unusual:
        raise ExportError(f"The adapter uses {', '.join(unusual)}, which is not merged here.", PEFT_FIX)
