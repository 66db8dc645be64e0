"""Whether an engine computes the row's op at all, asked before it is timed: a broken call must not win a race."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparkproof.bench.cases import Call, Case, Inputs

BOUND = 3e-2  # relative L2 in bf16: far above rounding, far below a wrong formula


@dataclass(frozen=True)
class Right:
    """What an engine gave, on one set of inputs: outputs, and the gradient of the first input."""

    outputs: tuple[Tensor, ...]
    gradient: Tensor | None


class WrongResult(Exception):
    """An engine's output or gradient is not the reference's."""


def own(inputs: Inputs) -> Inputs:
    """A copy that a call may write over."""
    return {
        k: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for k, v in inputs.items()
    }


def gradients_for(outputs: tuple[Tensor, ...], seed: int = 5) -> list[Tensor]:
    """An output gradient for each differentiable output: standard normal, and one for a loss."""
    found = []
    for j, y in enumerate(outputs):
        if not y.requires_grad:
            continue
        if y.dim() == 0:
            found.append(torch.ones_like(y))
            continue
        g = torch.Generator(y.device).manual_seed(seed + j)
        found.append(torch.randn(y.shape, device=y.device, dtype=torch.bfloat16, generator=g).to(y.dtype))
    return found


def run(case: Case, call: Call, inputs: Inputs | None = None) -> Right:
    """One call and its gradient, on a copy of the inputs; without any on the first set, made anew, since logits are large."""
    mine = case.make(0) if inputs is None else own(inputs)
    outputs = called(case, call, mine)
    kept = tuple(y.detach().clone() for y in outputs)
    gradient = None
    if case.grads:
        through = [y for y in outputs if y.requires_grad]
        gradient = torch.autograd.grad(through, mine[case.grads[0]], gradients_for(outputs))[0]
    return Right(kept, gradient)


def called(case: Case, call: Call, inputs: Inputs) -> tuple[Tensor, ...]:
    """One call, under autocast where the row's op runs so."""
    if not case.autocast:
        return call(inputs)
    with torch.autocast(case.device.type, torch.bfloat16):
        return call(inputs)


def distance(got: Tensor, want: Tensor) -> float:
    """Relative L2; infinite where shapes differ or something is not finite."""
    if got.shape != want.shape:
        return float("inf")
    total, off = 0.0, 0.0
    got, want = got.reshape(-1), want.reshape(-1)
    for at in range(0, max(1, got.numel()), 2**28):  # fp32 copies of whole logits would not fit
        a, b = got[at : at + 2**28].float(), want[at : at + 2**28].float()
        off += float((a - b).square().sum(dtype=torch.float64))
        total += float(b.square().sum(dtype=torch.float64))
    found = (off / max(total, 1e-30)) ** 0.5
    return found if found == found else float("inf")


def finite(right: Right) -> bool:
    """Whether every output and the gradient is."""
    every = right.outputs if right.gradient is None else (*right.outputs, right.gradient)
    return all(bool(t.isfinite().all()) for t in every)


def check(right: Right, reference: Right) -> tuple[float, float | None]:
    """(worst output's, gradient's) relative L2. Errors: WrongResult past the bound."""
    if len(right.outputs) != len(reference.outputs):
        raise WrongResult(f"it gives {len(right.outputs)} outputs, the reference {len(reference.outputs)}")
    forward = max(distance(a, b) for a, b in zip(right.outputs, reference.outputs, strict=True))
    if forward > BOUND:
        raise WrongResult(f"its output is {forward:.1e} from the reference (relative L2, at most {BOUND})")
    if right.gradient is None or reference.gradient is None:
        return forward, None
    backward = distance(right.gradient, reference.gradient)
    if backward > BOUND:
        raise WrongResult(f"its gradient is {backward:.1e} from the reference (relative L2, at most {BOUND})")
    return forward, backward
