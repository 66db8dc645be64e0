"""`AdamW8bit`: bitsandbytes' optimiser in two launches a step, with gradient clipping inside.

bitsandbytes launches a kernel for each tensor, 448 for LoRA on all seven projections of 32 layers, and clipping before
it reads and writes every gradient. Here one launch takes the norm and one updates all tensors of a parameter group and
dtype; the maths is in `sparktune.ops.adamw8bit`. Checkpoints are bitsandbytes': either loads the other's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparktune.ops.adamw8bit import adamw8bit_
from sparktune.ops.dynamic_map import tables
from sparktune.ops.flat import Flat, Hyper

WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes hides its state from FSDP
STATE = ("state1", "state2", "absmax1", "absmax2")


class AdamW8bit(Optimizer):
    """AdamW with 8-bit moments for tensors of `min_8bit_size` elements or more, fp32 moments for smaller ones and for the
    parameters listed in `fp32_moments` (embeddings, say, whose rare rows 8 bits suit badly: Dettmers et al. 2022).

    `max_norm` clips the gradients' global norm inside the step, as `torch.nn.utils.clip_grad_norm_` before it would, but
    leaves `.grad` as it was; None for no clipping, or for clipping that is done elsewhere. With `skip_nonfinite` a step
    whose norm is infinite or NaN changes nothing and does not count; without it NaN spreads as it does in PyTorch.

    Parameters must be contiguous, fp32, bf16 or fp16, and on one device; frozen ones are passed over. A step fetches
    nothing to the host and may be captured by a CUDA graph after one step outside it; a captured `lr` changes only if it
    is a tensor (one fp32 element on the device), which schedulers fill in place. Errors: ValueError for settings out of
    range, for parameters as above, and for a checkpoint that does not fit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
        skip_nonfinite: bool = True,
        min_8bit_size: int = 4096,
        fp32_moments: Iterable[Tensor] = (),
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not float(value) >= 0:
                raise ValueError(f"AdamW8bit: {name} must be 0 or more, got {float(value)}")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"AdamW8bit: betas must be two numbers from 0 to below 1, got {betas}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"AdamW8bit: max_norm must be above 0, or None, got {max_norm}")
        self.max_norm, self.skip_nonfinite, self.min_8bit_size = max_norm, skip_nonfinite, min_8bit_size
        self.fp32_moments = tuple(fp32_moments)
        self._flat: Flat | None = None
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        flat = self._current()
        if flat is not None:
            hyper = [
                Hyper(_lr(g["lr"]), float(g["betas"][0]), float(g["betas"][1]), float(g["eps"]), float(g["weight_decay"]))
                for g in self.param_groups
            ]  # fmt: skip
            limit = float("inf") if self.max_norm is None else float(self.max_norm)
            adamw8bit_(flat, [p.grad for p in flat.params], hyper, limit, self.skip_nonfinite)
        return loss

    @property
    def grad_norm(self) -> Tensor | None:
        """The last step's global norm before clipping, on the device: the next step overwrites it. None before the first."""
        return None if self._flat is None else self._flat.norm

    @property
    def skipped(self) -> Tensor | None:
        """How many steps were skipped for a norm that was not finite, on the device. None before the first step."""
        return None if self._flat is None else self._flat.skipped

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state in bitsandbytes' format; parameters that were never updated are left out. Waits for the GPU."""
        found = super().state_dict()
        found["state"] = {k: copy for k, s in found["state"].items() if (copy := self._copy(s))}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a `state_dict` of this class or of bitsandbytes' AdamW8bit, on whatever device it lies."""
        saved, groups = state_dict["state"], state_dict["param_groups"]
        super().load_state_dict({**state_dict, "state": {}})
        self._flat = None
        ids = itertools.chain.from_iterable(g["params"] for g in groups)
        params = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        for id_, p in zip(ids, params, strict=True):
            if saved.get(id_):
                self.state[p] = _entry(saved[id_], p)
        if self.state:
            self._current()

    def __getstate__(self) -> dict[str, Any]:
        names = ("max_norm", "skip_nonfinite", "min_8bit_size", "fp32_moments")
        more = {name: getattr(self, name) for name in names}
        state = {p: copy for p, s in self.state.items() if (copy := self._copy(s))}
        return super().__getstate__() | more | {"state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._flat = None

    def _current(self) -> Flat | None:
        """The flat buffers, made anew when parameters were added, unfrozen or moved; state is carried over."""
        found = [(p, k) for k, g in enumerate(self.param_groups) for p in g["params"] if p.requires_grad]
        params = [p for p, _ in found]
        flat = self._flat
        if flat is not None and flat.holds(params):
            return flat
        if not params:
            return None
        bits = []
        for p in params:
            known = self.state[p].get("state1") if p in self.state else None
            small = p.numel() < self.min_8bit_size or any(p is listed for listed in self.fp32_moments)
            full = small if known is None else known.dtype == torch.float32
            bits.append(32 if full else 8)
        flat = Flat(params, [k for _, k in found], bits)
        for i, p in enumerate(params):
            views = dict(zip(STATE, flat.state(i), strict=False))
            if "state1" in self.state.get(p, {}):
                for name, view in views.items():
                    view.copy_(self.state[p][name].reshape(view.shape))
                flat.steps[i] = self.state[p]["step"]
            maps = dict(zip(("qmap1", "qmap2"), tables(flat.device), strict=False)) if bits[i] == 8 else {}
            self.state[p] = {"step": flat.steps[i], **views, **maps}
        self._flat = flat
        return flat

    def _copy(self, entry: dict[str, Any]) -> dict[str, Any]:
        """One parameter's state on its own, without the flat buffers; empty when it was never updated."""
        step = int(entry["step"]) if entry else 0
        if not step:
            return {}
        return {"step": step} | {
            k: v.detach().clone() for k, v in entry.items() if isinstance(v, Tensor) and k != "step"
        }


def _lr(lr: float | Tensor) -> float | Tensor:
    return lr.float() if isinstance(lr, Tensor) and lr.is_cuda else float(lr)


def _entry(saved: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """One parameter's saved state, checked against the parameter."""
    flat = {k: v for k, v in saved.items() if k != WRAPPED} | saved.get(WRAPPED, {})
    eight = "state1" in flat and flat["state1"].dtype == torch.uint8
    names = STATE if eight else STATE[:2]
    wanted = {
        "state1": p.numel(),
        "state2": p.numel(),
        "absmax1": -(-p.numel() // 256),
        "absmax2": -(-p.numel() // 256),
    }
    for name in ("step", *names):
        if name not in flat:
            raise ValueError(f"AdamW8bit: the checkpoint has no {name!r} for a parameter; it has {', '.join(flat)}")
    for name in names:
        if flat[name].numel() != wanted[name]:
            raise ValueError(
                f"AdamW8bit: the checkpoint's {name} has {flat[name].numel()} elements, {wanted[name]} are needed"
            )
    for name, own in zip(("qmap1", "qmap2"), tables(torch.device("cpu")), strict=False):
        if eight and name in flat and not torch.equal(flat[name].float().cpu(), own):
            raise ValueError(f"AdamW8bit: the checkpoint's {name} is another map than the dynamic one")
    return {k: flat[k] for k in ("step", *names)}
