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
from sparktune.ops.spec import OpSpec, Problem, Tensors

from sparkproof.judge import huge
from sparkproof.judge.compare import degenerate, measure, outside, same_bits, unlike_nonfinite
from sparkproof.judge.families import FAMILIES, FAR, NORMAL, WIDE_FAMILIES, Family, make_gradient, make_inputs
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
            for part in (trial.normal, trial.families):
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
        self._guard(lambda: self.laws(spec.problem("typical", dtype, variant)))

    def families(self, variant: str, dtype: torch.dtype, name: str) -> None:
        """The other input families, and the huge case."""
        spec, j = self.spec, self.j
        for size, families in (("typical", FAMILIES), ("wide", WIDE_FAMILIES)):
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
        """One problem under one family: output, gradients, and what must not have changed."""
        spec, j = self.spec, self.j
        inputs = make_inputs(spec, p, family, self.device)
        before = {k: t.detach().clone() for k, t in inputs.items()}
        dispatch.reset()
        with j.tested("call"), poisoned():
            out = self.tested.call(inputs, p)
        counts = dispatch.watermarks().get(spec.name, {})
        launched = sum(dispatch.launches().values())
        ran = bool(counts) and counts["reference"] == 0 and (launched > 0 or out.numel() == 0)
        j.check("the kernel ran", "call", ran, detail=f"{launched} launches, {counts}")

        plain_in, oracle_in = leaves(inputs), leaves(inputs, torch.float64)
        plain = spec.reference(plain_in, p, None)
        oracle = spec.reference(oracle_in, p, torch.float64)
        self.compare("out", out, plain, oracle, family, size)
        if spec.exact is not None and out.shape == plain.shape and out.numel():
            slack = max(spec.exact_slack, INTERPRETER_SLACK if j.mode == "interpreter" else 0.0)
            low, high = spec.exact(inputs, p, slack)
            wrong = outside(out, low, high)
            j.check("rounding order", "out", wrong == 0, detail=f"{wrong} of {out.numel()} elements outside it")
        if spec.peer is not None and family is NORMAL and out.numel():
            self.peer(inputs, p, out)
        self.unchanged("call", inputs, before)
        wanted = [k for k, t in inputs.items() if t.requires_grad]
        if wanted:
            self.gradients(p, size, family, inputs, before, wanted, out, (plain, plain_in), (oracle, oracle_in))

    def gradients(
        self, p: Problem, size: str, family: Family, inputs: Tensors, before: Tensors, wanted: list[str],
        out: torch.Tensor, plain: tuple[torch.Tensor, Tensors], oracle: tuple[torch.Tensor, Tensors],
    ) -> None:  # fmt: skip
        """Every gradient against the oracle; twice, since a backward that spoils what was saved is right only once."""
        j = self.j
        gy = make_gradient(self.spec, p, family, out)
        gy_before = gy.clone()

        def grad(y: torch.Tensor, of: Tensors, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(y, [of[k] for k in wanted], g, retain_graph=True)

        with j.tested("backward"), poisoned():
            first = grad(out, inputs, gy)
        j.check("output gradient unchanged", "backward", same_bits(gy, gy_before))
        self.unchanged("backward", inputs, before)
        with j.tested("second backward"), poisoned():
            again = grad(out, inputs, gy)
        j.check("second backward gives the same bits", "backward", all(map(same_bits, first, again)))
        plain_grads, oracle_grads = grad(*plain, gy), grad(*oracle, gy.double())
        for k, g, pg, og in zip(wanted, first, plain_grads, oracle_grads, strict=True):
            summed = self.spec.inputs(p)[k].role == "parameter"
            scale = gy.double().pow(2).mean().sqrt() if size == "one" else None
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
        if family.finite and size not in ("one", "no rows", "no columns"):
            why = degenerate(oracle, constant_ok=family.values == "equal")
            if why:
                raise Unsound(f"{j.op} ({j.where}): the oracle's {of} is {why}, so it proves nothing")
        wrong = unlike_nonfinite(result, plain, oracle)
        j.check("NaN and Inf", of, wrong == 0, detail=f"{wrong} elements NaN, Inf or finite where they must not be")
        e = measure(result, plain, oracle, scale=scale, summed=summed, exempt_cap=size == "one")
        j.check("error", of, e.ratio <= 1, e.ratio, e.sentence())

    def unchanged(self, after: str, inputs: Tensors, before: Tensors) -> None:
        """No input was written to."""
        changed = [k for k, t in inputs.items() if not same_bits(t, before[k])]
        self.j.check("inputs unchanged", after, not changed, detail=", ".join(changed) or "none written to")

    def peer(self, inputs: Tensors, p: Problem, out: torch.Tensor) -> None:
        """Bit for bit what an independent implementation gives, where it is installed."""
        peer = self.spec.peer
        assert peer is not None
        if importlib.util.find_spec(peer.package) is None:
            note = f"{peer.name} is not installed: {self.spec.name} was not compared with it"
            if note not in self.j.not_run:
                self.j.not_run.append(note)
            return
        theirs = peer.call(leaves(inputs), p)
        self.j.check(f"same bits as {peer.name}", "out", same_bits(out, theirs.reshape(out.shape)))

    def laws(self, p: Problem) -> None:
        """Metamorphic laws, the same bits twice, and a second derivative refused rather than wrong."""
        spec, j = self.spec, self.j
        inputs = leaves(make_inputs(spec, p, NORMAL, self.device))
        constants = {k: t.detach() for k, t in inputs.items()}
        for law in spec.laws:
            with j.tested(law.name):
                sides = law.sides(self.tested.call, constants, p)
            if sides is None:
                continue
            left, right = (s.double() for s in sides)
            off = float(((left - right).abs() / torch.maximum(left.abs(), right.abs()).clamp_min(1e-30)).max())
            if (
                law.tolerance
            ):  # relative to the tensor, since a difference of nearly equal halves has no relative accuracy
                off = float((left - right).abs().max() / right.pow(2).mean().sqrt())
            j.check(
                "law", law.name, off <= law.tolerance, detail=f"sides differ by {off:.1e} (allowed {law.tolerance:.0e})"
            )
        with j.tested("call"):
            twice = self.tested.call(constants, p), self.tested.call(constants, p)
        j.check("same bits twice", "call", same_bits(*twice))
        if not any(t.requires_grad for t in inputs.values()):
            return
        with j.tested("call"):
            y = self.tested.call(inputs, p)
        refused = ""
        try:
            torch.autograd.grad(
                y.float().pow(2).sum(), [t for t in inputs.values() if t.requires_grad], create_graph=True
            )
        except RuntimeError as e:
            refused = str(e)
        j.check(
            "second derivative refused by name", "backward", spec.name in refused, detail=refused or "it was computed"
        )
