"""Experts in 4 bits: transformers quantises linear layers and leaves the stacks of experts [E, N, K], 9 weights in 10, alone.

bitsandbytes keeps a parameter in 4 bits by a parametrisation, which dequantises it whenever it is read
(`bitsandbytes.nn.parametrize`, its own advice for experts). `sparktune.models.experts` reads the codes beneath it. PEFT 0.21
does not get on with one: it finds no parameter by a part of its name, nests its wrappers in another order than over 16-bit
experts, so that adapters of one don't load over the other, and never takes its own sum off again. So it sees plain parameters
while it puts its wrappers on (`as_plain`), and its forward does not run.

bitsandbytes' quantisation: Dettmers et al., "QLoRA", 2023.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

STACKS = ("gate_up_proj", "down_proj")


def is_quantised(module: Any) -> bool:
    """Whether bitsandbytes keeps one of the stacks in 4 bits."""
    return any(name in getattr(module, "parametrizations", {}) for name in STACKS)


def stacks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that hold experts as stacks, in 4 bits or not."""
    return [m for m in model.modules() if is_quantised(m) or all(_is_stack(m, name) for name in STACKS)]


def _is_stack(module: nn.Module, name: str) -> bool:
    stack = module._parameters.get(name)
    return stack is not None and stack.dim() == 3 and stack.is_floating_point()


def quantise_experts(model: nn.Module, quant_type: str = "nf4", nested: bool = True) -> int:
    """Put the experts' stacks of a loaded model into 4 bits, one after the other, in place; return how many.

    `quant_type` is nf4 or fp4; `nested` quantises the scales too. While one is quantised both its forms are held.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    done = 0
    for module in stacks_of(model):
        for name in STACKS:
            if _is_stack(module, name):
                replace_parameter_4bit(module, name, compress_statistics=nested, quant_type=quant_type)  # type: ignore[arg-type]
                done += 1
    return done


@contextlib.contextmanager
def as_plain(model: nn.Module) -> Iterator[None]:
    """Within, experts in 4 bits look like plain parameters of the right shape, dtype and device, without memory or values."""
    hidden: list[tuple[Any, type, Any]] = []
    for module in list(model.modules()):
        if is_quantised(module):
            whole: Any = module
            kind: type = type(whole)
            parametrizations: Any = whole._modules.pop("parametrizations")
            hidden.append((whole, kind, parametrizations))
            whole.__class__ = kind.__bases__[0]
            for name in parametrizations:
                state = parametrizations[name][0].quant_state
                nothing = torch.empty((), dtype=state.dtype, device=parametrizations[name].original.device)
                whole.register_parameter(name, nn.Parameter(nothing.expand(state.shape), requires_grad=False))
    try:
        yield
    finally:
        for whole, kind, parametrizations in hidden:
            for name in parametrizations:
                del whole._parameters[name]
            whole._modules["parametrizations"] = parametrizations
            whole.__class__ = kind
