"""One differentiable op from two pure functions, the same for eager code and for torch.compile.

Eagerly a `Fused` is a `torch.autograd.Function`, the cheapest way to call a kernel. Under torch.compile it is a pair of
`torch.library` custom ops, which Dynamo takes into one graph (`fullgraph=True`) without looking inside: the kernels run
as they are, and are counted each time they run, so that a compiled model's record is as true as an eager one's.

`forward(*args)` returns the visible results and then whatever the backward wants kept. `backward(*grads, *saved, needs)`
returns a gradient for each name in `grads`. Both are annotated (`Tensor`, `Tensor | None`, `float`, `int`, `bool`, `str`,
`list[int]`, `list[float]`, and `list[Tensor | None]` for constants), since the custom ops' schemas are read from them.
Both also run on fake tensors, to infer shapes: they allocate with torch, start kernels through `dispatch.launch`, and
never ask a tensor for its values. What they return is new memory, never an argument or a view.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparktune.ops import dispatch

Results = tuple[Tensor, ...]


class Fused:
    """A callable with the arguments of `forward` that returns its first `outputs` results.

    `grads` names the arguments that take a gradient; `same` maps further arguments to the one whose gradient is theirs
    too. `save(args, results)` picks what the backward gets after the output gradients: tensors out of either, None, and
    plain values. `reference` has the arguments of `forward`; it is what runs on a CPU without the interpreter.
    """

    def __init__(
        self, name: str, forward: Callable[..., Tensor | Results], backward: Callable[..., Tensor | Results] | None = None, *,
        reference: Callable[..., Any], outputs: int = 1, grads: Sequence[str] = (), same: Mapping[str, str] | None = None,
        save: Callable[[tuple[Any, ...], Results], tuple[Any, ...]] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.outputs, self.reference = name, outputs, reference
        self.forward, self.backward, self.save = forward, backward, save
        arguments = list(inspect.signature(forward).parameters)
        self.positions = [arguments.index(g) for g in grads]
        self.source = {arguments.index(k): list(grads).index(v) for k, v in (same or {}).items()}
        self.source |= {p: i for i, p in enumerate(self.positions)}
        self.sharers = [[p for p, s in self.source.items() if s == i] for i in range(len(self.positions))]
        self.arity = len(arguments)
        # A mutated copy of an op's file must not take the original's place in the registry.
        home = forward.__module__
        space = "sparktune" if home.startswith("sparktune.") else home.replace(".", "_")
        self._library_forward = self._register(space)

    def __call__(self, *args: Any) -> Any:
        """Run the op by the way its tensors take, and count it."""
        if torch.compiler.is_compiling():
            if dispatch.kernels_run_on(args[0]):
                found = self._library_forward(*args)
                if isinstance(found, Tensor):
                    return found
                return found[0] if self.outputs == 1 else tuple(found[: self.outputs])
            return self.reference(*args)
        way = dispatch.route(self.name, *_tensors(args))
        if way == "reference":
            found = self.reference(*args)
        elif self.backward is None:
            found = self._visible(_several(self.forward(*args)))
        else:
            found = _Eager.apply(self, *args)
        dispatch.record(self.name, way)
        return found

    def _visible(self, results: Results) -> Any:
        return results[0] if self.outputs == 1 else results[: self.outputs]

    def saved(self, args: tuple[Any, ...], results: Results) -> tuple[Any, ...]:
        """What the backward is given besides the output gradients; all arguments unless `save` picks."""
        return self.save(args, results) if self.save is not None else args

    def spread(self, found: Results, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Gradients by argument: None for those that take none."""
        every: list[Tensor | None] = [None] * self.arity
        for position, index in self.source.items():
            if wanted[position]:
                every[position] = found[index]
        return tuple(every)

    def needs(self, wanted: Sequence[bool]) -> list[bool]:
        """For each of `grads`: whether it, or an argument that shares it, needs its gradient."""
        return [any(wanted[p] for p in sharers) for sharers in self.sharers]

    def _register(self, space: str) -> Callable[..., Any]:
        @functools.wraps(self.forward)
        def run(*args: Any) -> Any:
            way = dispatch.route(self.name, *_tensors(args))
            found = self.forward(*args)
            dispatch.record(self.name, way)
            return found

        library: Any = torch.library.custom_op(f"{space}::{self.name}", run, mutates_args=())
        library.register_fake(self.forward)
        if self.backward is None:
            return library  # type: ignore[no-any-return]
        backward: Any = torch.library.custom_op(f"{space}::{self.name}_backward", self.backward, mutates_args=())
        backward.register_fake(self.backward)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _keep(ctx, self.saved(inputs, _several(output)))

        def formula(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            wanted = list(ctx.needs_input_grad)
            found = _several(backward(*grads[: self.outputs], *_kept(ctx), self.needs(wanted)))
            return self.spread(found, wanted)

        library.register_autograd(formula, setup_context=setup_context)
        return library  # type: ignore[no-any-return]


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Fused, *args: Any) -> Any:
        results = _several(op.forward(*args))
        ctx.op = op
        _keep(ctx, op.saved(args, results))
        return op._visible(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        op: Fused = ctx.op
        dispatch.no_double_backward(op.name)
        assert op.backward is not None
        wanted = ctx.needs_input_grad[1:]
        found = _several(op.backward(*grads, *_kept(ctx), op.needs(wanted)))
        return None, *op.spread(found, wanted)


def _several(found: Tensor | Results) -> Results:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _tensors(saved: Sequence[Any]) -> list[Tensor]:
    """All tensors, those in lists too."""
    return [t for s in saved for t in (s if isinstance(s, list) else (s,)) if isinstance(t, Tensor)]


def _keep(ctx: Any, saved: tuple[Any, ...]) -> None:
    """Tensors the way autograd wants them, which notices when one is changed before the backward; the rest as it is."""
    ctx.save_for_backward(*_tensors(saved))
    ctx.others = [[_mark(t) for t in s] if isinstance(s, list) else _mark(s) for s in saved]


def _kept(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)

    def back(s: Any) -> Any:
        return next(tensors) if s is _TENSOR else s

    return [[back(t) for t in s] if isinstance(s, list) else back(s) for s in ctx.others]


def _mark(s: Any) -> Any:
    return _TENSOR if isinstance(s, Tensor) else s


_TENSOR = "\0tensor"  # a string, which stays itself wherever a context is copied
