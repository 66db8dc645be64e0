"""What a mix really costs: the model with its weights rounded as they would be stored, against itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparktune.quant.dynamic.calibrate import batches
from sparktune.quant.dynamic.choose import Mix, frontier, total
from sparktune.quant.dynamic.formats import Type
from sparktune.quant.dynamic.table import Table

Importance = dict[str, Tensor | None]


@contextmanager
def stored_as(model: nn.Module, mix: Mix, importance: Importance | None = None) -> Iterator[None]:
    """Within, the weights named in `mix` hold what their types give back; afterwards what they held before.

    importance: weight -> [columns] as for `Type.round_trip`; left out, GGUF types are rounded without.
    """
    parameters = dict(model.named_parameters())
    held: dict[str, Tensor] = {}
    try:
        for name, kind in mix.items():
            weight = parameters[name]
            held[name] = weight.detach().clone()
            stored = Type.named(kind).round_trip(held[name], (importance or {}).get(name))
            with torch.no_grad():
                weight.copy_(stored)
        yield
    finally:
        for name, old in held.items():
            with torch.no_grad():
                parameters[name].copy_(old)


class Judge:
    """KL(model as it is || a mix), nats a token, mean over `sequences` [S, T] of token ids."""

    def __init__(self, model: Any, sequences: Tensor, importance: Importance | None = None) -> None:
        self.model, self.sequences, self.importance = model, sequences, importance
        self.reference = [_log_probabilities(model, ids).cpu() for ids in batches(sequences)]

    def kl(self, mix: Mix) -> float:
        """Of one mix; a forward over all sequences."""
        with stored_as(self.model, mix, self.importance):
            parts = zip(batches(self.sequences), self.reference, strict=True)
            return sum(self._summed(*part) for part in parts) / self.sequences.numel()

    def _summed(self, ids: Tensor, reference: Tensor) -> float:
        logp = _log_probabilities(self.model, ids)
        right = reference.to(logp.device)
        return float((right.exp() * (right - logp)).sum())


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    device = model.get_input_embeddings().weight.device
    training = model.training
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    model.train(training)
    return logits.float().log_softmax(-1)


def importance_of(model: Any, sequences: Tensor) -> Importance:
    """Mean square of each weight's inputs, as llama-imatrix gathers it: linear layers but the head, one forward a sequence."""
    head = model.get_output_embeddings()
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:

            def add(_m: nn.Module, inputs: tuple[Tensor, ...], _o: Tensor, key: str = f"{name}.weight") -> None:
                square = inputs[0].detach().flatten(0, -2).float().square().sum(0)
                sums[key] = sums[key] + square if key in sums else square

            hooks.append(module.register_forward_hook(add))
    try:
        for ids in batches(sequences):
            _log_probabilities(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return {key: summed / sequences.numel() for key, summed in sums.items()}


def to_target(
    table: Table, judge: Judge, target: float, progress: Callable[[str], None] = lambda line: None
) -> tuple[Mix, float]:
    """The smallest mix on the frontier whose *measured* KL is `target` or less, and that KL.

    Bisects the frontier to a 200th of its steps, starting where the prediction puts it. Errors: ValueError where the best mix
    misses the target.
    """
    points = frontier(table)
    low, high = -1, len(points) - 1  # low misses, high holds
    guess = next((i for i, p in enumerate(points) if p.kl <= target), high)
    known: dict[int, float] = {}

    def at(index: int) -> float:
        if index not in known:
            known[index] = judge.kl(points[index].mix)
            size, kl = total(table, points[index].mix)
            progress(f"{size / 2**30:.4f} GiB: KL {known[index]:.4g} measured, {kl:.4g} predicted")
        return known[index]

    if at(high) > target:
        raise ValueError(
            f"The best types of this table give a KL of {at(high):.2g}, more than the target of {target:g}: allow larger types, "
            "or raise the target."
        )
    middle = min(guess, high)
    while high - low > max(1, len(points) // 200):
        if at(middle) <= target:
            high = middle
        else:
            low = middle
        middle = (low + high) // 2
    return points[high].mix, at(high)
