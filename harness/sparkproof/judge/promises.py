"""What an op promises besides right numbers: its laws, the same bits twice in whatever order its programs run, one derivative and
no second, autocast, and torch.compile without a break in the graph.
"""

from __future__ import annotations

import torch
from sparktune.ops.spec import OpSpec, Problem, Tensors, named

from sparkproof.judge.compare import CAP_L2, same_bits
from sparkproof.judge.families import NORMAL, make_gradient, make_inputs
from sparkproof.judge.interpreter import last_programs_first
from sparkproof.judge.record import Judgement


def laws(spec: OpSpec, tested: OpSpec, j: Judgement, p: Problem, device: torch.device) -> None:
    """Metamorphic laws, the same bits twice, and a second derivative refused rather than wrong."""
    inputs = make_inputs(spec, p, NORMAL, device)
    constants = {k: t.detach() for k, t in inputs.items()}

    def one(t: Tensors, at: Problem) -> torch.Tensor:
        return next(iter(named(tested.call(t, at)).values()))

    for law in spec.laws:
        with j.tested(law.name):
            sides = law.sides(one, constants, p)
        if sides is None:
            continue
        left, right = (s.double() for s in sides)
        off = float(((left - right).abs() / torch.maximum(left.abs(), right.abs()).clamp_min(1e-30)).max())
        if law.tolerance:  # relative to the tensor: a difference of nearly equal halves has no relative accuracy
            off = float((left - right).abs().max() / right.pow(2).mean().sqrt())
        detail = f"sides differ by {off:.1e} (allowed {law.tolerance:.0e})"
        j.check("law", law.name, off <= law.tolerance, detail=detail)
    with j.tested("call"):
        first = named(tested.call(constants, p))
        with last_programs_first():
            second = named(tested.call(constants, p))
    j.check("same bits twice", "call", all(same_bits(first[k], second[k]) for k in first))
    leaves = [t for t in inputs.values() if t.requires_grad]
    if not leaves:
        return
    with j.tested("call"):
        out = _differentiable(spec, named(tested.call(inputs, p)))
    refused = ""
    try:
        squares = torch.stack([o.float().pow(2).sum() for o in out.values()])
        torch.autograd.grad(squares.sum(), leaves, create_graph=True)
    except RuntimeError as e:
        refused = str(e)
    # By the name of this op, or of one that it is made of.
    named_it = "has no second derivative" in refused
    j.check("second derivative refused by name", "backward", named_it, detail=refused or "it was computed")


def autocast(spec: OpSpec, tested: OpSpec, j: Judgement, p: Problem, device: torch.device) -> None:
    """fp32 inputs under bf16 autocast: the dtypes that plain PyTorch gives there, and bf16's errors at most."""
    if p.dtype != torch.float32:
        return
    inputs = make_inputs(spec, p, NORMAL, device)
    plain_in, oracle_in = _fresh(inputs), _fresh(inputs, torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        with j.tested("call under autocast"):
            out = named(tested.call(inputs, p))
        plain = named(spec.reference(plain_in, p, None))
    oracle = named(spec.reference(oracle_in, p, torch.float64))
    for k, o in out.items():
        j.check("autocast", k, o.dtype == plain[k].dtype, detail=f"{o.dtype}; plain PyTorch gives {plain[k].dtype}")
        if o.is_floating_point():
            _close(j, k, o, plain[k], oracle[k])
    wanted = [k for k, t in inputs.items() if t.requires_grad]
    if not wanted:
        return
    through = _differentiable(spec, out)
    gy = {k: make_gradient(spec, p, NORMAL, o, k) for k, o in through.items()}

    def grads(of: Tensors, to: Tensors) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            [of[k] for k in gy],
            [to[k] for k in wanted],
            [g.to(of[k].dtype) for k, g in gy.items()],
            materialize_grads=True,
        )

    with j.tested("backward under autocast"):
        found = grads(out, inputs)
    for k, g, pg, og in zip(wanted, found, grads(plain, plain_in), grads(oracle, oracle_in), strict=True):
        j.check(
            "autocast", f"gradient of {k}", g.dtype == pg.dtype, detail=f"{g.dtype}; plain PyTorch gives {pg.dtype}"
        )
        _close(j, f"gradient of {k}", g, pg, og)


def compiled(spec: OpSpec, tested: OpSpec, j: Judgement, p: Problem, device: torch.device) -> None:
    """One graph without a break, and the bits of the eager call, forward and backward."""
    if not spec.compiles or p.variant in spec.inside_ops:
        return
    inputs = make_inputs(spec, p, NORMAL, device)
    names = list(inputs)

    def flat(*tensors: torch.Tensor) -> Tensors:
        return dict(named(tested.call(dict(zip(names, tensors, strict=True)), p)))

    with j.tested("call"):
        eager = flat(*inputs.values())
    torch._dynamo.reset()
    with j.tested("torch.compile"):
        out = torch.compile(flat, fullgraph=True, backend="aot_eager")(*inputs.values())
    j.check("torch.compile gives the same bits", "call", all(same_bits(out[k], eager[k]) for k in eager))
    leaves = [t for t in inputs.values() if t.requires_grad]
    if leaves:
        through = _differentiable(spec, eager)
        gy = [make_gradient(spec, p, NORMAL, o, k) for k, o in through.items()]
        want = torch.autograd.grad(list(through.values()), leaves, gy, materialize_grads=True)
        with j.tested("torch.compile, backward"):
            found = torch.autograd.grad([out[k] for k in through], leaves, gy, materialize_grads=True)
        j.check("torch.compile gives the same bits", "backward", all(map(same_bits, found, want)))
    torch._dynamo.reset()


def _differentiable(spec: OpSpec, out: Tensors) -> Tensors:
    return {k: o for k, o in out.items() if o.is_floating_point() and k not in spec.without_gradient}


def _fresh(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    return {
        k: (t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach().clone()).requires_grad_(
            t.requires_grad
        )
        for k, t in tensors.items()
    }


def _close(j: Judgement, of: str, out: torch.Tensor, plain: torch.Tensor, oracle: torch.Tensor) -> None:
    """Twice plain PyTorch's error under the same autocast, with bf16's rounding as the floor."""
    if not out.numel():
        return
    norm = oracle.double().norm().clamp_min(1e-300)
    error, theirs = (float((t.detach().double() - oracle).norm() / norm) for t in (out, plain))
    allowed = 2 * theirs + CAP_L2[torch.bfloat16]
    j.check("autocast", of, error <= allowed, error / allowed, f"relative L2 {error:.2e} (allowed {allowed:.2e})")
