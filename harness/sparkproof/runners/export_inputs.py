"""Transformers multiplying as llama.cpp does: where a weight is quantised, its product's other side is rounded to 8 bits first.

ggml has no kernel for fp32 times four bits. It rounds the input of each product, a block at a time, to 8-bit integers: 32 numbers
to Q8_0 beside the older types, 256 to Q8_K beside K-quants. Next to a format's own loss that is mostly little, and can look
like a wrong file: of a tiny DeepSeek V3 in q5_k_m it is 0.0115 of the 0.0155 nats that lie between plain transformers over the
file's weights and llama.cpp, most of it at one token of 36.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

BLOCKS = dict.fromkeys(("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4"), 32)
BLOCKS |= dict.fromkeys(("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"), 256)
PRODUCTS = ("linear", "matmul", "mm", "bmm", "grouped_mm", "_grouped_mm")


def blocks_of(names: list[str], kinds: dict[str, str]) -> dict[str, int]:
    """How many numbers share a scale in the input of each parameter's products; 0 where they stay as they are.

    `kinds`: types in the file by the names that a checkpoint has. A model may hold several of its tensors in one, as it
    does experts; what is named so takes the block of what the checkpoint has below the same module.
    """
    found = {}
    for name in names:
        below = name.rpartition(".")[0] + "."
        there = [kinds[name]] if name in kinds else [k for n, k in kinds.items() if n.startswith(below)]
        found[name] = max((BLOCKS.get(k, 0) for k in there), default=0)
    return found


def in_8_bits(x: torch.Tensor, block: int) -> torch.Tensor:
    """x [..., K] in fp32 as llama.cpp's integers give it: `block` numbers share amax / 127, which Q8_0 keeps in fp16."""
    parts = x.unflatten(-1, (-1, block))
    scale = parts.abs().amax(-1, keepdim=True) / 127
    whole = torch.where(scale > 0, parts / scale, 0.0).round()
    kept = scale.half().to(x.dtype) if block == 32 else scale
    return (whole * kept).flatten(-2)


class RoundedInputs(TorchFunctionMode):
    """While it is entered, products with `model`'s quantised weights take their input `in_8_bits`.

    `rounded` names the parameters that were met so.
    """

    def __init__(self, model: torch.nn.Module, kinds: dict[str, str]) -> None:
        """`kinds`: the types of a checkpoint's tensors in the file."""
        super().__init__()
        held = dict(model.named_parameters())
        blocks = blocks_of(list(held), kinds)
        self.by_storage = {_where(p): (name, blocks[name]) for name, p in held.items() if blocks[name] and p.dim() > 1}
        self.rounded: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Round the first operand of a product whose second is one of the weights, or a part or transpose of one."""
        if getattr(func, "__name__", "") in PRODUCTS and len(args) > 1 and isinstance(args[1], torch.Tensor):
            name, block = self.by_storage.get(_where(args[1]), ("", 0))
            if block and args[0].shape[-1] % block == 0:
                self.rounded.add(name)
                args = (in_8_bits(args[0], block), *args[1:])
        return func(*args, **(kwargs or {}))


def _where(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()
