r"""Cross entropy of h W^T, whose logits never exist all at once.

    z = shape(h W^T + s (h A^T) B^T + bias)      [M, V], in chunks of rows: at 16384 tokens and V = 128256, 0.26 GB, not 4.2
    loss = as in cross_entropy                   ignored rows, weights, smoothing, soft-cap, scale, num_items_in_batch
    dh = dz W + s dz B A,  dW = dz^T h,  dB = s dz^T (h A^T),  dA = s (dz B)^T h,  dbias = sum of dz over rows

Softmax's gradient needs no more than the row's logits, so a chunk's dz, dh and part of dW are computed while it is there,
already in the forward pass; backward multiplies by the loss's own gradient, which is a scalar. What nothing wants is not
computed: without gradients, or under no_grad, a forward is the logits' product alone. With reduction "none" the
gradients of the parameters need each row's own factor, known in the backward only: there, and there alone, the backward
computes the chunks a second time. See loss_chunks for the steps.

Ignored rows are left out before the product. A permutation made on the device puts rows that count first, and rows are
gathered by it, chunk by chunk. How many count the host can't know without waiting, so all chunks run, the ignored ones
as rows of zeros at the end. Who made the labels on the CPU knows the number: with `valid_rows` just so many rows are
computed, and none gathered if it is all of them. A wrong number makes the loss NaN. Nothing here waits for the device.

Rounding, as transformers: logits are rounded to h's dtype by the GEMM, then all is fp32; dz is rounded to h's dtype
before its products, dh once more when it is scaled. dz is not yet scaled by 1 / M or a loss scale, so fp16 needs none.
Gradients of W, A, B and bias are summed over chunks in fp32 and rounded once.

LoRA on the head goes in here as A and B; a loss that reads W alone would leave it untrained and its logits wrong. W may
be tied to the embedding: its gradient is W's as anywhere. W is dense; 4-bit heads are refused.

Shapes: h [M, K], W [V, K], labels [M]. Bytes, beside those of the GEMMs: a chunk's logits are read twice, the second
time from L2, and written once. Saved: dh [M, K], and fp32 [V, K] where W is trained.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, and Hsu et al., "Liger Kernel", 2024,
for a loss without all logits; Hu et al., 2021, for LoRA.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparktune.ops import dispatch
from sparktune.ops.cross_entropy import judged_head, judged_loss_inputs
from sparktune.ops.fused import Fused
from sparktune.ops.loss_chunks import (
    Softmax,
    Sums,
    gather_kernel,
    launches,
    plan,
    plan_kernel,
    rows_kernel,
    run,
    scatter,
    scatter_kernel,
)  # fmt: skip
from sparktune.ops.softmax_rows import check, items_on, reduced, reduced_reference, row_losses
from sparktune.ops.spec import FLOATS, Input, Law, Mutant, OpSpec, Problem, Tensors

KERNELS = (plan_kernel, gather_kernel, rows_kernel, scatter_kernel)  # what `launches` names
PARAMETERS = ("weight", "bias", "a", "b")


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, weights: Tensor | None, items: Tensor | None,
    a: Tensor | None, b: Tensor | None, lora_scale: float, ignore_index: int, reduction: str, smoothing: float,
    softcap: float, scale: float, valid_rows: int, chunk: int, wanted: list[bool],
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, losses of rows) in plain PyTorch, as transformers and PEFT compute it."""
    linear, dtype = torch.nn.functional.linear, hidden.dtype
    hidden = torch.where((labels != ignore_index)[:, None], hidden, 0.0)  # NaN on an ignored row is not in dW either
    logits = linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    if a is not None and b is not None:
        logits = logits + linear(linear(hidden, a.to(dtype)), b.to(dtype)) * lora_scale
    losses = row_losses(logits, labels, ignore_index, smoothing, softcap, scale, compute)
    loss = reduced_reference(losses, labels, weights, items, ignore_index, reduction)
    if valid_rows >= 0:
        loss = loss * torch.where((labels != ignore_index).sum() == valid_rows, 1.0, float("nan"))
    return loss, losses


def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, weights: Tensor | None, items: Tensor | None,
    a: Tensor | None, b: Tensor | None, lora_scale: float, ignore_index: int, reduction: str, smoothing: float,
    softcap: float, scale: float, valid_rows: int, chunk: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, losses, what the loss was divided by, order, dh in that order, dW, dbias, dA, dB)."""
    m, k = hidden.shape
    rows = m if valid_rows < 0 else min(m, valid_rows)
    ordered, now = rows < m or valid_rows < 0, not _late(reduction, wanted)
    losses = torch.zeros(m, dtype=torch.float32, device=hidden.device)
    order = plan(labels, ignore_index) if ordered and m else labels.new_empty(0, dtype=torch.int32)
    dh = torch.empty((rows, k) if wanted[0] and now else (0, k), dtype=hidden.dtype, device=hidden.device)
    sums = Sums.of((weight, bias, a, b), [w and now for w in wanted[1:]], hidden)
    run(
        hidden, weight, labels, bias, weights, a, b, lora_scale, order if ordered else None, rows, chunk, losses, dh, sums,
        Softmax(ignore_index, smoothing, softcap, scale),
    )  # fmt: skip
    loss, by = reduced(losses, labels, weights, items, ignore_index, reduction, valid_rows)
    return loss, losses, by, order, dh, sums.weight, sums.bias, sums.a, sums.b


def _late(reduction: str, wanted: list[bool]) -> bool:
    """Whether gradients of parameters wait for each row's own output gradient."""
    return reduction == "none" and any(wanted[1:])


def _save(args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Any, ...]:
    late = _late(args[10], args[16])  # h is kept for a second computation only
    return (args[0] if late else None, *args[1:5], *args[6:8], *results[2:9], *args[8:15], args[15])


def _backward(
    dloss: Tensor, dlosses: Tensor, hidden: Tensor | None, weight: Tensor, labels: Tensor, bias: Tensor | None,
    weights: Tensor | None, a: Tensor | None, b: Tensor | None, by: Tensor, order: Tensor, dh: Tensor, dweight: Tensor,
    dbias: Tensor, da: Tensor, db: Tensor, lora_scale: float, ignore_index: int, reduction: str, smoothing: float,
    softcap: float, scale: float, valid_rows: int, chunk: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dhidden, dweight, dbias, da, db)."""
    m, k = labels.numel(), weight.shape[1]
    ordered = order if order.numel() else None
    if hidden is not None:
        rows = m if valid_rows < 0 else min(m, valid_rows)
        factor = dloss.contiguous() if weights is None else dloss * weights
        dh = torch.empty((rows, k) if needs[0] else (0, k), dtype=hidden.dtype, device=hidden.device)
        sums = Sums.of((weight, bias, a, b), needs[1:], hidden)
        run(
            hidden, weight, labels, bias, factor, a, b, lora_scale, ordered, rows, chunk, torch.empty_like(factor), dh, sums,
            Softmax(ignore_index, smoothing, softcap, scale),
        )  # fmt: skip
        found, dloss = (sums.weight, sums.bias, sums.a, sums.b), by.reshape(())  # which is 1
    else:
        found = dweight, dbias, da, db
    grads = [scatter(dh, labels, ordered, dloss, by, ignore_index, k) if needs[0] else dh.new_empty(0)]
    for t, total, need in zip((weight, bias, a, b), found, needs[1:], strict=True):
        if t is None or not need:
            grads.append(dh.new_empty(0))
        elif total.shape != t.shape:
            raise RuntimeError("linear_cross_entropy: a gradient is asked for that the forward was not told of")
        else:
            grads.append(torch.mul(total, dloss / by, out=torch.empty_like(t, memory_format=torch.contiguous_format)))
    return grads[0], grads[1], grads[2], grads[3], grads[4]


_OP = Fused(
    "linear_cross_entropy",
    _forward,
    _backward,
    reference=reference,
    outputs=2,
    grads=("hidden", *PARAMETERS),
    save=_save,
)


def shift_labels(labels: Tensor, ignore_index: int = -100, position_ids: Tensor | None = None) -> Tensor:
    """Labels [..., S] moved so that position s has token s + 1 for its target, and the last has none.

    `position_ids` [..., S], of rows packed from several documents: where they are 0 a document begins, and its first
    token is no target, since the one before knows nothing of it. Errors: ValueError for other shapes.
    """
    if position_ids is not None:
        if position_ids.shape != labels.shape:
            wanted, got = list(labels.shape), list(position_ids.shape)
            raise ValueError(f"shift_labels: position_ids must be {wanted} as labels, got {got}")
        labels = torch.where(position_ids == 0, ignore_index, labels)
    return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100,
    reduction: str = "mean", row_weights: Tensor | None = None, num_items_in_batch: Tensor | float | None = None,
    label_smoothing: float = 0.0, softcap: float = 0.0, logit_scale: float = 1.0, lora_a: Tensor | None = None,
    lora_b: Tensor | None = None, lora_scale: float = 1.0, shift: bool = False, position_ids: Tensor | None = None,
    valid_rows: int | None = None, chunk_rows: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, losses) of hidden [..., K] through a head [V, K] for labels [...], int64 or int32.

    `loss` in fp32 as `cross_entropy` gives it, a scalar, or [...] for "none"; `losses` [...] are the rows' own, without
    weights, for inspection: no gradient flows through them. Differentiable once, in hidden, weight, bias [V] and LoRA's
    A [r, K] and B [V, r], which add lora_scale h A^T B^T to the logits, without dropout.

    `shift`: labels are those of the tokens themselves, to be shifted here, see `shift_labels`, which takes
    `position_ids`. `valid_rows`: how many labels count, after the shift, if the host knows; a wrong number makes the
    loss NaN. `chunk_rows`: rows of logits that exist at once; 0 chooses. Errors: ValueError for shapes, dtypes and
    settings that don't fit.
    """
    op = "linear_cross_entropy"
    if not weight.is_floating_point() or weight.dim() != 2 or getattr(weight, "quant_state", None) is not None:
        raise ValueError(f"{op}: the head must be a dense [V, K], got {weight.dtype} {list(weight.shape)}")
    v, k = weight.shape
    if hidden.dim() < 1 or hidden.shape[-1] != k or hidden.dtype not in FLOATS:
        raise ValueError(
            f"{op}: hidden must be [..., {k}], fp32, bf16 or fp16, got {list(hidden.shape)} {hidden.dtype}"
        )
    autocast = dispatch.autocast_dtype(hidden)
    if autocast is None and weight.dtype != hidden.dtype:
        raise ValueError(f"{op}: hidden is {hidden.dtype} and the head {weight.dtype}; cast one, or use autocast")
    if bias is not None and (bias.shape != (v,) or bias.dtype not in FLOATS):
        raise ValueError(f"{op}: bias must be [{v}], got {list(bias.shape)} {bias.dtype}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError(f"{op}: LoRA needs both A and B, or neither")
    if lora_a is not None and lora_b is not None and (lora_a.shape, lora_b.shape[:1]) != ((lora_b.shape[1], k), (v,)):
        raise ValueError(f"{op}: A must be [r, {k}] and B [{v}, r], got {list(lora_a.shape)} and {list(lora_b.shape)}")
    if (valid_rows is not None and valid_rows < 0) or chunk_rows < 0:
        raise ValueError(f"{op}: valid_rows and chunk_rows must not be negative, got {valid_rows} and {chunk_rows}")
    if position_ids is not None and not shift:
        raise ValueError(
            f"{op}: position_ids say which labels are no targets when shift=True; these are shifted already"
        )
    rows = hidden.shape[:-1]
    check(
        op, rows, v, labels, row_weights, num_items_in_batch, reduction, label_smoothing, softcap, logit_scale
    )  # fmt: skip
    if shift:
        labels = shift_labels(labels, ignore_index, position_ids)
    wanted = [
        t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias, lora_a, lora_b)
    ]
    loss, losses = _OP(
        hidden.reshape(-1, k).to(autocast or hidden.dtype), weight, labels.reshape(-1).contiguous(), bias,
        None if row_weights is None else row_weights.reshape(-1).float().contiguous(),
        items_on(hidden.device, num_items_in_batch), lora_a, lora_b, float(lora_scale), ignore_index, reduction,
        float(label_smoothing), float(softcap), float(logit_scale), -1 if valid_rows is None else valid_rows, chunk_rows,
        wanted,
    )  # fmt: skip
    return (loss.reshape(rows) if reduction == "none" else loss), losses.detach().reshape(rows)


def causal_lm_loss(hidden: Tensor, weight: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """The loss of next tokens as transformers computes it, with labels [B, S] not yet shifted."""
    return linear_cross_entropy(hidden, weight, labels, shift=True, **settings)[0]


# A scalar loss is judged where the logits have the bits of plain PyTorch's, whose error in a mean is else a matter of
# luck: with LoRA inside the product they are rounded once, not three times.
VARIANTS = ("none weights known", "sum items smooth bias trained", "none weights capped lora", "mean weights trained")


def _inputs(p: Problem) -> dict[str, Input]:
    m, v, k, words = p.dims["rows"], p.dims["columns"], p.dims["k"], p.variant.split()
    # As in cross_entropy: logits of 0.1, of 100 in one family, or of 3.
    spread = (0.1 if "small" in p.dims else 3.0) / k**0.5
    found = {"hidden": Input((m, k), p.dtype, grad=True)}
    found["weight"] = Input((v, k), p.dtype, "parameter", grad="trained" in words, spread=spread)
    if "bias" in words:
        found["bias"] = Input((v,), p.dtype, "parameter", grad=True, spread=spread)
    if "lora" in words:
        found["a"] = Input((4, k), torch.float32, "parameter", grad=True, spread=spread)
        found["b"] = Input((v, 4), torch.float32, "parameter", grad=True, spread=0.5)
    return found | judged_loss_inputs(p)


def _call(t: Tensors, p: Problem) -> Tensors:
    h, m = judged_head(p), p.dims["rows"]
    loss, losses = linear_cross_entropy(
        t["hidden"], t["weight"], t["labels"], bias=t.get("bias"), reduction=h["reduction"],
        row_weights=t.get("weights"), num_items_in_batch=t.get("items"), label_smoothing=h["smoothing"],
        softcap=h["softcap"], logit_scale=h["scale"], lora_a=t.get("a"), lora_b=t.get("b"), lora_scale=1.5,
        valid_rows=m - (m + 2) // 4 if "known" in p.variant.split() else None, chunk_rows=p.dims.get("chunk", 0),
    )  # fmt: skip
    return {"loss": loss, "losses": losses}


def _reference(t: Tensors, p: Problem, compute: torch.dtype | None) -> Tensors:
    h = judged_head(p)
    loss, losses = reference(
        t["hidden"], t["weight"], t["labels"], t.get("bias"), t.get("weights"), t.get("items"), t.get("a"), t.get("b"),
        1.5, -100, h["reduction"], h["smoothing"], h["softcap"], h["scale"], -1, 0, [], compute or torch.float32,
    )  # fmt: skip
    return {"loss": loss, "losses": losses}


def _vocabulary_reversed(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    labels = torch.where(t["labels"] >= 0, p.dims["columns"] - 1 - t["labels"], t["labels"])
    turned: Tensors = {k: t[k].flip(0) for k in ("weight", "bias", "b") if k in t}
    return call(t, p), call({**t, **turned, "labels": labels}, p)


def _chunks_of_another_size(call: Any, t: Tensors, p: Problem) -> tuple[Tensor, Tensor]:
    return call(t, p), call(t, replace(p, dims={**p.dims, "chunk": 5}))


def _flops(p: Problem, which: Literal["forward", "backward"]) -> int:
    """Logits and dh in the forward already, of the rows that count; the backward scales."""
    m, v, k = (p.dims[d] for d in ("rows", "columns", "k"))
    return 4 * (m - (m + 2) // 4) * v * k if which == "forward" else m * k


def _bytes(p: Problem, which: Literal["forward", "backward"]) -> int:
    m, v, k = (p.dims[d] for d in ("rows", "columns", "k"))
    return (2 * v * k + 5 * m * v) * p.dtype.itemsize if which == "forward" else 2 * m * k * p.dtype.itemsize


MUTANTS = Mutant.table(
    """weights-in-mean @softmax_rows: a weighted mean divided by rows
- by = tl.sum(weight, 0)
+ by = found.to(tl.float32)
weights-in-loss @softmax_rows: row weights left out of the loss
- other=0.0) * w, 0.0)
+ other=0.0), 0.0)
chunks-overwrite @loss_chunks: a parameter's gradient from the last chunk alone
- onto.addmm_(x.float(), y.float())
+ onto.addmm_(x.float(), y.float(), beta=0)
chunk-offset @loss_chunks: every chunk takes the labels of the first
- row = offset + place
+ row = place
unordered-labels @loss_chunks: labels in the batch's order, rows in that of the gathering
- row = tl.load(order_ptr + row).to(tl.int64)
-         row_ptr
+ row = row
+         row_ptr
unordered-gradient @loss_chunks: gradients left in the order of the gathering
- row = tl.load(order_ptr + place, mask=place < m, other=0).to(tl.int64)
+ row = place
gathered-nan @loss_chunks: ignored rows of hidden gathered as they are
- mask=there & counts
+ mask=there
ignored-left @loss_chunks: logits of ignored rows left where gradients are expected
- tl.store(row_ptr + i * (LANES * 8) + within, zeros, mask=there)
+ tl.store(row_ptr + i * (LANES * 8) + within, zeros, mask=there & (c < 0))
ignored-unselected @loss_chunks: gradients of ignored rows not selected
- tl.where(counts[:, None], x * factor[:, None], 0.0)
+ x * factor[:, None]
last-lane @loss_chunks: a last lane that is not whole left out
- tl.broadcast_to(end + lane < n, (LANES, 8))
+ tl.broadcast_to(end + lane + 8 <= n, (LANES, 8))
factor-of-place @loss_chunks: row weights by the place in the chunk
- factor = tl.load(factor_ptr + row)
+ factor = tl.load(factor_ptr + place)
smoothing-in-gradient @loss_chunks: smoothing left out of the gradient but for the label
- s.smoothing / v,
+ 0.0,
cap-left-out @loss_chunks: the label's logit not capped
- z_t = capped(z_t, cap)
+ z_t = z_t
dloss-stride @loss_chunks: the output gradient read as if it were contiguous
- row * dloss_stride
+ row
lora-scale @loss_chunks: LoRA's scale left out of the logits
- tail = torch.mm(h, a.t()).mul_(scale)
+ tail = torch.mm(h, a.t())
lora-scale-of-a @loss_chunks: LoRA's scale left out of dh and dA
- low = torch.mm(dz, b).mul_(scale)
+ low = torch.mm(dz, b)
lora-not-in-dh @loss_chunks: dh of the head alone
- dh.addmm_(low, a)
+ dh.addmm_(low, a, alpha=0)
dbias-mean @loss_chunks: bias gradient averaged over a chunk
- dz.sum(0, dtype=torch.float32)
+ dz.float().mean(0)
late-unweighted: gradients of parameters without their rows' own output gradient
- factor = dloss.contiguous() if weights is None else dloss * weights
+ factor = torch.ones_like(dloss)
undivided: gradients of parameters not divided by what the loss was
- torch.mul(total, dloss / by,
+ torch.mul(total, dloss * torch.ones_like(by),
weights-unused: rows' gradients without their weights
- hidden, weight, labels, bias, weights, a, b, lora_scale, order if ordered
+ hidden, weight, labels, bias, None, a, b, lora_scale, order if ordered
all-rows-known: one row fewer computed than counts
- rows = m if valid_rows < 0 else min(m, valid_rows)
-     ordered, now
+ rows = m if valid_rows < 0 else max(0, min(m, valid_rows - 1))
+     ordered, now
silent-fallback: the reference run in place of the kernels
- loss, losses = _OP(
+ loss, losses = reference(
"""
)

OP = OpSpec(
    name="linear_cross_entropy",
    summary="Cross entropy of a head's logits, made in chunks and turned into gradients in place, with LoRA on the head",
    variants=VARIANTS,
    dtypes=FLOATS,
    sizes={
        "typical": {"rows": 5, "columns": 300, "k": 24, "chunk": 3, "small": 1, "cap": 300},
        "prime": {"rows": 5, "columns": 37, "k": 13, "chunk": 8},
        "wide": {"rows": 3, "columns": 601, "k": 16, "chunk": 2, "small": 1},
        "one": {"rows": 1, "columns": 1, "k": 8},
        "no rows": {"rows": 0, "columns": 64, "k": 8},
        "speed": {"rows": 8192, "columns": 128256, "k": 4096},
    },
    inputs=_inputs,
    call=_call,
    reference=_reference,
    launches=launches,
    bytes_moved=_bytes,
    flops=_flops,
    bound="matrix",
    without_gradient=("losses",),
    laws=(
        Law("reversing the vocabulary changes nothing", _vocabulary_reversed, tolerance=1e-3),
        Law("the chunks' size changes nothing", _chunks_of_another_size, tolerance=1e-3),
    ),
    mutants=MUTANTS,
)
