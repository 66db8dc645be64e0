"""Many parameters as one flat one, for optimisers that launch a kernel for each parameter.

LoRA on seven projections of 32 layers is 448 tensors. Here they become views of one buffer, and so do their gradients at the
end of each backward pass, so that bitsandbytes' or PyTorch's optimiser sees a single parameter. `sparktune.optim.AdamW8bit`
needs none of this: it takes all tensors in two launches as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class FlatParameters:
    """Parameters of one dtype and device as views of `parameter`, a flat `nn.Parameter`.

    The parameters stay leaves of their own, under their own names; values written to either are the other's. Call `watch`
    on each loss before its backward pass: when that ends, gradients have moved into `parameter.grad` (added to what is
    there) and the parameters' own `grad` is None again. Errors: ValueError for parameters that differ in dtype or device,
    or for none.
    """

    ALIGN = 256  # elements: a block of 8-bit moments then never spans two parameters

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        kinds = {(p.dtype, p.device) for p in self.parameters}
        if len(kinds) != 1:
            found = ", ".join(sorted(f"{d} on {v}" for d, v in kinds)) or "none"
            raise ValueError(f"FlatParameters: wanted trained parameters of one dtype and device, got {found}")
        dtype, device = kinds.pop()
        sizes = [-(-p.numel() // self.ALIGN) * self.ALIGN for p in self.parameters]
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self._places: list[tuple[int, int]] = []
        start = 0
        for p, size in zip(self.parameters, sizes, strict=True):
            place = buffer[start : start + p.numel()].view(p.shape)
            place.copy_(p.detach())
            p.data = place
            self._places.append((start, p.numel()))
            start += size
        self.parameter = nn.Parameter(buffer)

    def watch(self, loss: Tensor) -> Tensor:
        """`loss` itself; its backward pass ends with `gather`."""

        def begun(grad: Tensor) -> None:
            engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.queue_callback(self.gather)

        loss.register_hook(begun)
        return loss

    @torch.no_grad()
    def gather(self) -> None:
        """Move the parameters' gradients into `parameter.grad`."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        into, grads = [], []
        for p, (start, count) in zip(self.parameters, self._places, strict=True):
            if p.grad is not None:
                into.append(self.parameter.grad[start : start + count].view(p.shape))
                grads.append(p.grad)
                p.grad = None
        if into:
            torch._foreach_add_(into, grads)
