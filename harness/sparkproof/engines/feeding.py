"""The same two rows fed in three ways that must give the same step: side by side, packed into one row, one after another.

Packed, the second row's positions start again, which is how transformers and the engines are told that it is a document of
its own. One after another, each loss is divided by the tokens of both (`num_items_in_batch`), as a trainer does that
accumulates gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparkproof.data.rows import IGNORE, Batch, Row, collate
from sparkproof.engines.base import LoadSpec, lora_parameters
from sparkproof.engines.loop import to_device


def unlike_rows(batches: Sequence[Batch]) -> tuple[Row, ...]:
    """The rows with the most and with the fewest tokens to learn, without their padding.

    Equal numbers would hide a mean that is taken row by row: where all rows have the same, one keeps its first label alone.
    None where no row has a token to learn.
    """
    rows = [
        Row(tuple(ids[:n]), tuple(labels[:n]))
        for b in batches
        for ids, mask, labels in zip(b.input_ids, b.attention_mask, b.labels, strict=True)
        if (n := sum(mask))
    ]
    rows = [row for row in rows if row.learnt]
    if not rows:
        return ()
    few, most = min(rows, key=lambda r: r.learnt), max(rows, key=lambda r: r.learnt)
    if few.learnt == most.learnt > 1:
        first = next(i for i, label in enumerate(few.labels) if i and label != IGNORE)
        few = Row(few.ids, tuple(label if i == first else IGNORE for i, label in enumerate(few.labels)))
    return most, few


def three_ways(model: nn.Module, rows: Sequence[Row], spec: LoadSpec) -> dict[str, dict[str, float]]:
    """Way ('packed', 'accumulated') -> `loss`, nats from the padded batch's, and `relative`, L2 of the LoRA gradients.

    Both are infinite without rows: nothing was compared.
    """
    if not rows:
        return {way: {"loss": math.inf, "relative": math.inf} for way in ("packed", "accumulated")}
    model.train()
    padded = to_device(collate(rows, pad=0), spec.device)
    tokens = torch.tensor(sum(row.learnt for row in rows), device=spec.device)
    each = [to_device(collate([row], pad=0), spec.device) for row in rows]
    loss, grads = _step(model, [padded], spec)
    found = {}
    for way, inputs in {
        "packed": [_packed(rows, spec.device)],
        "accumulated": [{**one, "num_items_in_batch": tokens} for one in each],
    }.items():
        other, others = _step(model, inputs, spec)
        found[way] = {"loss": _apart(other, loss), "relative": _relative(others, grads)}
    model.zero_grad(set_to_none=True)
    return found


def _packed(rows: Sequence[Row], device: str) -> dict[str, Tensor]:
    """One row [1, tokens]; nothing may predict the first token of a document."""
    labels = [(IGNORE, *row.labels[1:]) for row in rows]
    return {
        "input_ids": torch.tensor([[i for row in rows for i in row.ids]], device=device),
        "position_ids": torch.tensor([[i for row in rows for i in range(len(row.ids))]], device=device),
        "labels": torch.tensor([[i for row in labels for i in row]], device=device),
    }


def _step(model: nn.Module, inputs: Sequence[dict[str, Tensor]], spec: LoadSpec) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for one in inputs:
        with spec.autocast():
            loss: Any = model(**one, use_cache=False).loss
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.float().clone() for n, p in lora_parameters(model).items() if p.grad is not None}


def _relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Over all tensors as one vector; infinite where their names differ or there is nothing."""
    if not theirs or ours.keys() != theirs.keys():
        return math.inf
    error = sum(float((ours[n] - g).double().square().sum()) for n, g in theirs.items())
    norm = sum(float(g.double().square().sum()) for g in theirs.values())
    return math.sqrt(error / norm) if norm else math.inf


def _apart(ours: float, theirs: float) -> float:
    return abs(ours - theirs) if math.isfinite(ours) and math.isfinite(theirs) else math.inf
