"""A training step's forward and backward as two CUDA graphs, for batches whose shape comes again and again.

A step of 8 layers of Llama-3.1-8B at 2 x 2048 tokens is some 700 kernels, and Python needs 38 to 48 ms to start those of its
forward, which run for 20 to 35: the device waited for 7 ms of 69 with all activations kept, and 17 of 95 with few (one
H200). A replay starts them all at once. `use_cuda_graphs(model)` switches this on; then a forward with labels

- runs as ever until its shape has come `AFTER` times, which also compiles every kernel that it needs;
- is then recorded: the layers and the loss in one graph, all their gradients in another, both in one pool of memory that
  is as large as the step's peak and stays; and from there on replayed, with the batch copied to where the graphs read it.

How many labels count decides how large the head's products are. A graph is made for a number that comes again (labels of
one mask); where it differs from batch to batch, for any number, and then ignored rows cost their product. To read the number
is to wait for the last step's kernels, and what Python does from there to the first kernel is idle time (1.9 of 69 ms with all
activations kept, one H200): a number that has come twice running is taken to come a third time, and counted meanwhile.

What a graph can't follow is looked at in every step, while the device already works: that number, weights, adapters, hooks
and settings of every layer (`models.stamp`), and where what is trained lies. Where something has changed, the replay's results
are thrown away, the step runs as ever, and is recorded anew when it comes again; after a wrong number it runs with the right
one. A batch that a graph can't take runs as ever: one without labels, with a cache, in evaluation, a second forward before
the first one's backward. `report` says how many steps went which way, and why not.

Source: NVIDIA, "CUDA C++ Programming Guide", CUDA graphs; PyTorch's notes on them for what may be recorded.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparktune.models import checkpointing
from sparktune.models.documents import Documents
from sparktune.models.layer_parts import parts_of, stamp_of
from sparktune.models.projection import Unfit, note_fallback
from sparktune.models.valid_rows import ValidRows
from sparktune.ops import dispatch
from sparktune.ops.launching import next_power_of_2

AFTER = 2  # calls of a shape before it is recorded
RUNNING = 2  # steps with one number of labels, after which a third is taken to have it too
AFTER_ANY = 6  # the same where each had another number of labels
MOST = 8  # graphs of a model; a further one takes the place of the one that was used longest ago
GRAPHS = "_sparktune_graphs"


def use_cuda_graphs(model: nn.Module, on: bool = True) -> None:
    """Record and replay the training steps of `model`, or with `on=False` stop doing so and give the memory back.

    Errors: ValueError for a model whose loss is not sparktune's, or whose parameters are not on one CUDA device.
    """
    found = [m for m in model.modules() if hasattr(type(m), "graphed_loss")]  # PEFT hands attributes on
    if len(found) != 1:
        raise ValueError("no loss of sparktune's is in this model: patch it first (FastLanguageModel.from_pretrained)")
    if not on:
        found[0].__dict__.pop(GRAPHS, None)
        return
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        where = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"CUDA graphs need all of a model on one CUDA device; this one is on {where}")
    object.__setattr__(found[0], GRAPHS, StepGraphs())


def report(model: nn.Module) -> dict[str, Any]:
    """{"graphs": how many there are, "steps": {"replayed": n, "recorded": n, "as ever: <why>": n}} of a model."""
    for m in model.modules():
        graphs = m.__dict__.get(GRAPHS)
        if graphs is not None:
            return {"graphs": len(graphs.kept), "steps": dict(graphs.steps)}
    return {"graphs": 0, "steps": {}}


@dataclass
class Batch:
    """What a step is applied to: ids and labels [B, S], positions [1 or B, S] or None, the number of items or None.

    `shifted`: each label is at the position that is to predict it, as targets are; else at its own token. `valid`: how many
    labels count, once that was read, and then nobody need read it again."""

    ids: Tensor
    labels: Tensor
    shifted: bool
    positions: Tensor | None
    documents: Documents | None
    items: Tensor | float | None
    valid: int | None = None

    def targets(self, model: Any) -> Tensor:
        """Each position's next token [B, S]."""
        mine = (None, self.labels) if self.shifted else (self.labels, None)
        found: Tensor = model._targets(*mine, self.documents)
        return found

    def key(self) -> tuple[Any, ...]:
        """What must be equal for one graph to serve two batches, besides the number of labels that count."""
        d = self.documents
        device = self.ids.device
        cast = dispatch.autocast_dtype(self.ids)
        return (
            self.ids.shape, self.labels.shape, self.labels.dtype, self.shifted,
            None if self.positions is None else self.positions.shape,
            None if d is None else (d.cu_seqlens.shape, d.longest, d.packed), self.items is None, device, cast,
        )  # fmt: skip


class StepGraphs:
    """The graphs of one model."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], Recorded] = {}
        self.steps: Counter[str] = Counter()
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._usual: dict[
            tuple[Any, ...], tuple[tuple[Any, ...], int]
        ] = {}  # the last key of a shape, how often running
        self._refused: set[tuple[Any, ...]] = set()
        self._waiting: weakref.ReferenceType[Turn] | None = None  # a forward whose backward has not run
        self._pool: Any = None
        self._aside: Any = None  # a stream to count labels on while a replay runs

    def loss(self, model: Any, batch: Batch) -> Tensor | None:
        """The loss of a batch, by a replay; None where the step has to run as ever."""
        waiting = self._waiting() if self._waiting is not None else None
        if waiting is not None and not waiting.over:
            return self._as_ever("the last forward's backward has not run")
        shape = batch.key()
        key, running = self._usual.get(shape, (None, 0))
        if key in self.kept and running >= RUNNING:
            labels_there = _mark(batch.labels)
            begun = self._begin(key, batch)
            if begun is not None and _unfit(model) is None and self._key(shape, batch, model, labels_there) == key:
                return self._finish(key, begun, model)
            if begun is not None:
                self.steps["replayed in vain: another number of labels, or setting"] += 1
                del begun
        why = _unfit(model)
        if why is not None:
            return self._as_ever(why)
        found = self._find(shape, batch, model)
        if found is None:
            return None
        begun = self._begin(found, batch)
        return self._as_ever("another stream") if begun is None else self._finish(found, begun, model)

    def _begin(self, key: tuple[Any, ...], batch: Batch) -> tuple[Turn, Tensor] | None:
        """The forward of this key's graph, started; None on another stream than it was recorded for."""
        found = self.kept[key] = self.kept.pop(key)  # the last used is last
        if found.stream != dispatch.stream_of(batch.ids.device):
            return None
        turn = Turn(found)
        return turn, found.run(batch, turn)

    def _finish(self, key: tuple[Any, ...], begun: tuple[Turn, Tensor], model: Any) -> Tensor | None:
        """The loss of a forward that was begun, if the model is what it was."""
        turn, loss = begun
        if not turn.recorded.still(model):
            del self.kept[key]
            return self._as_ever("something of the model has changed")
        self._waiting = weakref.ref(turn)
        self.steps["replayed"] += 1
        return loss

    def _key(self, shape: tuple[Any, ...], batch: Batch, model: Any, labels_there: Any = None) -> tuple[Any, ...]:
        """The key of a batch and of how many labels count, which is waited for; with an event, counted aside from there on."""
        if batch.valid is None and labels_there is None:
            batch.valid = ValidRows(batch.targets(model)).read()
        if batch.valid is not None or labels_there is None:
            return (*shape, *_setting(model), batch.valid)
        if self._aside is None:
            self._aside = torch.cuda.Stream(batch.labels.device, priority=-1)
        with torch.cuda.stream(self._aside):
            self._aside.wait_event(labels_there)
            return self._key(shape, batch, model)

    def _find(self, shape: tuple[Any, ...], batch: Batch, model: Any) -> tuple[Any, ...] | None:
        """The key of a graph for this number of labels or for any, made now if it is time."""
        exact = self._key(shape, batch, model)
        any_number = (*exact[:-1], -1)
        last, running = self._usual.get(shape, (None, 0))
        if len(self._usual) > 4096:
            self._usual.clear()
        self._usual[shape] = (exact, running + 1 if exact == last else 1)
        for k in (exact, any_number):
            if k in self.kept:
                return k
        self._seen[exact] += 1
        self._seen[any_number] += 1
        if len(self._seen) > 4096:
            self._seen.clear()
        for k, after in ((exact, AFTER), (any_number, AFTER_ANY)):
            if self._seen[k] > after and k not in self._refused:
                return k if self._record(k, batch, model) else None
        self.steps["as ever: the shape is new"] += 1
        return None

    def _record(self, key: tuple[Any, ...], batch: Batch, model: Any) -> bool:
        try:
            if len(self.kept) >= MOST:
                del self.kept[next(iter(self.kept))]
            if not self.kept and batch.ids.is_cuda:  # a pool that no graph uses any longer is none
                self._pool = torch.cuda.graph_pool_handle()
            self.kept[key] = Recorded(model, batch, None if key[-1] == -1 else key[-1], self._pool)
        except (RuntimeError, Unfit) as e:
            self._refused.add(key)
            note_fallback("a step without a CUDA graph", f"recording it failed: {str(e).splitlines()[0]}")
            self.steps["as ever: recording failed"] += 1
            return False
        self.steps["recorded"] += 1
        return True

    def _as_ever(self, why: str) -> Tensor | None:
        self.steps[f"as ever: {why}"] += 1
        return None


class Turn:
    """A forward and its backward. `over` once the latter has run; forgotten with the loss that nobody wants."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.over = False


def record(work: Callable[[], None], pool: Any, stream: Any) -> Callable[[], None]:
    """`work` as a CUDA graph, which what is returned replays. Its memory is the pool's."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        work()
    return graph.replay


class Recorded:
    """Two graphs, the memory that they read from and write to, and what the model was like."""

    def __init__(self, model: Any, batch: Batch, valid: int | None, pool: Any) -> None:
        self.stream = dispatch.stream_of(batch.ids.device)
        # Kept, so that no memory that graphs read is given back.
        self._groups = [g for layer in _layers(model) for g in parts_of(layer).groups]
        self._held = [g.held.buffer for g in self._groups]
        self._params = [p for p in model.parameters() if p.requires_grad]
        factors = (t for g in self._groups for t in g.factors if t is not None)  # frozen ones too
        self._watched = list({id(t): t for t in (*self._params, *factors)}.values())
        self._alive = [t.detach() for t in self._watched]
        self._state = self._look(model)
        self._ids, self._labels = batch.ids.clone(), batch.labels.to(batch.ids.device, copy=True)
        self._positions = None if batch.positions is None else batch.positions.clone()
        d = batch.documents
        self._documents = None if d is None else Documents(d.cu_seqlens.clone(), d.longest, d.packed)
        self._items = None if batch.items is None else torch.ones((), device=batch.ids.device)
        mine = Batch(self._ids, self._labels, batch.shifted, self._positions, self._documents, self._items)
        self._dloss = torch.ones((), device=batch.ids.device)
        self._loss: Tensor | None = None
        self._grads: tuple[Tensor | None, ...] = ()

        def forward() -> None:
            self._loss = model.graphed_loss(
                self._ids, self._positions, self._documents, mine.targets(model), self._items, valid
            )

        def backward() -> None:
            with torch.autocast(self._ids.device.type, enabled=False):
                assert self._loss is not None
                self._grads = torch.autograd.grad(self._loss, self._params, self._dloss, allow_unused=True)

        side = torch.cuda.Stream(batch.ids.device) if batch.ids.is_cuda else None
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # what one graph casts is nothing that the other may read
        try:
            with torch.enable_grad():
                self._forward = record(forward, pool, side)
                self._backward = record(backward, pool, side)
                store = getattr(model._decoder, checkpointing.STORE, None)
                self._on_host = None if store is None else store.lease()
        finally:
            torch.set_autocast_cache_enabled(cached)
        assert self._loss is not None
        self._loss = self._loss.detach()

    def _copy(self, batch: Batch) -> None:
        self._ids.copy_(batch.ids, non_blocking=True)
        self._labels.copy_(batch.labels, non_blocking=True)
        if self._positions is not None and batch.positions is not None:
            self._positions.copy_(batch.positions, non_blocking=True)
        if self._documents is not None and batch.documents is not None:
            self._documents.cu_seqlens.copy_(batch.documents.cu_seqlens, non_blocking=True)
        if isinstance(batch.items, Tensor):
            assert self._items is not None
            self._items.copy_(batch.items.reshape(()), non_blocking=True)
        elif batch.items is not None:
            assert self._items is not None
            self._items.fill_(batch.items)

    def run(self, batch: Batch, turn: Turn) -> Tensor:
        """The loss of a batch, differentiable once in what is trained."""
        self._copy(batch)
        self._forward()  # before autograd looks at each of a hundred parameters
        assert self._loss is not None
        found: Tensor = _Step.apply(turn, self._loss.detach(), *self._params)
        return found

    def still(self, model: Any) -> bool:
        """Whether the model is what it was."""
        return self._state == self._look(model) and all(
            g.held.buffer is b and (b is None or g.held.current(g.stack))
            for g, b in zip(self._groups, self._held, strict=True)
        )

    def _look(self, model: Any) -> tuple[Any, ...]:
        return _state(model), [(t.data_ptr(), t.requires_grad) for t in self._watched]

    def gradients(self, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of what is trained, in memory of their own: the graph's is written again in the next step."""
        self._dloss.copy_(dloss)
        self._backward()
        theirs = [g for g in self._grads if g is not None]
        ours = [torch.empty_like(g) for g in theirs]
        torch._foreach_copy_(ours, theirs)
        own = iter(ours)
        return tuple(None if g is None else next(own) for g in self._grads)


class _Step(torch.autograd.Function):
    """A replayed forward's loss, in memory of its own, and for the parameters' gradients a replay of the backward."""

    @staticmethod
    def forward(ctx: Any, turn: Turn, loss: Tensor, *params: Tensor) -> Tensor:
        ctx.turn = turn
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dispatch.no_double_backward("decoder_layer")
        turn = ctx.turn
        if turn.over:
            raise RuntimeError("a step's backward ran twice, and what it kept is gone: call the model again.")
        turn.over = True
        return None, None, *turn.recorded.gradients(dloss)


def _mark(t: Tensor) -> Any:
    """Where a tensor's stream stands, or None on a CPU."""
    if not t.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(t.device))
    return event


def _layers(model: Any) -> list[Any]:
    return list(model._decoder.layers)


def _unfit(model: Any) -> str | None:
    """Why no step of this model can be recorded as it is now."""
    layers = _layers(model)
    if not layers or not all(hasattr(layer, "shape_of") for layer in layers):
        return "a layer does not run whole"
    return None


def _setting(model: Any) -> tuple[Any, ...]:
    """What a graph depends on besides the batch, and is switched to and fro."""
    return (
        getattr(model._decoder, checkpointing.BUDGET, 0.0),
        id(getattr(model._decoder, checkpointing.STORE, None)),
        all(layer.gradient_checkpointing for layer in _layers(model)),
    )


def _state(model: Any) -> tuple[Any, ...]:
    """All that the recorded kernels were chosen by, and where what they read lies."""
    ends = (*model.get_input_embeddings().parameters(), *model._decoder.norm.parameters(), *model.lm_head.parameters())
    return (
        [stamp_of(layer) for layer in _layers(model)],
        [(id(p), p.data_ptr(), p.requires_grad, p.dtype) for p in ends],
        [
            bool(vars(m)["_forward_hooks"] or vars(m)["_forward_pre_hooks"])
            for m in (model, model._decoder, model.lm_head)
        ],
    )


def rounded(d: Documents | None, tokens: int) -> Documents | None:
    """The same documents with empty ones behind them, up to a multiple of 8, and a longest of a power of 2, so that fewer
    graphs serve more batches."""
    if d is None:
        return None
    short = -(d.cu_seqlens.numel() - 1) % 8
    ends = torch.cat((d.cu_seqlens, d.cu_seqlens[-1:].expand(short))) if short else d.cu_seqlens
    return Documents(ends, min(tokens, next_power_of_2(d.longest)), d.packed)
