"""One case past 2**31 elements, where offsets in 32 bits turn negative and masks let them pass. A GPU only.

The oracle would not fit, and need not: rows are independent, so the last rows are judged as a problem of their own,
and the whole output is searched for elements that were never written.
"""

from __future__ import annotations

import math

import torch
from sparktune.ops.spec import OpSpec, Problem, Tensors, named

from sparkproof.judge.compare import measure, outside
from sparkproof.judge.families import generator
from sparkproof.judge.record import Judgement


def judge(spec: OpSpec, tested: OpSpec, j: Judgement, p: Problem, device: torch.device) -> None:
    """Judge the last rows of a huge problem, or write down why it was not run."""
    if device.type != "cuda":
        j.not_run.append(f"{j.where}: needs a GPU")
        return
    if spec.tail is None:
        j.not_run.append(f"{j.where}: {spec.name} has no `tail`, so a huge case can't be judged")
        return
    wanted = spec.inputs(p)
    size = sum(math.prod(i.shape) * i.dtype.itemsize * (2 if i.grad else 1) for i in wanted.values())
    need = 1.3 * (size + 2 * p.dims["rows"] * p.dims["columns"] * p.dtype.itemsize)
    free = torch.cuda.mem_get_info(device)[0]
    if free < need:
        j.not_run.append(f"{j.where}: needs {need / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
        return
    try:
        _judge(spec, tested, j, p, _inputs(spec, p, device))
    finally:
        torch.cuda.empty_cache()


def _inputs(spec: OpSpec, p: Problem, device: torch.device) -> Tensors:
    made: Tensors = {}
    for name, i in spec.inputs(p).items():
        if i.make is not None:
            t = i.make(generator(spec.name, "huge", name)).to(device)
        else:
            t = torch.empty(i.shape, dtype=i.dtype, device=device).normal_()
            t = t.abs_() if i.positive else t
        made[name] = t.requires_grad_(i.grad)
    return made


def _judge(spec: OpSpec, tested: OpSpec, j: Judgement, p: Problem, inputs: Tensors) -> None:
    from sparkproof.judge.correctness import leaves, poisoned

    assert spec.tail is not None
    with j.tested("call"), poisoned():
        out = named(tested.call(inputs, p))
    part, small = spec.tail({k: t.detach() for k, t in inputs.items()}, p)
    for k, t in inputs.items():
        part[k] = part[k].requires_grad_(t.requires_grad)
    plain_in, oracle_in = leaves(part), leaves(part, torch.float64)
    plain = named(spec.reference(plain_in, small, None))
    oracle = named(spec.reference(oracle_in, small, torch.float64))
    ends = {k: o[-oracle[k].shape[0] :] for k, o in out.items() if o.is_floating_point()}
    for k, end in ends.items():
        e = measure(end, plain[k], oracle[k])
        j.check("error", k, e.ratio <= 1, e.ratio, e.sentence())
        _written(j, k, out[k])
    if spec.exact is not None:
        low, high = map(named, spec.exact(part, small, spec.exact_slack))
        for k in low:
            wrong = outside(ends[k], low[k], high[k])
            j.check("rounding order", k, wrong == 0, detail=f"{wrong} elements of the last rows outside it")
    rows = [k for k, i in spec.inputs(p).items() if i.grad and i.role == "activation"]
    if not rows:
        return
    through = [k for k in ends if k not in spec.without_gradient]
    gy = {k: torch.empty_like(out[k]).normal_() for k in through}
    with j.tested("backward"), poisoned():
        grads = torch.autograd.grad([out[k] for k in through], [inputs[k] for k in rows], list(gy.values()))
    last = {k: g[-oracle[k].shape[0] :] for k, g in gy.items()}
    plain_grads = torch.autograd.grad([plain[k] for k in through], [plain_in[k] for k in rows], list(last.values()))
    oracle_grads = torch.autograd.grad(
        [oracle[k] for k in through], [oracle_in[k] for k in rows], [g.double() for g in last.values()]
    )
    for k, g, pg, og in zip(rows, grads, plain_grads, oracle_grads, strict=True):
        e = measure(g[-pg.shape[0] :], pg, og)
        j.check("error", f"gradient of {k}", e.ratio <= 1, e.ratio, e.sentence())
        _written(j, f"gradient of {k}", g)


def _written(j: Judgement, of: str, t: torch.Tensor) -> None:
    unwritten = sum(int(c.isnan().sum()) for c in t.split(2**15))
    j.check("all written", of, unwritten == 0, detail=f"{unwritten} elements never written")
