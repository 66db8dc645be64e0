"""The judge: one op against its oracle, its rounding order, its laws, and the promises about memory.

`judge(spec)` runs the op in the mode the process has: the interpreter (TRITON_INTERPRET=1) or a CUDA GPU; without
either it refuses, since the reference would be compared with itself. `tested` lets a mutated module stand trial
against the original's reference.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from sparktune.ops import dispatch
from sparktune.ops.spec import OpSpec, Problem, Tensors, named

from sparkproof.judge import huge, promises
from sparkproof.judge.compare import degenerate, measure, outside, same_bits, shares_memory, unlike_nonfinite
from sparkproof.judge.families import (
    FAMILIES,
    FAR,
    FEW_FAMILIES,
    NORMAL,
    WIDE_FAMILIES,
    Family,
    make_gradient,
    make_inputs,
)
from sparkproof.judge.interpreter import last_programs_first
from sparkproof.judge.record import FirstFailure, Judgement, Raised, Unsound

INTERPRETER_SLACK = 2.0**-20  # numpy's exp and PyTorch's differ by a few fp32 units
SPECIAL_SIZES = ("far", "huge", "speed")


def mode_here() -> tuple[str, torch.device]:
    """("gpu", its device) or ("interpreter", the CPU). Errors: RuntimeError where no kernel would run."""
    if dispatch.INTERPRETED:
        return "interpreter", torch.device("cpu")
    if torch.cuda.is_available():
        return "gpu", torch.device("cuda", torch.cuda.current_device())
    raise RuntimeError(
        "No kernel runs here: start the process with TRITON_INTERPRET=1, or on a machine with a CUDA GPU."
    )


def judge(
    spec: OpSpec,
    *,
    tested: OpSpec | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    variants: Sequence[str] | None = None,
    stop_at_first: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Judgement:
    """Judge `tested` (default: `spec` itself) by `spec`'s reference, for some or all dtypes and variants."""
    mode, device = mode_here()
    j = Judgement(spec.name, mode, stop_at_first)
    trial = _Trial(spec, tested or spec, j, device)
    with contextlib.suppress(FirstFailure):
        for dtype in dtypes or spec.dtypes:
            for part in (trial.normal, trial.families, trial.users):
                for variant in variants or spec.variants:
                    name = f"{variant} {str(dtype).removeprefix('torch.')}".strip()
                    progress(f"{spec.name} {name}")
                    part(variant, dtype, name)
    return j


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty and its kin holds NaN, or the largest integer, so that what is never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def leaves(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Fresh contiguous leaves with the same values, floating ones in `dtype` if given."""
    made = {}
    for name, t in tensors.items():
        c = t.detach().clone(memory_format=torch.contiguous_format)
        if dtype is not None and c.is_floating_point():
            c = c.to(dtype)
        made[name] = c.requires_grad_(t.requires_grad)
    return made


@dataclass
class _Trial:
    spec: OpSpec
    tested: OpSpec
    j: Judgement
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the problem being judged

    def normal(self, variant: str, dtype: torch.dtype, name: str) -> None:
        """All sizes with normal values, and the laws. This comes first for every variant: most faults show here."""
        spec, j = self.spec, self.j
        for size in spec.sizes:
            if size not in SPECIAL_SIZES:
                self._one(name, spec.problem(size, dtype, variant), size, NORMAL)
        # The interpreter's memory is the CPU's, where address space costs nothing; on a GPU the huge case does this.
        if "far" in spec.sizes and self.device.type == "cpu" and dtype.itemsize == 2:
            self._one(name, spec.problem("far", dtype, variant), "far", FAR)
        j.where = f"{name}, typical"
        typical = spec.problem("typical", dtype, variant)
        self._guard(lambda: promises.laws(spec, self.tested, j, typical, self.device))

    def users(self, variant: str, dtype: torch.dtype, name: str) -> None:
        """What is done to an op in practice: autocast and torch.compile."""
        self.j.where = f"{name}, typical"
        p = self.spec.problem("typical", dtype, variant)
        self._guard(lambda: promises.autocast(self.spec, self.tested, self.j, p, self.device))
        self._guard(lambda: promises.compiled(self.spec, self.tested, self.j, p, self.device))

    def families(self, variant: str, dtype: torch.dtype, name: str) -> None:
        """The other input families, and the huge case."""
        spec, j = self.spec, self.j
        # A product's variants share their kernels, and take long in the interpreter: the first one meets every family.
        every = FAMILIES if spec.bound == "memory" or variant == spec.variants[0] else FEW_FAMILIES
        for size, families in (("typical", every), ("wide", WIDE_FAMILIES)):
            for family in families if size in spec.sizes else ():
                if family is not NORMAL and not (family.gradient != "contiguous" and not spec.has_backward):
                    self._one(name, spec.problem(size, dtype, variant), size, family)
        if "huge" in spec.sizes and dtype == torch.bfloat16:
            j.where = f"{name}, over 2**31 elements"
            self._guard(lambda: huge.judge(spec, self.tested, j, spec.problem("huge", dtype, variant), self.device))

    def _one(self, name: str, p: Problem, size: str, family: Family) -> None:
        self.j.where = f"{name}, {size}, {family.name}"
        self._guard(lambda: self.one(p, size, family))

    def _guard(self, part: Callable[[], None]) -> None:
        """Go on with the next part after the op raised; that it did is written down."""
        with contextlib.suppress(Raised):
            part()

    def one(self, p: Problem, size: str, family: Family) -> None:
        """One problem under one family: outputs, gradients, and what must not have changed."""
        spec, j, self.dtype = self.spec, self.j, p.dtype
        inputs = make_inputs(spec, p, family, self.device)
        before = {k: t.detach().clone() for k, t in inputs.items()}
        dispatch.reset()
        with j.tested("call"), poisoned():
            out = named(self.tested.call(inputs, p))
        counts = dispatch.watermarks().get(spec.name, {})
        launched = sum(dispatch.launches().values())
        ran = bool(counts) and counts["reference"] == 0
        ran &= launched > 0 or not any(t.numel() for t in out.values()) or not any(t.numel() for t in inputs.values())
        j.check("the kernel ran", "call", ran, detail=f"{launched} launches, {counts}")

        plain_in, oracle_in = leaves(inputs), leaves(inputs, torch.float64)
        plain = named(spec.reference(plain_in, p, None))
        oracle = named(spec.reference(oracle_in, p, torch.float64))
        alike = out.keys() == plain.keys()
        j.check("named outputs", "call", alike, detail=", ".join(out))
        if not alike:
            return
        for k, o in out.items():
            self.compare(k, o, plain[k], oracle[k], family, size)
        if spec.exact is not None and all(out[k].shape == plain[k].shape for k in out):
            slack = max(spec.exact_slack, INTERPRETER_SLACK if j.mode == "interpreter" else 0.0)
            low, high = map(named, spec.exact(inputs, p, slack))
            for k in low:
                wrong = outside(out[k], low[k], high[k])
                if out[k].numel():
                    j.check("rounding order", k, wrong == 0, detail=f"{wrong} of {out[k].numel()} elements outside it")
        if spec.peer is not None and family is NORMAL and all(t.numel() for t in out.values()):
            self.peer(inputs, p, out)
        self.unchanged("call", inputs, before)
        shared = [k for k, o in out.items() if any(shares_memory(o, t) for t in inputs.values())]
        j.check("outputs are new memory", "call", not shared, detail=", ".join(shared) or "none shares an input's")
        wanted = [k for k, t in inputs.items() if t.requires_grad]
        if wanted:
            self.gradients(p, size, family, inputs, before, wanted, out, (plain, plain_in), (oracle, oracle_in))

    def gradients(
        self, p: Problem, size: str, family: Family, inputs: Tensors, before: Tensors, wanted: list[str],
        out: Tensors, plain: tuple[Tensors, Tensors], oracle: tuple[Tensors, Tensors],
    ) -> None:  # fmt: skip
        """Every gradient against the oracle; twice, since a backward that spoils what was saved is right only once."""
        j = self.j
        through = [k for k, o in out.items() if o.is_floating_point() and k not in self.spec.without_gradient]
        gy = {k: make_gradient(self.spec, p, family, out[k], k) for k in through}
        gy_before = {k: g.clone() for k, g in gy.items()}

        def grad(of: Tensors, to: Tensors, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
            grads = [g if dtype is None else g.to(dtype) for g in gy.values()]
            return torch.autograd.grad(
                [of[k] for k in through], [to[k] for k in wanted], grads, retain_graph=True, materialize_grads=True
            )

        with j.tested("backward"), poisoned():
            first = grad(out, inputs)
        j.check("output gradient unchanged", "backward", all(same_bits(gy[k], gy_before[k]) for k in through))
        self.unchanged("backward", inputs, before)
        shared = [
            k for k, g in zip(wanted, first, strict=True) if any(shares_memory(g, t) for t in (*gy.values(), *inputs.values()))
        ]  # fmt: skip
        j.check("gradients are new memory", "backward", not shared, detail=", ".join(shared) or "none shares another's")
        with j.tested("second backward"), poisoned(), last_programs_first():
            again = grad(out, inputs)
        j.check("second backward gives the same bits", "backward", all(map(same_bits, first, again)))
        plain_grads, oracle_grads = grad(*plain), grad(*oracle, dtype=torch.float64)
        described = self.spec.inputs(p)
        for k, g, pg, og in zip(wanted, first, plain_grads, oracle_grads, strict=True):
            summed = described[k].role == "parameter"
            scale = None
            if size == "one":
                scale = torch.cat([g.double().flatten() for g in gy.values()]).pow(2).mean().sqrt()
            self.compare(f"gradient of {k}", g, pg, og, family, size, summed=summed, scale=scale)

    def compare(
        self, of: str, result: torch.Tensor, plain: torch.Tensor, oracle: torch.Tensor, family: Family, size: str,
        summed: bool = False, scale: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Shape, dtype, NaN and Inf, and the error rule."""
        j = self.j
        alike = result.shape == plain.shape and result.dtype == plain.dtype
        j.check("shape and dtype", of, alike, detail=f"{tuple(result.shape)} {result.dtype}")
        if not alike or result.numel() == 0:
            return
        if not result.is_floating_point():
            self.codes(of, result, plain)
            return
        zero = family.values == "equal" and of in self.spec.zero_of_equals
        if family.finite and not zero and size not in ("one", "no rows", "no columns"):
            why = degenerate(oracle, constant_ok=family.values == "equal" or family.gradient == "scalar")
            if why:
                raise Unsound(f"{j.op} ({j.where}): the oracle's {of} is {why}, so it proves nothing")
        wrong = unlike_nonfinite(result, plain, oracle, self.spec.nonfinite_kinds)
        j.check("NaN and Inf", of, wrong == 0, detail=f"{wrong} elements NaN, Inf or finite where they must not be")
        e = measure(
            result, plain, oracle, scale=scale, summed=summed, exempt_cap=size == "one", computed_in=self.dtype,
            products=self.spec.bound == "matrix", correlated=family.values == "equal",
        )  # fmt: skip
        j.check("error", of, e.ratio <= 1, e.ratio, e.sentence())

    def codes(self, of: str, result: torch.Tensor, plain: torch.Tensor) -> None:
        """Integers are the reference's; a declared share may be its neighbours."""
        off = (result.long() - plain.long()).abs()
        share, far = float((off > 0).double().mean()), int(off.max())
        allowed = self.spec.integer_slack.get(of, 0.0)
        passed = share <= allowed and far <= (self.spec.integer_distance if allowed else 0)
        detail = f"{share:.2%} differ (allowed {allowed:.2%}), by {far} at most"
        self.j.check("codes", of, passed, detail=detail)

    def unchanged(self, after: str, inputs: Tensors, before: Tensors) -> None:
        """No input was written to."""
        changed = [k for k, t in inputs.items() if not same_bits(t, before[k])]
        self.j.check("inputs unchanged", after, not changed, detail=", ".join(changed) or "none written to")

    def peer(self, inputs: Tensors, p: Problem, out: Tensors) -> None:
        """Bit for bit what an independent implementation gives, where it is installed."""
        peer = self.spec.peer
        assert peer is not None
        if importlib.util.find_spec(peer.package) is None:
            note = f"{peer.name} is not installed: {self.spec.name} was not compared with it"
            if note not in self.j.not_run:
                self.j.not_run.append(note)
            return
        for k, theirs in named(peer.call(leaves(inputs), p)).items():
            self.j.check(f"same bits as {peer.name}", k, same_bits(out[k], theirs.reshape(out[k].shape)))
