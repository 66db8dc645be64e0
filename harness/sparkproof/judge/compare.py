"""How wrong a result is, and how wrong it may be.

Errors are taken against the float64 oracle: the relative L2 error of the whole tensor, and the worst element's
error relative to the root mean square of its row, so that one wrong element or one wrong small row shows. Plain
PyTorch in the same dtype is held to the same oracle, and a result passes with at most twice its error plus a floor of
a few fp32 roundings. Relative L2 is also capped for each dtype, so that a bad reference excuses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ALLOWED_RATIO = 2.0
# Matrix products add up in whatever order their tiles come, and one rounding of a low-rank factor shows in a whole row:
# over the few hundred elements of a judged size the ratio of two such errors moves by chance (up to 3.1 for the norm and
# 9 for the worst element were seen with nothing wrong).
ALLOWED_RATIO_OF_PRODUCTS = 4.0
ALLOWED_WORST_OF_PRODUCTS = 12.0
FLOOR_WORST_OF_PRODUCTS = 2e-3  # a wrong element is wrong by about 1
FLOOR_L2 = 5e-7
FLOOR_WORST = 3e-6
# Cutting bits off in place of rounding has just twice the error, so it would pass by size alone; but all its errors
# point to zero. In 16 bits, where rounding makes the error, their mean direction is held to chance: this many
# deviations.
BIAS_DEVIATIONS = 6.0
# Relative L2, whatever plain PyTorch's error is. Weight gradients in fp32 sum over rows and get more.
CAP_L2 = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}
CAP_L2_SUM = 1e-4


@dataclass(frozen=True)
class Error:
    """Errors of one result and of plain PyTorch against the oracle."""

    l2: float
    l2_allowed: float
    worst: float
    worst_allowed: float
    bias: float = 0.0
    bias_allowed: float = 1.0

    @property
    def ratio(self) -> float:
        """Error over what is allowed, the largest of the kinds: passes up to 1."""
        return max(self.l2 / self.l2_allowed, self.worst / self.worst_allowed, self.bias / self.bias_allowed)

    def sentence(self) -> str:
        """Both errors with their bounds."""
        return (
            f"relative L2 {self.l2:.2e} (allowed {self.l2_allowed:.2e}), "
            f"worst element {self.worst:.2e} (allowed {self.worst_allowed:.2e}), "
            f"bias {self.bias:.2f} (allowed {self.bias_allowed:.2f})"
        )


def measure(
    result: torch.Tensor, plain: torch.Tensor, oracle: torch.Tensor, *, scale: torch.Tensor | None = None,
    summed: bool = False, exempt_cap: bool = False, computed_in: torch.dtype | None = None, products: bool = False,
    correlated: bool = False,
) -> Error:  # fmt: skip
    """Errors where all three are finite. `scale` is the least a row's root mean square is taken for.

    `computed_in`: dtype of the activations, where the result's is wider. `products`: a result of matrix products, and
    `correlated`: of inputs that are all alike, whose roundings all go one way.
    """
    dtype = result.dtype
    r, p, o = (t.detach().double() for t in (result, plain, oracle))
    finite = torch.isfinite(r) & torch.isfinite(p) & torch.isfinite(o)
    r, p, o = (torch.where(finite, t, 0.0) for t in (r, p, o))
    # Below the dtype's smallest normal number a rounding is no longer relative.
    tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    rms = o.pow(2).mean(-1, keepdim=True).sqrt() if o.dim() else o.abs()
    rms = torch.where(rms > 0, rms, o.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
    if scale is not None:
        rms = torch.maximum(rms, scale.double())
    norm = (o.norm() if scale is None else torch.maximum(o.norm(), scale.double() * o.numel() ** 0.5)).clamp_min(1e-300)
    l2, l2_plain = float((r - o).norm() / norm), float((p - o).norm() / norm)
    worst, worst_plain = (float(((t - o).abs() / rms).max()) for t in (r, p))
    slack_l2 = tiny * o.numel() ** 0.5 / float(norm)
    slack_worst = float((tiny / rms).max())
    ratio = ALLOWED_RATIO_OF_PRODUCTS * (1 + correlated) if products else ALLOWED_RATIO
    allowed = ratio * l2_plain + FLOOR_L2 + slack_l2
    if not exempt_cap:
        cap = CAP_L2_SUM if summed and dtype == torch.float32 else CAP_L2[dtype]
        cap = max(cap, CAP_L2[computed_in or dtype])
        if products:  # several in a row add up their roundings, PyTorch's own too
            cap = max(cap, ALLOWED_RATIO * l2_plain)
        allowed = min(allowed, cap + slack_l2)
    bias, bias_allowed = 0.0, 1.0
    if dtype.itemsize == 2 and not products:  # theirs has no single direction to round in
        bias = _bias(r, o)
        bias_allowed = ALLOWED_RATIO * _bias(p, o) + BIAS_DEVIATIONS / o.numel() ** 0.5
    worst_ratio = ALLOWED_WORST_OF_PRODUCTS if products else ALLOWED_RATIO
    floor = FLOOR_WORST_OF_PRODUCTS if products else FLOOR_WORST
    return Error(l2, allowed, worst, worst_ratio * worst_plain + floor + slack_worst, bias, bias_allowed)


def _bias(r: torch.Tensor, o: torch.Tensor) -> float:
    """Mean error along the oracle's sign over mean error: 1 when all point away from zero, or all to it."""
    error = (r - o) * o.sign()
    return float(error.mean().abs() / error.abs().mean().clamp_min(torch.finfo(torch.float64).tiny))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN payloads and signs of zero included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw = (t.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*raw)


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors lie in one storage, so that writing to one may change the other."""
    return a.numel() > 0 and b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def outside(result: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> int:
    """How many elements lie outside [low, high]; NaN is inside where an end is NaN. Equal ends mean equal values."""
    r, lo, hi = result.detach().double(), low.double(), high.double()
    ok = ((r >= lo) & (r <= hi)) | (r.isnan() & (lo.isnan() | hi.isnan()))
    return int((~ok).sum())


def unlike_nonfinite(result: torch.Tensor, plain: torch.Tensor, oracle: torch.Tensor, kinds: bool = True) -> int:
    """How many elements are NaN, Inf or finite where neither plain PyTorch nor the rounded oracle is so.

    Without `kinds` NaN and both Infs are one: what is Inf in plain PyTorch may be NaN.
    """
    r, p, o = _classes(result), _classes(plain), _classes(oracle.to(result.dtype))
    if not kinds:
        r, p, o = (c.clamp_max(1) for c in (r, p, o))
    return int(((r != p) & (r != o)).sum())


def _classes(t: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 NaN, 2 +Inf, 3 -Inf."""
    t = t.detach()
    return t.isnan().to(torch.int8) + 2 * t.isposinf().to(torch.int8) + 3 * t.isneginf().to(torch.int8)


def degenerate(oracle: torch.Tensor, constant_ok: bool = False) -> str:
    """Why an oracle could prove nothing: not finite, mostly zero, or all one value. Empty when it is sound."""
    if not bool(oracle.isfinite().all()):
        return "not finite"
    if float((oracle != 0).double().mean()) < 0.5:
        return "mostly zero"
    if not constant_ok and oracle.numel() > 1 and bool(oracle.max() == oracle.min()):
        return "all one value"
    return ""
