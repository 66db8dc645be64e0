"""What a layer keeps for its backward, within a budget of bytes; the rest is made again from the layer's input.

What can be kept of a layer, and what each spares (per token; K hidden width, I inner width):

    attention   its output and log-sum-exp   attention's forward, 2 S heads head_dim flops at about half a GEMM's speed
    residual    the sum after attention      the output projection, 2 heads head_dim K flops
    qkv         q, k and v, and head norms'  their projection, 2 K (q + 2 kv) flops
    gate_up     gate and up                  theirs, 4 K I flops

A byte of any of the last three spares K flops; of attention S, twice as slow. So attention goes first where rows are longer
than half the width, and the rest in order of size. Layers at the end come first, since they are kept for the shortest time.
The low-rank products (ranks wide) are always kept. The backward of an op needs no more than these and the layer's input: the
down projection is never computed again.

Source of the idea: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sparktune.models.offload import HostStore

KINDS = ("attention", "residual", "qkv", "gate_up")
ALL = frozenset(KINDS)
NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LayerShape:
    """Widths of a layer in elements a token, and bytes an element of its activations."""

    hidden: int
    q: int
    kv: int
    heads: int
    inner: int
    head_norms: bool
    itemsize: int

    def bytes_of(self, kind: str) -> int:
        """Bytes a token of what `kind` keeps."""
        if kind == "attention":
            return self.q * self.itemsize + 4 * self.heads
        if kind == "qkv":
            return ((self.q + 2 * self.kv) + (self.q + self.kv) * self.head_norms) * self.itemsize
        return (self.hidden if kind == "residual" else 2 * self.inner) * self.itemsize

    def flops_of(self, kind: str, row: int) -> float:
        """Flops a token that keeping `kind` spares, those of attention (causal rows of `row` tokens) at half speed."""
        if kind == "attention":
            return 2.0 * 2 * row * self.q
        if kind == "qkv":
            return 2.0 * self.hidden * (self.q + 2 * self.kv)
        return 2.0 * self.hidden * (self.q if kind == "residual" else 2 * self.inner)


def spend(budget: float, tokens: int, row: int, layers: list[LayerShape]) -> list[frozenset[str]]:
    """What each layer keeps: as much as `budget` bytes hold, most time a byte first, the last layers before the first."""
    offers = [
        (-layer.flops_of(kind, row) / layer.bytes_of(kind), KINDS.index(kind), -i, kind, i)
        for i, layer in enumerate(layers)
        for kind in KINDS
    ]
    kept: list[set[str]] = [set() for _ in layers]
    for *_, kind, i in sorted(offers):
        cost = tokens * layers[i].bytes_of(kind)
        if cost <= budget:
            budget -= cost
            kept[i].add(kind)
    return [frozenset(k) for k in kept]


BUDGET = "_sparktune_memory_budget"  # on a model's backbone: bytes
STORE = "_sparktune_store"  # on it too: a `HostStore`, or None


def set_memory_budget(model: nn.Module, budget: float, *, offload: bool = False) -> None:
    """Let layers keep up to `budget` bytes of activations a batch when gradient checkpointing is on (0: none; inf: all).

    Kept is what spares most time a byte. `offload`: each layer's input waits in pinned host memory, for a GPU that has
    memory of its own. Errors: ValueError for a negative budget, a model without layers of ours, or a device where
    offloading frees nothing.
    """
    if budget < 0:
        raise ValueError(f"a memory budget is 0 bytes or more, got {budget}")
    found: list[Any] = [m for m in model.modules() if any(hasattr(x, "shape_of") for x in _layers(m))]
    if not found:
        raise ValueError(
            "no layer of this model decides what it keeps: patch it first (FastLanguageModel.from_pretrained)"
        )
    for backbone in found:
        object.__setattr__(backbone, BUDGET, float(budget))
        store = HostStore(next(backbone.parameters()).device) if offload else None
        object.__setattr__(backbone, STORE, store)
        for layer in _layers(backbone):
            layer.store = store


def _layers(module: Any) -> list[Any]:
    found = getattr(module, "layers", None)
    return list(found) if isinstance(found, nn.ModuleList) else []


def assign(backbone: Any, batch: int, length: int) -> None:
    """Tell each layer of a backbone what to keep of a batch [batch, length], by its budget."""
    store = getattr(backbone, STORE, None)
    if store is not None:
        store.begin()
    budget = getattr(backbone, BUDGET, 0.0)
    layers = [layer for layer in _layers(backbone) if hasattr(layer, "shape_of")]
    if not layers:
        return
    key = (budget, batch, length)
    if getattr(backbone, "_sparktune_kept_for", None) == key:
        return
    itemsize = next(backbone.parameters()).dtype.itemsize
    kept = spend(budget, batch * length, length, [layer.shape_of(min(4, itemsize)) for layer in layers])
    for layer, keep in zip(layers, kept, strict=True):
        layer.keep = keep
    backbone._sparktune_kept_for = key
