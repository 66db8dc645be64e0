"""What a layer keeps for its backward, within a budget of bytes; the rest is made again from the layer's input.

What can be kept of a layer, and what each spares (per token; K hidden width, I inner width):

    attention   its output and log-sum-exp   attention's forward, 2 S heads head_dim flops at 0.6 of a GEMM's speed
    residual    the sum after attention      the output projection, 2 heads head_dim K flops
    qkv         q, k and v                   their projection, 2 K (q + 2 kv) flops
    gate_up     gate and up                  theirs, 4 K I flops; by strips of rows, see `layer_mlp`

A byte of any of the last three spares K flops; of attention S, slower. So attention goes first where rows are longer than 0.6
of the width, and the rest in order of size. Layers at the end come first, since they are kept for the shortest time.

What is left when all layers keep all four holds weights in 16 bits from one step to the next (`models.held`): a byte of those
spares two and a half bytes of traffic, on an H100 as much time as 700 flops. Then come the norms' rows, a byte of which spares
two. The low-rank products (ranks wide) are always kept. The backward of an op needs no more than these and the layer's input:
the down projection is never computed again.

What the last layer keeps may cost nothing: between its forward and its backward there is only the loss, and where that needs
less room than a layer's backward does (`spare`), the difference is there to be used in every step.

Source of the idea: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparktune.models.offload import HostStore
from sparktune.ops import loss_chunks
from sparktune.ops.device import DeviceProperties

ROOM = 64  # columns beside a norm's row, for LoRA of up to 64 ranks in all and whole lines of 128 bytes
WHOLE = 4096  # rows of a layer's MLP that are not cut: strips would spare less than the weights' buffers that they share take
STRIP = 2048  # of more rows, at once: as fast in products as all of 16384; half as many take a step 1.6% longer (H200)
WEIGHTS = "weights"  # besides: the layer's weights in 16 bits
NORMS = "norms"  # and the rows of both norms, and q and k after the norms of heads
INPUT = "input"  # what everything that is not kept is made of; kept, on the device or in host memory
NONE: frozenset[str] = frozenset()


def strips_of(tokens: int) -> int:
    """Into how many strips of its rows a layer's MLP is cut."""
    return 1 if tokens <= WHOLE else -(-tokens // STRIP)


@functools.cache
def strip_kinds(strips: int) -> tuple[str, ...]:
    """Gate and up of each strip, from the first rows to the last."""
    return tuple(f"gate_up{i}" for i in range(strips))


@functools.cache
def kinds_of(strips: int) -> tuple[str, ...]:
    """What of a layer's activations can be kept, one by one; the last strips first, since they come last and go first."""
    return ("attention", "residual", "qkv", *strip_kinds(strips)[::-1])


@functools.cache
def all_of(strips: int) -> frozenset[str]:
    """All of that."""
    return frozenset(kinds_of(strips))


@dataclass(frozen=True)
class LayerShape:
    """Widths of a layer in elements a token, bytes an element of its activations, and strips of its rows."""

    hidden: int
    q: int
    kv: int
    heads: int
    inner: int
    head_norms: bool
    itemsize: int
    strips: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """What of its activations can be kept."""
        return kinds_of(self.strips)

    @property
    def all(self) -> frozenset[str]:
        """All of it."""
        return all_of(self.strips)

    def bytes_of(self, kind: str) -> float:
        """Bytes a token of what `kind` keeps, on average over all rows."""
        if kind == "attention":
            return self.q * self.itemsize + 4 * self.heads
        if kind == "qkv":
            return (self.q + 2 * self.kv) * self.itemsize
        if kind == NORMS:
            return (2 * (self.hidden + ROOM) + (self.q + self.kv) * self.head_norms) * self.itemsize
        return self.hidden * self.itemsize if kind == "residual" else 2 * self.inner * self.itemsize / self.strips

    @property
    def weights(self) -> int:
        """Elements of the layer's projections."""
        return self.hidden * (2 * self.q + 2 * self.kv + 3 * self.inner)

    @property
    def weight_bytes(self) -> int:
        """Bytes of these in an activation's dtype."""
        return self.weights * self.itemsize

    def flops_of(self, kind: str, row: int) -> float:
        """Flops a token that keeping `kind` spares, those of attention (causal rows of `row` tokens) weighed by its speed.

        Measured on an H100 at 2 x 2048 tokens: cuDNN's attention 417 TFLOP/s, products of a layer's sizes 685.
        """
        if kind == "attention":
            return 2.0 * 1.64 * row * self.q
        if kind == "qkv":
            return 2.0 * self.hidden * (self.q + 2 * self.kv)
        return 2.0 * self.hidden * (self.q if kind == "residual" else 2 * self.inner / self.strips)

    def worth(self, kind: str, row: int) -> float:
        """Flops that a byte of `kind` spares, to a millionth: equal ones are equal."""
        return round(self.flops_of(kind, row) / self.bytes_of(kind), 6)


OVER = 1.2  # a layer's forward over its flops at `HostStore`'s rate: 2.95 ms for 2.4 (Llama-3.1-8B, 2 x 2048, one H200)


def leaving(row: int, layers: list[LayerShape], bytes_a_flop: float) -> list[frozenset[str]]:
    """What each layer's activations go to host memory: its input, and what besides can be copied while the next layer's forward
    runs, `bytes_a_flop` fast, most time a byte first. Of the last layer nothing: its backward comes next.
    """
    found = []
    for layer in layers[:-1]:
        flops = 2.0 * layer.weights + layer.flops_of("attention", row)
        room = OVER * flops * bytes_a_flop - layer.hidden * layer.itemsize
        kinds = {INPUT}
        for kind in sorted(layer.kinds, key=lambda k: -layer.worth(k, row)):
            if layer.bytes_of(kind) <= room:
                room -= layer.bytes_of(kind)
                kinds.add(kind)
        found.append(frozenset(kinds))
    return [*found, NONE] if layers else []


def spend(
    budget: float, tokens: int, row: int, layers: list[LayerShape], spare: float = 0.0,
    leaving: list[frozenset[str]] | None = None,
) -> list[frozenset[str]]:  # fmt: skip
    """What each layer keeps: as much as `budget` bytes hold, most time a byte first, the last layers before the first.

    The last layer keeps up to `spare` bytes besides. What is `leaving` for host memory is kept, and costs none. Where all layers
    keep all kinds, the rest holds `WEIGHTS`, then `NORMS`.
    """
    kept: list[set[str]] = [set(x - {INPUT}) for x in leaving] if leaving else [set() for _ in layers]
    if layers:
        kept[-1] |= _most(spare, tokens, row, layers[-1])
    offers = [
        (-layer.worth(kind, row), layer.kinds.index(kind), -i, kind, i)
        for i, layer in enumerate(layers)
        for kind in layer.kinds
        if kind not in kept[i]
    ]
    for *_, kind, i in sorted(offers):
        cost = tokens * layers[i].bytes_of(kind)
        if cost <= budget:
            budget -= cost
            kept[i].add(kind)
    if all(k >= layer.all for k, layer in zip(kept, layers, strict=True)):
        for kind, (keeps, layer) in itertools.product((WEIGHTS, NORMS), [*zip(kept, layers, strict=True)][::-1]):
            cost = layer.weight_bytes if kind == WEIGHTS else tokens * layer.bytes_of(kind)
            if cost <= budget:
                budget -= cost
                keeps.add(kind)
    return [frozenset(k) for k in kept]


def _most(room: float, tokens: int, row: int, layer: LayerShape) -> frozenset[str]:
    """The kinds that spare most within `room` bytes, all sets tried, with strips from the last one on: the largest kind first
    would leave room unused."""
    each, strips = layer.kinds[: -layer.strips], layer.kinds[-layer.strips :]
    sets = [
        (*kinds, *strips[:count])
        for n in range(len(each) + 1)
        for kinds in itertools.combinations(each, n)
        for count in range(layer.strips + 1)
    ]
    fit = [kinds for kinds in sets if not kinds or tokens * sum(layer.bytes_of(k) for k in kinds) <= room]
    return frozenset(max(fit, key=lambda kinds: sum(layer.flops_of(k, row) for k in kinds)))


def spare(tokens: int, layer: LayerShape, vocabulary: int, chunk: int) -> float:
    """Bytes that a layer's backward has in use and the loss, in chunks of `chunk` rows of logits, has not; 0 or more.

    Of the backward what is there at once when gate and up are made again: all kinds, of gate and up one strip, their
    weights' buffer, the second norm's rows and the output gradient; with several strips the gradient of h, of the norm's rows
    and down's weights too. Of the loss: a chunk of logits and of rows, the model's last rows, those normalised, and their
    gradient.
    """
    rows = tokens * layer.hidden * layer.itemsize
    weights = layer.inner * layer.hidden * layer.itemsize
    backward = tokens * sum(layer.bytes_of(k) for k in layer.kinds[: 1 - layer.strips or None]) + 2 * weights + 2 * rows
    if layer.strips > 1:
        backward += tokens * layer.inner * layer.itemsize / layer.strips + weights + rows / layer.strips
    chunk = min(tokens, chunk)
    loss = chunk * (vocabulary + layer.hidden) * layer.itemsize + 3 * rows
    return max(0.0, float(backward - loss))


BUDGET = "_sparktune_memory_budget"  # on a model's backbone: bytes
STORE = "_sparktune_store"  # on it too: a `HostStore`, or None


def set_memory_budget(model: nn.Module, budget: float, *, offload: bool = False) -> None:
    """Let layers keep up to `budget` bytes of activations a batch when gradient checkpointing is on (0: only what the last
    layer can keep in room that the loss leaves unused; inf: all).

    Kept is what spares most time a byte; what is left after all activations keeps weights in 16 bits. `offload`: each layer's
    input, and of its activations what can be copied without being waited for, wait in pinned host memory, outside the budget, for
    a GPU that has memory of its own. Errors: ValueError for a negative budget, a model without layers of ours, or a device
    where offloading frees nothing.
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
    key = (budget, batch, length, store)
    if getattr(backbone, "_sparktune_kept_for", None) == key:
        return
    first = next(backbone.parameters())
    itemsize = min(4, first.dtype.itemsize)
    shapes, tokens, vocabulary = (
        [layer.shape_of(itemsize, strips_of(batch * length)) for layer in layers],
        batch * length,
        backbone.config.vocab_size,
    )
    logits = loss_chunks.Config.choose(tokens, vocabulary, itemsize, False, 0, DeviceProperties.of(first.device))
    free = spare(tokens, shapes[-1], vocabulary, logits.chunk) if layers[-1] is _layers(backbone)[-1] else 0.0
    away = [NONE] * len(layers) if store is None else leaving(length, shapes, store.bytes_a_flop)
    kept = spend(budget, tokens, length, shapes, free, away)
    for layer, keep, leaves in zip(layers, kept, away, strict=True):
        layer.keep, layer.leaving = keep, leaves
    backbone._sparktune_kept_for = key
