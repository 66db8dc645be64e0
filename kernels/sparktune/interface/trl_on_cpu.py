"""TRL's language-model head on a CPU, where its Triton kernel has no driver.

Since 1.15 TRL's trainers take log-probabilities from a fused head that is a Triton kernel alone, so on a machine without
a GPU no model trains under SFTTrainer. For CPU tensors the same numbers are computed here in plain PyTorch, in fp32, with
all logits at once: for small models and for tests. Tensors on a GPU go to TRL's kernel as before.

With z = softcap(scale h W^T + b) / T, p = softmax(z), over hidden h [N, H], weight W [V, H] and targets t [N]:
log_probs z_t - logsumexp z, entropy -sum p log p, log_sum_sq_probs log sum p^2, mean_logits mean z, is_top1 whether t alone
has the largest z; softcap(x) = c tanh(x / c). Source: the documentation of TRL's `add_fused_lm_head`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

_UTILS, _NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"


def watch(model: nn.Module) -> None:
    """Have the first forward of `model` that asks for TRL's head prepare it for CPU tensors, if `model` is on a CPU.

    At that moment TRL is imported, whatever the order of imports was, and sparktune need not import it.
    """
    if all(p.device.type == "cpu" for p in model.parameters()):
        model.register_forward_pre_hook(_prepare, with_kwargs=True)


def _prepare(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("fused_lm_head"):
        utils = sys.modules.get(_UTILS)
        theirs = getattr(utils, _NAME, None)
        if theirs is not None and not isinstance(theirs, Head):
            setattr(utils, _NAME, Head(theirs))


class Head:
    """In the place of TRL's autograd function: CPU tensors here, others there."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *settings: Any) -> Any:
        """As TRL's: (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N] in fp32 (the last bool)."""
        if hidden.device.type == "cpu":
            return plain(hidden, weight, bias, targets, *settings)
        return self.theirs.apply(hidden, weight, bias, targets, *settings)


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
    softcap: float | None, scale: float, outputs: tuple[str, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See the module. `chunk_size` has nothing to divide here; what `outputs` does not name is None."""
    logits = nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    z = logits.float() * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    z = z / temperature
    log_p = z.log_softmax(-1)
    log_probs = log_p.gather(-1, targets[:, None])[:, 0]
    target = z.gather(-1, targets[:, None])
    with torch.no_grad():
        ties = (z >= target).sum(-1)
    found = {
        "entropy": lambda: -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": lambda: (2 * log_p).logsumexp(-1).detach(),
        "mean_logits": lambda: z.mean(-1).detach(),
        "is_top1": lambda: ties == 1,
    }
    return log_probs, *(make() if name in outputs else None for name, make in found.items())
