"""The model with an adapter's file merged into its weights, in place of the adapter that it carries.

What is merged is what exports read and how they add it (`sparktune.export.lora.Adapter`): the saved tensors, with the scale
that the saved configuration says. Each weight is made anew at every use, so no dense copy of the model is held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparkproof.engines.account import logits
from sparkproof.engines.base import LoadSpec


class Remade(nn.Linear):
    """y = x W^T + b with W [out, in] from a function."""

    def __init__(self, base: Any, make: Callable[[], Tensor]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.bias = base.bias
        self.make = make

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Made now."""
        return self.make()


def merged_account(model: nn.Module, adapter: Path, ids: Sequence[int], spec: LoadSpec) -> dict[str, float]:
    """Relative L2 of logits: `distance` of the merged model from the live one, `effect` of taking the adapter away.

    `model` carries the adapter in `adapter`. Errors: ExportError for an adapter that can't be merged.
    """
    from sparktune.export.lora import Adapter

    saved = Adapter.read(adapter)
    live = logits(model, ids, spec)
    with _without_adapter(model, saved.apply, spec.dtype):
        merged = logits(model, ids, spec)
    with _without_adapter(model, lambda name, weight: weight, spec.dtype):
        bare = logits(model, ids, spec)
    return {name: float((x - live).norm() / live.norm()) for name, x in (("distance", merged), ("effect", bare))}


@contextlib.contextmanager
def _without_adapter(
    model: nn.Module, weight_of: Callable[[str, Tensor], Tensor], dtype: torch.dtype
) -> Iterator[None]:
    """Every layer that PEFT wrapped becomes a plain one with `weight_of(name, its frozen weight in fp32)`."""
    wrapped = {n: m for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")}
    for path, layer in wrapped.items():
        name = f"{path.removeprefix('base_model.model.')}.weight"
        _put(model, path, Remade(layer.base_layer, _maker(layer.base_layer, name, weight_of, dtype)))
    try:
        yield
    finally:
        for path, layer in wrapped.items():
            _put(model, path, layer)


def _maker(
    base: Any, name: str, weight_of: Callable[[str, Tensor], Tensor], dtype: torch.dtype
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        with torch.no_grad():
            return weight_of(name, _dense(base)).to(dtype)

    return make


def _dense(base: Any) -> Tensor:
    """The frozen weight [out, in], fp32."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.detach().float()  # type: ignore[no-any-return]
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(base.weight.data, state).float()  # type: ignore[no-any-return]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
