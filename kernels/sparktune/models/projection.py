"""What a linear layer of a model is made of, so that several can run as one matrix product: weight, bias and LoRA.

PEFT puts a `lora.Linear` or `lora.Linear4bit` in a projection's place; `Projection.of` reads both kinds and plain ones. What
it can't express (DoRA, several adapters at once, a trained base weight, hooks ...) raises `Unfit` with the reason; the
caller then runs the modules one by one, which is right and slower, and `fallbacks()` says so.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparktune.ops.weights import Weight

log = logging.getLogger("sparktune")


class Unfit(Exception):
    """A module can't run inside a fused op; the message says why."""


@dataclass(frozen=True)
class Projection:
    """y = x W^T + bias + scale dropout(x) A^T B^T: W [N, K] frozen, A [r, K] and B [N, r] or neither."""

    weight: Weight
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def adapter(self) -> tuple[Tensor, Tensor] | None:
        """(A, B), or None."""
        return None if self.a is None or self.b is None else (self.a, self.b)

    @classmethod
    def of(cls, module: Any) -> Projection:
        """Read a linear layer, with its active adapter if it has one. Errors: Unfit."""
        base = getattr(module, "base_layer", module)
        weight = _weight(base)
        bias = base.bias
        unhooked(module)
        lora = None if base is module else active_lora(module)
        if lora is None:
            return cls(weight, bias)
        return cls(weight, bias, *lora)


def active_lora(module: Any) -> tuple[Tensor, Tensor, float, float] | None:
    """A [r, K], B [N, r], scale and dropout of the one active adapter that PEFT put around a linear layer; None where it
    is switched off. Errors: Unfit for what a product of A and B doesn't say."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        raise Unfit(f"its adapter is a {type(module).__name__}, not LoRA")
    if module.merged:
        raise Unfit("its adapter is merged into the weight")
    active = [n for n in module.active_adapters if n in module.lora_A]
    if module.disable_adapters or not active:
        return None
    if len(active) > 1:
        raise Unfit(f"{len(active)} adapters are active at once")
    name = active[0]
    a, b = module.lora_A[name], module.lora_B[name]
    if name in module.lora_variant or module.use_dora.get(name, False):
        raise Unfit("it has DoRA or another variant of LoRA")
    if b.bias is not None or a.bias is not None:
        raise Unfit("its LoRA has a bias")
    if getattr(module, "fan_in_fan_out", False):
        raise Unfit("its weight is stored as [in, out]")
    drop = module.lora_dropout[name]
    dropout = float(drop.p) if isinstance(drop, nn.Dropout) and module.training else 0.0
    return a.weight, b.weight, float(module.scaling[name]), dropout


def unhooked(module: nn.Module) -> None:
    """Errors: Unfit for a module whose hooks, or whose own forward, a fused op would pass by."""
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        raise Unfit("it has hooks, or a forward of its own on the instance")


def _weight(base: Any) -> Weight:
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not isinstance(base, nn.Linear):
        raise Unfit(f"it is a {type(base).__name__}, not a linear layer")
    if weight.requires_grad:
        raise Unfit("its weight is trained")
    state = getattr(weight, "quant_state", None)
    if state is not None:
        if getattr(state, "packing_format_for_cpu", False):
            raise Unfit("its weight was repacked for AVX512-BF16")
        if tuple(state.shape) != (base.out_features, base.in_features):
            raise Unfit(f"its weight is stored as {tuple(state.shape)}, not [out, in]")
    elif not weight.is_floating_point():
        raise Unfit(f"its weight has the type {weight.dtype}")
    return Weight.of(base)


def common_dropout(*parts: Projection) -> float:
    """The dropout of all parts that have LoRA. Errors: Unfit where they differ."""
    found = {p.dropout for p in parts if p.a is not None}
    if len(found) > 1:
        raise Unfit(f"its layers have different dropouts: {sorted(found)}")
    return found.pop() if found else 0.0


_lock = threading.Lock()
_fallbacks: dict[str, int] = {}


def note_fallback(what: str, why: object) -> None:
    """Count a call that ran module by module, and say so the first time."""
    reason = f"{what}: {why}"
    with _lock:
        first = reason not in _fallbacks
        _fallbacks[reason] = _fallbacks.get(reason, 0) + 1
    if first:
        log.warning("sparktune runs %s module by module: %s.", what, why)


def fallbacks() -> dict[str, int]:
    """Reason -> how many calls ran module by module instead of fused since the last `reset_fallbacks()`; a copy."""
    with _lock:
        return dict(_fallbacks)


def reset_fallbacks() -> None:
    """Forget the counts; a reason is said again."""
    with _lock:
        _fallbacks.clear()
