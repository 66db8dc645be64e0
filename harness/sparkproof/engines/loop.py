"""The training loop that every engine is put through: same batches, same optimiser, same schedule, same clock.

The loss is the engine's own (`model(input_ids, attention_mask, labels).loss`: the mean over learnt tokens), because
engines replace it. The gradient norm is the L2 norm over all trainable parameters before clipping.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from sparkproof.data.rows import Batch
from sparkproof.engines.base import LoadSpec, inference

MAX_GRAD_NORM = 1.0


@dataclass
class Curve:
    """One entry a step."""

    loss: list[float] = field(default_factory=list)  # nats a token
    grad_norm: list[float] = field(default_factory=list)  # before clipping
    seconds: list[float] = field(default_factory=list)  # forward, backward and optimiser, device synchronised
    tokens: list[int] = field(default_factory=list)  # real tokens, padding not counted

    def to_json(self) -> dict[str, Any]:
        """Four lists of equal length."""
        return asdict(self)


def rate(step: int, steps: int) -> float:
    """Fraction of the peak learning rate at `step` (from 0): up over a tenth of the steps, then linearly to a tenth."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 1.0 - 0.9 * (step - warm) / max(1, steps - warm)


def make_deterministic(seed: int) -> None:
    """Ask torch for the same bits each time; kernels that can't give them only warn, and the repeat then shows it."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False


def to_device(batch: Batch, device: str) -> dict[str, torch.Tensor]:
    """The batch as int64 tensors [rows, tokens]."""
    return {
        "input_ids": torch.tensor(batch.input_ids, device=device),
        "attention_mask": torch.tensor(batch.attention_mask, device=device),
        "labels": torch.tensor(batch.labels, device=device),
    }


def forward_backward(model: nn.Module, batch: Batch, spec: LoadSpec) -> float:
    """One loss and its gradients, added to `.grad`."""
    with spec.autocast():
        loss = model(**to_device(batch, spec.device)).loss
    loss.backward()
    return float(loss.detach())


def token_losses(model: nn.Module, batch: Batch, spec: LoadSpec) -> list[float]:
    """Cross entropy of each token that has a label, in nats, row by row; fp32 from the logits on, nothing learnt.

    The model does not see the labels: with them, in training, Liger makes no logits.
    """
    import torch

    inputs = to_device(batch, spec.device)
    labels = inputs.pop("labels")[:, 1:].reshape(-1)
    with torch.no_grad(), spec.autocast():
        logits = model(**inputs).logits
    flat = logits[:, :-1].reshape(labels.numel(), -1).float()
    losses = torch.nn.functional.cross_entropy(flat, labels, reduction="none", ignore_index=-100)
    return [float(x) for x in losses[labels != -100]]


def evaluate(model: nn.Module, batch: Batch, spec: LoadSpec) -> float:
    """Mean loss of a batch, nothing learnt."""
    with inference(model), spec.autocast():
        return float(model(**to_device(batch, spec.device)).loss)


def train_steps(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    total_steps: int,
    learning_rate: float,
    spec: LoadSpec,
    tell: Callable[[str], None] = lambda text: None,
) -> Curve:
    """Train on each batch in turn; `total_steps` sets the schedule, so that a shorter repeat follows the same one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    curve = Curve()
    model.train()
    for step, batch in enumerate(batches):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate(step, total_steps)
        optimizer.zero_grad(set_to_none=True)
        loss = forward_backward(model, batch, spec)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))
        optimizer.step()
        if spec.device == "cuda":
            torch.cuda.synchronize()
        curve.seconds.append(time.perf_counter() - start)
        curve.loss.append(loss)
        curve.grad_norm.append(norm)
        curve.tokens.append(batch.tokens)
        tell(f"step {step + 1}/{len(batches)} loss {loss:.2f}")
    return curve
