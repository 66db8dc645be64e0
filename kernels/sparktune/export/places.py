"""Where the updates of an adapter go in a base's files, whose names are not always those of the model in memory.

transformers renames some tensors as it loads them, and stacks a layer's experts into one tensor each for gate and up
([E, 2 N, K]) and for down ([E, K, N]). PEFT's names are those in memory; the files' are the hub's:

    mixtral     model.layers.0.mlp.experts.gate_up_proj      model.layers.0.block_sparse_moe.experts.E.w1 and w3
    qwen3_moe   the same                                     model.layers.0.mlp.experts.E.gate_proj and up_proj
    gpt_oss     the same, stored as [E, K, 2 N]              model.layers.0.mlp.experts.gate_up_proj
    gemma3      model.language_model.layers.0...             language_model.model.layers.0...

PEFT's LoRA on a stack has A [E r, K] with the experts one after the other, and B [N, r E] with them interleaved
(`peft.tuners.lora.layer.ParamWrapper.get_delta_weight`). Two stacks of one module are nested wrappers; the shapes tell
which is which.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparktune.export.files import ExportError

RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"\.mlp\.", ".block_sparse_moe."),
)
PARTS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}


@dataclass(frozen=True)
class Place:
    """One tensor of the base and what it takes: a module's update, or a part of a stack's."""

    source: str  # the adapter's module, or tensor trained whole
    experts: int = 1
    expert: int | None = None  # None: all of a stack, or no stack
    part: str = ""  # gate or up: half of the rows
    transposed: bool = False  # a stack stored as [E, in, out]
    parameter: str = ""  # a stack's own name in memory, which `alpha_pattern` speaks of

    def merge(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, name: str) -> torch.Tensor:
        """`weight` + scale * B A, fp32. Errors: ExportError when the shapes differ."""
        if self.experts == 1:
            _check(name, weight.shape, (b.shape[0], a.shape[1]))
            return torch.addmm(weight.float(), b, a, alpha=scale)
        if self.expert is not None:
            one_a, one_b = self.of_expert(a, b)
            _check(name, weight.shape, (one_b.shape[0], one_a.shape[1]))
            return torch.addmm(weight.float(), one_b, one_a, alpha=scale)
        merged = weight.float() if weight.dtype != torch.float32 else weight.clone()
        for e in range(self.experts):
            one_a, one_b = self._of(e, a, b)
            update = (one_b @ one_a).T if self.transposed else one_b @ one_a
            _check(name, weight.shape[1:], tuple(update.shape))
            merged[e].add_(update, alpha=scale)
        return merged

    def of_expert(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] of a place that is one expert's."""
        assert self.expert is not None
        one_a, one_b = self._of(self.expert, a, b)
        return one_a, one_b.chunk(2)[self.part == "up"] if self.part in ("gate", "up") else one_b

    def _of(self, expert: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] of one expert."""
        return a.view(self.experts, -1, a.shape[1])[expert], b.view(b.shape[0], -1, self.experts)[:, :, expert]


def find_places(
    pairs: Mapping[str, tuple[int, int, int]],
    whole: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
) -> tuple[dict[str, Place], list[str]]:
    """(place by the base's tensor, what has none), for `pairs` of module -> (out, in, rows of A) and tensors of `whole`."""
    places: dict[str, Place] = {}
    lost: list[str] = []
    for source in [*pairs, *whole]:
        found = None
        if source in pairs and (module := re.sub(r"(\.base_layer)+$", "", source)).endswith(".experts"):
            found = _of_stack(source, module, pairs[source], shapes, config)
        else:
            stored = stored_name(source if source in whole else f"{source}.weight", shapes)
            if stored is not None:
                found = {stored: Place(source)}
        if not found:
            lost.append(source)
        for name, place in (found or {}).items():
            if name in places:
                raise ExportError(f"Two updates of the adapter are for {name}.", "Give the folder that PEFT wrote.")
            places[name] = place
    return places, sorted(lost)


def _of_stack(
    source: str, module: str, size: tuple[int, int, int], shapes: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Place] | None:
    """The tensors that hold the experts of one stack, or None."""
    out, inner, rows = size
    text = config.get("text_config") or config
    experts = next((int(text[k]) for k in ("num_local_experts", "num_experts", "n_routed_experts") if text.get(k)), 0)
    if not experts or rows % experts:
        return None
    for stack in ("gate_up_proj", "down_proj"):  # one tensor for all experts
        name = stored_name(f"{module}.{stack}", shapes)
        transposed = text.get("model_type") == "gpt_oss"
        if name and shapes[name] == ((experts, inner, out) if transposed else (experts, out, inner)):
            return {name: Place(source, experts, transposed=transposed, parameter=f"{module}.{stack}")}
    found: dict[str, Place] = {}
    for expert, (part, names) in itertools.product(range(experts), PARTS.items()):
        wanted = (out, inner) if part == "down" else (out // 2, inner)
        for name in names:
            stored = stored_name(f"{module}.{expert}.{name}.weight", shapes)
            if stored and shapes[stored] == wanted:
                stack = "down_proj" if part == "down" else "gate_up_proj"
                found[stored] = Place(source, experts, expert, part, parameter=f"{module}.{stack}")
    return found if len(found) in (experts, 2 * experts) else None


def stored_name(name: str, shapes: Mapping[str, Any]) -> str | None:
    """The base's name for a tensor, or None."""
    return next((n for n in _candidates(name) if n in shapes), None)


def _candidates(name: str) -> Iterator[str]:
    yield name
    for old, new in RENAMES:
        renamed = re.sub(old, new, name)
        if renamed != name:
            yield renamed


def _check(name: str, stored: Sequence[int], wanted: tuple[int, ...]) -> None:
    if tuple(stored) != wanted:
        raise ExportError(
            f"The adapter's {name} is for a {' x '.join(map(str, wanted))} weight, the base's is "
            f"{' x '.join(map(str, stored))}.",
            "Give the base model that the adapter was trained on.",
        )
