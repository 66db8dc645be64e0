"""Bytes and milliseconds of one QLoRA step of sparktune's own layers, part by part.

Time is the sum of products and attention at the device's rates and of everything else at the speed of a copy; nothing is
assumed to overlap. Memory is what lies there between steps (weights, embeddings, LoRA with gradients and moments), each
layer's input and what the budget keeps of it and of its weights, and the largest set of buffers besides, which the backward
of a layer's MLP or the loss has; what the last layer keeps for nothing is among these. Flops of a product [M, K] x [K, N] are
2 M N K; of causal attention over rows of S tokens 2 M S width.

Sources: Dettmers et al., "QLoRA", 2023 (bytes of NF4 with nested scales); Williams et al., "Roofline", 2009.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sparktune.models.checkpointing import INPUT, NONE, NORMS, WEIGHTS, leaving, spare, spend, strip_kinds
from sparktune.ops.lora_packed import behind
from sparktune.planning.ceilings import DEVICES, Ceilings
from sparktune.planning.shapes import ModelShape

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: codes, 8-bit scales, their fp32 scales
CHUNK = 16 * 128 * 256  # logits of a loss chunk for each SM, at least 1024 rows


@dataclass(frozen=True)
class Plan:
    """A prediction. `bytes` and `ms` are by part; `kept` says how many layers keep each kind of activation, of gate
    and up in parts of a layer's rows."""

    device: Ceilings
    shape: ModelShape
    batch: int
    sequence: int
    bytes: dict[str, float]
    ms: dict[str, float]
    kept: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Peak allocated, bytes."""
        return sum(self.bytes.values())

    @property
    def step_ms(self) -> float:
        """Milliseconds a step."""
        return sum(self.ms.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return self.batch * self.sequence / self.step_ms * 1e3

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory."""
        return self.peak <= self.device.memory

    def __str__(self) -> str:
        what = "Predicted" if self.device.measured else "Predicted from figures that were not measured"
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"{what}: {self.shape.name}, {self.batch} x {self.sequence} tokens on {self.device.name}: "
            f"{self.peak / 2**30:.2f} GiB ({verdict}), {self.step_ms:.0f} ms a step, {self.tokens_per_s:.0f} tokens/s."
        )


def plan(
    model: Any, device: Ceilings | str = "gb10", *, batch: int = 2, sequence: int = 2048, rank: int = 16,
    budget: float = 0.0, documents: int = 1, load_in_4bit: bool = True, lora_itemsize: int = 4,
    checkpointing: bool = True, offload: bool = False, offload_embedding: bool = False,
) -> Plan:  # fmt: skip
    """Predict a step of `model` (a `ModelShape`, a transformers model or configuration) on a device ("gb10", "h100").

    LoRA of `rank` on all seven projections, its optimiser 8-bit AdamW; `budget` bytes for activations, as
    `set_memory_budget` takes it (inf: all stay, and weights in 16 bits too), of which without `checkpointing` there is none: then
    all activations stay and no weights do. `documents` a row, packed. `offload`, `offload_embedding`: what goes to host memory,
    as `set_memory_budget` and `FastLanguageModel.from_pretrained` take them.
    Errors: ValueError for an unknown device, sizes below 1, a model that is not a dense decoder, or offloading on a device whose
    ceilings have no speed of copies to the host, such as one that shares its memory.
    """
    if isinstance(device, str):
        if device.lower() not in DEVICES:
            raise ValueError(f"no ceilings for '{device}': known are {', '.join(DEVICES)}; give a Ceilings of your own")
        device = DEVICES[device.lower()]
    if min(batch, sequence, rank, documents) < 1:
        raise ValueError("batch, sequence, rank and documents must be 1 or more")
    shape = model if isinstance(model, ModelShape) else ModelShape.of(model)
    tokens, row = batch * sequence, -(-sequence // documents)
    rows = min(tokens, max(1024, CHUNK * device.sms // shape.vocabulary))
    layer = shape.layer(tokens)
    free = spare(tokens, layer, shape.vocabulary, rows)
    if (offload or offload_embedding) and not device.to_host:
        raise ValueError(f"nothing is kept in host memory for {device.name}: leave offload and offload_embedding False")
    layers = [layer] * shape.layers
    # Without checkpointing all stay where they are.
    away = leaving(row, layers, device.to_host / device.gemm) if offload and checkpointing else [NONE] * shape.layers
    kept = spend(budget, tokens, row, layers, free, away) if checkpointing else [layer.all] * shape.layers
    budget = budget if checkpointing else math.inf
    counts = {kind: float(sum(kind in k for k in kept)) for kind in ("attention", "residual", "qkv", WEIGHTS, NORMS)}
    counts["gate_up"] = sum(kind in k for k in kept for kind in strip_kinds(layer.strips)) / layer.strips
    return Plan(
        device, shape, batch, sequence,
        _bytes(shape, tokens, rank, kept, away, load_in_4bit, lora_itemsize, rows, budget, offload_embedding),
        _milliseconds(shape, tokens, row, rank, kept, load_in_4bit, device), counts,
    )  # fmt: skip


def _bytes(
    s: ModelShape,
    tokens: int,
    rank: int,
    kept: list[frozenset[str]],
    away: list[frozenset[str]],
    load_in_4bit: bool,
    lora_itemsize: int,
    rows: int,
    budget: float,
    table_away: bool,
) -> dict[str, float]:
    layer, trained = s.layer(tokens), s.lora_elements(rank) * s.layers
    ranks = {n: -(-c * rank // 16) * 16 for n, c in (("qkv", 3), ("o", 1), ("gate_up", 2), ("down", 1))}
    widths = {
        n: (width, k, behind(k, ranks[n]), behind(width, ranks[n])) for n, (width, k) in s.projections.items()
    }  # fmt: skip
    buffers = {n: (w + ranks[n]) * (k + room) * 2 for n, (w, k, room, _) in widths.items()}
    own = [tokens * sum(layer.bytes_of(kind) for kind in k - {WEIGHTS}) for k in kept]  # of a layer in its backward
    alive = [tokens * sum(layer.bytes_of(kind) for kind in k - a - {WEIGHTS}) for k, a in zip(kept, away, strict=True)]
    stay = min(float(sum(alive)), budget)
    strips = strip_kinds(layer.strips)
    remade = [tokens * sum(layer.bytes_of(kind) for kind in layer.kinds if kind not in {*k, *strips}) for k in kept]
    fed = [tokens * sum(layer.bytes_of(kind) for kind in strips if kind in k) for k in kept]
    one = tokens * layer.bytes_of(strips[0])
    held = [sum(buffers.values()) * (WEIGHTS in k) for k in kept]
    # At the end of the forward everything kept is there beside the loss; in a layer's backward what it and those before keep.
    phases: list[float] = [sum(alive) + rows * (s.vocabulary + s.hidden) * 2 + 3 * tokens * s.hidden * 2]
    forward = tokens * (s.hidden + (s.inner + widths["down"][2]) / layer.strips) * 2 + buffers["down"]
    if layer.strips > 1:
        forward += buffers["gate_up"] + tokens * s.hidden * 2 / layer.strips
    phases.append(sum(alive) + max(0, one - fed[-1]) + forward)
    if any(away):  # what a layer puts there lies here until the next one's MLP
        out = own[-2] - alive[-2] + tokens * s.hidden * 2
        phases.append(sum(alive[:-1]) + out + max(0, one - fed[-2]) + forward)
    for i in range(s.layers):
        written = dict.fromkeys(buffers, 0) if held[i] else buffers
        # Strips that were kept come and go first.
        mlp = max(fed[i], one) + _mlp(s, tokens, widths, written, layer.strips)
        heads = (s.q + s.kv) * (s.head_norms and NORMS not in kept[i])
        attention = tokens * (3 * s.q + 4 * s.kv + 2 * s.hidden + heads) * 2 + written["qkv"] + remade[i]
        if "residual" not in kept[i]:  # made of all that comes before it
            mlp += remade[i] + tokens * heads * 2
        phases.append(sum(alive[:i]) + own[i] - fed[i] + max(mlp, attention))
    return {
        "weights": s.layer_weights * s.layers * (NF4 if load_in_4bit else 2),
        "embedding and head": s.vocabulary * s.hidden * 2 * (1 if s.tied or table_away else 2),
        "LoRA, gradients, moments": trained * (2 * lora_itemsize + 2),
        # One that waits in host memory is here in its layer's backward.
        "layer inputs": tokens * s.hidden * 2 * (sum(INPUT not in a for a in away) + any(away) + 1),
        "low-rank products": tokens * sum(ranks.values()) * 2 * s.layers,
        "kept activations": stay,
        "weights kept in 16 bits": float(sum(held)),
        "temporary": max(phases) - stay,
    }


def _mlp(
    s: ModelShape, tokens: int, widths: dict[str, tuple[int, int, int, int]], buffers: dict[str, int], strips: int
) -> float:  # fmt: skip
    """The most that the backward of a layer's MLP has beside gate and up: the buffers of its weights, and gradients."""
    rows = tokens * s.hidden * 2
    h = tokens * (s.inner + widths["down"][2]) * 2
    if strips > 1:  # one buffer of each serves all; dy, the norm's gradient, and of a strip the norm's rows and h
        return buffers["gate_up"] + buffers["down"] + 2 * rows + (rows + h) / strips
    again = buffers["gate_up"] + 2 * rows  # the second norm's rows, and the gradient that came in
    return float(max(again, h + rows + buffers["down"]))


def _milliseconds(
    s: ModelShape, tokens: int, row: int, rank: int, kept: list[frozenset[str]], load_in_4bit: bool, d: Ceilings
) -> dict[str, float]:
    layer = s.layer(tokens)
    products = 2 * tokens * s.layer_weights * s.layers  # one pass
    again = sum(
        tokens * layer.flops_of(kind, row)
        for k in kept
        for kind in layer.kinds
        if kind not in k and kind != "attention"
    )
    scores = 2 * tokens * row * s.q  # of one layer's causal attention, forward
    attended_again = sum(scores for k in kept if "attention" not in k)
    dense = s.layer_weights * (NF4 + 2) if load_in_4bit else 0.0  # of one layer, once
    times = sum(2 + (layer.strips == 1 and not k >= layer.all) for k in kept if WEIGHTS not in k)
    remade = sum(not k >= layer.all for k in kept) / max(1, s.layers)
    lora = sum(k for _, k in s.projections.values()) + sum(n + k for n, k in s.projections.values())
    # Rows of norms, rotations and activations, read and written: forward, backward, and what is made again.
    once = 2 * 2 * s.hidden + 2 * (s.q + s.kv) + 3 * s.inner
    stays = sum(NORMS in k for k in kept) / max(1, s.layers)
    back = 2 * (6 - 2 * stays) * s.hidden + 2 * (s.q + 2 * s.kv) + 6 * s.inner
    made = (2 * s.hidden + 2 * (s.q + s.kv)) * remade
    return {
        "products": 2 * products / d.gemm * 1e3,
        "products again": again / d.gemm * 1e3,
        "head": 2 * 2 * tokens * s.hidden * s.vocabulary / d.gemm * 1e3,
        "attention": (scores * s.layers + attended_again) / d.attention_forward * 1e3
        + 2.5 * scores * s.layers / d.attention_backward * 1e3,
        "dequantisation": dense * times / d.copy * 1e3,
        "LoRA": (lora * tokens * 2 * s.layers / d.copy + 2 * tokens * s.lora_elements(rank) * s.layers / d.gemm) * 1e3,
        "elementwise": (once + back + made) * tokens * 2 * s.layers / d.copy * 1e3,
        "loss": 5 * tokens * s.vocabulary * 2 / d.copy * 1e3,
        "optimiser": s.lora_elements(rank) * s.layers * (4 + 4 + 4 + 4) / d.copy * 1e3,
    }
