"""Faults planted into a training run, each a change to the real code while it lasts, and the assertion that must find it.

A fault goes into what a run is made of (the data, the engine, the optimiser, the merge), never into what judges it. Where
several assertions miss, the named one must be among them: what is caught only by accident of another is not caught.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

Plant = Callable[[Any], AbstractContextManager[None]]  # of an engine's class


@dataclass(frozen=True)
class Fault:
    """One way to be wrong."""

    id: str
    description: str
    caught_by: str  # how the name of the assertion begins
    plant: Plant


def _patching(*targets: Callable[[Any], Any]) -> Plant:
    """A plant from functions that give `mock.patch` objects."""

    @contextlib.contextmanager
    def plant(engine: Any) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for target in targets:
                stack.enter_context(target(engine))
            yield

    return plant


def _after_lora(change: Callable[[nn.Module], nn.Module]) -> Plant:
    """A plant that changes the model an engine has just given LoRA, freshly added or read back."""

    def patch(engine: Any, name: str) -> Any:
        right = getattr(engine, name)

        def wrong(self: Any, *args: Any) -> nn.Module:
            return change(right(self, *args))

        return mock.patch.object(engine, name, wrong)

    return _patching(lambda engine: patch(engine, "add_lora"), lambda engine: patch(engine, "read_adapter"))


def _with_forward(change: Callable[..., Any]) -> Plant:
    """A plant that calls `change(forward, calls so far, **inputs)` in place of the model's forward."""

    def wrap(model: nn.Module) -> nn.Module:
        right, calls = model.forward, iter(range(1 << 30))

        def forward(*args: Any, **inputs: Any) -> Any:
            return change(lambda **given: right(*args, **given), next(calls), **inputs)

        model.forward = forward  # type: ignore[method-assign]
        return model

    return _after_lora(wrap)


def _sharp_rotation(model: nn.Module) -> nn.Module:
    """Cosines and sines 32 times as large, so scores 1,024 times."""
    for module in model.modules():
        if hasattr(module, "attention_scaling"):
            module.attention_scaling = 32.0  # type: ignore[assignment]
    return model


def _noise_for_gradients(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad: torch.randn(grad.shape, generator=generator).to(grad) * grad.norm())
    return model


def _bare(model: nn.Module) -> nn.Module:
    """The frozen base, as an engine gives it back whose target modules matched nothing."""
    bare: nn.Module = model.unload()  # type: ignore[operator]
    return bare.requires_grad_(False)


def _frozen_b(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.requires_grad_(False)
    return model


def _shifted(forward: Any, call: int, **inputs: Any) -> Any:
    """Labels moved by one before a model that moves them itself."""
    if inputs.get("labels") is not None:
        inputs["labels"] = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    return forward(**inputs)


def _nan_once(forward: Any, call: int, **inputs: Any) -> Any:
    """A loss that is NaN in one training step, and gradients that are not, so that training goes on as if nothing was."""
    out = forward(**inputs)
    if call == 9 and out.loss is not None:
        out.loss = out.loss + torch.full_like(out.loss, math.nan).detach()
    return out


def _mean_of_means(forward: Any, call: int, **inputs: Any) -> Any:
    """Each micro-batch's own mean, whatever the whole batch holds."""
    inputs.pop("num_items_in_batch", None)
    return forward(**inputs)


def _masked(engine: Any) -> Any:
    from sparkproof.data import rows

    right = rows.collate

    def wrong(given: Any, pad: int) -> Any:
        batch = right(given, pad)
        return rows.Batch(batch.input_ids, batch.attention_mask, [[rows.IGNORE] * len(r) for r in batch.labels])

    return mock.patch.object(rows, "collate", wrong)


def _shifted_rows(engine: Any) -> Any:
    from sparkproof.data import rows

    right = rows.make_row

    def wrong(*args: Any) -> Any:
        row = right(*args)
        return rows.Row(row.ids, (*row.labels[1:], rows.IGNORE))

    return mock.patch.object(rows, "make_row", wrong)


def _leaking_documents(engine: Any) -> Any:
    from sparktune.models.documents import Documents

    return mock.patch.object(Documents, "_restarting", classmethod(lambda cls, *args: None))


def _leaking_mask(engine: Any) -> Any:
    return mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)


def _half_scale(engine: Any) -> Any:
    from sparktune.export.lora import Adapter

    right = Adapter.scale
    return mock.patch.object(Adapter, "scale", lambda *asked: right(*asked) / 2)


def _no_step(engine: Any) -> Any:
    return mock.patch.object(torch.optim.AdamW, "step", lambda self, closure=None: None)


FAULTS = (
    Fault("flat-loss", "the loss stays flat and the exit code is 0 (row 3 of docs/failures.md): gradients are noise", "loss fall",
          _after_lora(_noise_for_gradients)),
    Fault("rope-attention-factor", "a rope's attention_factor is 32, the cause behind row 3 of docs/failures.md",
          "first gradient norm", _after_lora(_sharp_rotation)),
    Fault("optimiser-never-steps", "the optimiser's step does nothing", "LoRA tensors that no step changed",
          _patching(_no_step)),
    Fault("lora-on-no-module", "target modules match nothing", "targeted modules without LoRA", _after_lora(_bare)),
    Fault("frozen-lora-b", "LoRA's B takes no gradient", "LoRA tensors that are frozen", _after_lora(_frozen_b)),
    Fault("labels-shifted-in-data", "the data shifts labels that the model shifts again",
          "labels that are not the token at their place", _patching(_shifted_rows)),
    Fault("labels-shifted-in-engine", "the engine shifts labels twice", "first loss, distance from that of its own logits",
          _with_forward(_shifted)),
    Fault("labels-all-masked", "no token is left to learn", "fewest tokens to learn in a step", _patching(_masked)),
    Fault("mask-leaks", "a packed document attends to the one before it", "LoRA gradients of rows packed into one",
          _patching(_leaking_mask, _leaking_documents)),
    Fault("merge-differs", "merging adds half of the update", "merged model, distance from the base with its adapter",
          _patching(_half_scale)),
    Fault("nan-that-recovers", "one step's loss is NaN, the next is not",
          "steps with a loss or gradient norm that is not finite", _with_forward(_nan_once)),
    Fault("accumulation-scale", "each micro-batch is divided by its own tokens",
          "LoRA gradients of rows accumulated one by one", _with_forward(_mean_of_means)),
)  # fmt: skip
