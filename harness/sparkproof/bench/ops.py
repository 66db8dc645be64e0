"""`sparkproof bench ops`: every op against every engine that has it, interleaved, row by row."""

from __future__ import annotations

import gc
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparkproof.bench import cases, engines, guard, intervals
from sparkproof.bench.cases import Call, Case, Inputs
from sparkproof.bench.document import Canary, Document, EngineInfo, EngineTime, Interval, LeftOut, PassTimes, RowTimes
from sparkproof.bench.shapes import Pass, Row
from sparkproof.bench.timing import Clock, Run, Timer, free_memory
from sparkproof.errors import UserError
from sparkproof.judge import stats
from sparkproof.judge.speed import copy_bandwidth
from sparkproof.judge.stats import CANARY_BAND

SAMPLES = 5
OURS = "sparktune"
SOFTWARE = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth", "unsloth_zoo")
OUT_OF_MEMORY = torch.cuda.OutOfMemoryError
Progress = Callable[[str], None]


@dataclass
class Bench:
    """A run: which engines, which clock, how long it may take."""

    clock: Clock
    device: torch.device
    names: Sequence[str] = engines.NAMES
    budget: float = float("inf")
    samples: int = SAMPLES
    progress: Progress = lambda line: None
    started: float = field(default_factory=time.monotonic)
    slowest: float = 0.0
    # (engine, op, pass) -> why its calls can't be captured. Not tried again with the next size: a capture that fails keeps
    # its memory for good, and 19 of them left no room for rows of 16384 tokens on a GPU of 140 GiB.
    uncaptured: dict[tuple[str, str, Pass], str] = field(default_factory=dict)

    def rows(self, wanted: Sequence[Row], copy_gb_s: list[float]) -> tuple[list[RowTimes], list[LeftOut]]:
        """Measure row by row until the budget ends: a row starts only if one like the longest so far still fits."""
        done: list[RowTimes] = []
        refused = {name: engines.refusal(name) for name in self.names}
        for i, row in enumerate(wanted):
            left = self.budget - (time.monotonic() - self.started)
            if left < self.slowest or left <= 0:
                reason = f"the budget of {self.budget:.0f} s was used up"
                return done, [LeftOut(row=r.title, reason=reason) for r in wanted[i:]]
            self.progress(f"[{i + 1}/{len(wanted)}] {row.title}")
            start = time.monotonic()
            found = self._row(row, refused, copy_gb_s)
            found.seconds = round(time.monotonic() - start, 2)
            # The first row also imports the engines; it must not make the others look as long.
            self.slowest = max(self.slowest, found.seconds) if i else 0.0
            done.append(found)
        return done, []

    def _row(self, row: Row, refused: dict[str, str], copy_gb_s: list[float]) -> RowTimes:
        kind = row.kind
        found = RowTimes(
            op=kind.op, part=kind.part, model=row.model.name, tokens=row.tokens, bound=kind.bound, dims={}, input_sets=0,
            passes=[],
        )  # fmt: skip
        try:
            case = cases.build(row, self.device)
            found.dims = case.dims
            status, calls = self._calls(case, refused)
            count = self.clock.sets(case.touched)
            sets = [case.make(i) for i in range(count)]
            found.input_sets = count
            for which in kind.passes:
                found.passes.append(self._pass(case, which, calls, dict(status), sets, copy_gb_s))
        except Exception as e:
            found.error = _said(e)
        case = calls = sets = None  # type: ignore[assignment]
        free_memory()
        return found

    def _calls(self, case: Case, refused: dict[str, str]) -> tuple[dict[str, EngineTime], dict[str, Call]]:
        """Build each engine's call and hold it to the reference; what can't be timed has its reason instead."""
        status: dict[str, EngineTime] = {}
        calls: dict[str, Call] = {}
        op, reference, why = case.row.kind.op, None, ""
        try:
            from sparkproof.bench.engines import hf

            reference = guard.run(case, case.reference or hf.BUILDERS[op](case))
            if not guard.finite(reference):
                reference, why = None, "the reference itself is not finite"
        except Exception as e:
            why = f"the reference itself failed: {_said(e)}"
        for name in self.names:
            file = engines.load(name)
            reason = refused[name] or file.MISSING.get(op, "")
            if reason or op not in file.BUILDERS:
                status[name] = EngineTime(name=name, status="missing", reason=reason or "it has no such op")
                continue
            try:
                call = file.BUILDERS[op](case)
                right = guard.run(case, call)
                if reference is None:
                    raise guard.WrongResult(why)
                errors = guard.check(right, reference)
                status[name] = EngineTime(name=name, status="timed", output_error=errors[0], gradient_error=errors[1])
                calls[name] = call
            except guard.WrongResult as e:
                status[name] = EngineTime(name=name, status="wrong", reason=str(e))
            except Exception as e:
                status[name] = EngineTime(name=name, status="failed", reason=_said(e))
            right = None  # type: ignore[assignment]
        return status, calls

    def _pass(
        self, case: Case, which: Pass, calls: dict[str, Call], status: dict[str, EngineTime], sets: list[Inputs],
        copy_gb_s: list[float],
    ) -> PassTimes:  # fmt: skip
        status = {k: v.model_copy() for k, v in status.items()}
        op = case.row.kind.op
        builders: dict[str, Callable[[], tuple[Run, int]]] = {}
        for name, call in calls.items():
            writes = op in engines.load(name).WRITES
            builders[name] = lambda call=call, writes=writes: _run(case, which, call, sets, writes)  # type: ignore[misc]
        yardsticks = self._yardsticks(case, which)
        # Other optimisers wait for the device in their step, which ends a capture and more than that.
        why_not = {name: "not captured" for name in calls if which == "step" and name != OURS}
        why_not |= {name: self.uncaptured[name, op, which] for name in calls if (name, op, which) in self.uncaptured}
        timed, failed, alone = self._interleaved(yardsticks | builders, why_not)
        self.uncaptured |= {(name, op, which): t.reason for name, t in timed.items() if t.method == "events"}
        for name, reason in failed.items():
            if name in status:
                status[name].status, status[name].reason = "failed", reason
        measured = {k: v.samples for k, v in timed.items()}
        sticks = {k: measured[k] for k in yardsticks if k in measured}
        best = min(sticks, key=lambda k: statistics.median(sticks[k]), default="")
        size, flops = (case.bytes.get(which, 0), 0) if case.row.kind.bound == "memory" else (0, case.flops(which))
        for name, t in timed.items():
            if name not in status:
                continue
            s = status[name]
            s.ms, s.samples = Interval.of(intervals.median(t.samples)), t.samples
            s.method, s.call_us = t.method, round(t.call_us, 1)  # type: ignore[assignment]
            s.note = "; ".join(n for n in (t.reason, alone) if n)
            if best:
                s.fraction = Interval.of(intervals.ratio(sticks[best], t.samples))
            if size:
                s.big_copy_fraction = Interval.of(intervals.ratio([size / ms / 1e6 for ms in t.samples], copy_gb_s))
        found = PassTimes(
            which=which, bytes=size, flops=flops, yardstick=best or "none", engines=list(status.values()),
            yardstick_ms=Interval.of(intervals.median(sticks[best])) if best else None,
        )  # fmt: skip
        judge(found)
        return found

    def _yardsticks(self, case: Case, which: Pass) -> dict[str, Callable[[], tuple[Run, int]]]:
        if case.row.kind.bound == "matrix":
            return {"bare GEMM": lambda: _gemms(case, which, self.clock)}
        size = case.bytes[which]
        ways: dict[str, tuple[Run, int]] = {}

        def way(name: str) -> tuple[Run, int]:
            if not ways:
                ways.update(self.clock.copy(size))
            return ways[name]

        return {n: (lambda n=n: way(n)) for n in ("copy by the driver", "copy by a kernel")}  # type: ignore[misc]

    def _interleaved(
        self, builders: dict[str, Callable[[], tuple[Run, int]]], why_not: dict[str, str]
    ) -> tuple[dict[str, Timed], dict[str, str], str]:
        """(name -> samples, name -> why it failed, a note): engines take turns, or go one by one where memory wants it."""
        with suppress(OUT_OF_MEMORY):
            return *self._turns(builders, False, why_not), ""
        free_memory()  # not in an except clause, where the traceback still holds what did not fit
        timed: dict[str, Timed] = {}
        failed: dict[str, str] = {}
        for name, build in builders.items():
            one, wrong = self._turns({name: build}, True, why_not)
            timed, failed = timed | one, failed | wrong
            free_memory()
        return timed, failed, "timed apart from the others, which did not fit beside it"

    def _turns(
        self, builders: dict[str, Callable[[], tuple[Run, int]]], patient: bool, why_not: dict[str, str]
    ) -> tuple[dict[str, Timed], dict[str, str]]:
        timers: dict[str, Timer] = {}
        failed: dict[str, str] = {}
        samples: dict[str, list[float]] = {}
        try:
            for name, build in builders.items():
                try:
                    timers[name] = self.clock.timer(*build(), why_not.get(name, ""))
                except OUT_OF_MEMORY as e:
                    if not patient:
                        raise
                    failed[name] = _said(e)
                except Exception as e:
                    failed[name] = _said(e)
            for _ in range(self.samples):
                for name in [n for n in timers if n not in failed]:
                    try:
                        samples.setdefault(name, []).append(timers[name].sample())
                    except OUT_OF_MEMORY as e:
                        if not patient:
                            raise
                        failed[name] = _said(e)
                    except Exception as e:
                        failed[name] = _said(e)
            timed = {n: Timed(samples[n], t.method, t.reason, t.call_us) for n, t in timers.items() if n not in failed}
            return timed, failed
        finally:
            for t in timers.values():
                t.free()
            timers.clear()


@dataclass(frozen=True)
class Timed:
    """What one engine's timer gave."""

    samples: list[float]
    method: str
    reason: str
    call_us: float


def _said(e: BaseException) -> str:
    lines = str(e).strip().splitlines() or [""]
    return f"{type(e).__name__}: {lines[0][:300]}".rstrip(": ")


def _run(case: Case, which: Pass, call: Call, sets: list[Inputs], writes: bool) -> tuple[Run, int]:
    """What one call does, given its number. Forward runs as in training, saving what backward needs."""
    if writes:
        sets = [guard.own(s) for s in sets]
    count = len(sets)
    if which in ("forward", "step"):
        return lambda i: guard.called(case, call, sets[i % count]), count
    wanted = [[s[g] for g in case.grads] + case.parameters for s in sets]
    if which == "forward+backward":
        gy = guard.gradients_for(guard.called(case, call, guard.own(sets[0])))

        def both(i: int) -> Any:
            out = [y for y in guard.called(case, call, sets[i % count]) if y.requires_grad]
            return torch.autograd.grad(out, wanted[i % count], gy)

        return both, count
    outputs: list[list[Tensor]] = []
    for s in sets:
        outputs.append([y for y in guard.called(case, call, s) if y.requires_grad])
    own_gy = [guard.gradients_for(tuple(ys), seed=5 + 10 * j) for j, ys in enumerate(outputs)]

    def backward(i: int) -> Any:
        k = i % count
        return torch.autograd.grad(outputs[k], wanted[k], own_gy[k], retain_graph=True)

    return backward, count


def _gemms(case: Case, which: Pass, clock: Clock) -> tuple[Run, int]:
    """The pass's bare products, x [M, K] W [N, K]^T forward and dy [M, N] W [N, K] backward, one after the other."""
    made = []
    g = torch.Generator(case.device)
    for m, n, k in case.gemms[which]:
        a, b = (torch.randn(s, device=case.device, dtype=torch.bfloat16, generator=g) for s in ((m, k), (n, k)))
        made.append((a, b, torch.empty(m, n, device=case.device, dtype=torch.bfloat16)))

    def run(i: int) -> None:
        for a, b, out in made:
            torch.mm(a, b.t(), out=out)

    return run, 1


def judge(found: PassTimes) -> None:
    """Set the best peer, and the verdict against it."""
    timed = {e.name: e for e in found.engines if e.status == "timed" and e.samples}
    peers = {k: e for k, e in timed.items() if k != OURS}
    if OURS not in timed or not peers:
        return
    best = min(peers.values(), key=lambda e: statistics.median(e.samples))
    speedup = intervals.ratio(best.samples, timed[OURS].samples)
    found.best_peer, found.speedup = best.name, Interval.of(speedup)
    found.verdict = "no difference" if speedup.spans(1.0) else "faster" if speedup.value > 1 else "slower"
    found.sentence = stats.verdict(speedup, engines.WORDS[best.name])


def software() -> dict[str, str]:
    """The versions of what was measured."""
    found = {}
    for name in SOFTWARE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def need_gpu() -> torch.device:
    """The GPU that is measured. Errors: UserError, one sentence, where there is none."""
    if not torch.cuda.is_available():
        raise UserError(
            "`sparkproof bench ops` times kernels on a GPU, and torch sees none here.",
            "Run it on the machine with the GPU; `sparkproof doctor` says why torch can't see one.",
        )
    return torch.device("cuda", torch.cuda.current_device())


def measure(wanted: Sequence[Row], names: Sequence[str], budget: float, progress: Progress) -> Document:
    """The whole run on this GPU. Errors: UserError without one."""
    from sparktune.ops.device import DeviceProperties

    from sparkproof.bench import warm
    from sparkproof.bench.engines import hf
    from sparkproof.bench.timing import GpuClock

    started = time.monotonic()
    device = need_gpu()
    properties = DeviceProperties.of(device)
    clock = GpuClock(device, properties.l2_bytes)  # its stream is current before any library looks for one
    infos = [
        EngineInfo(name=n, words=engines.WORDS[n], version=engines.version(n), missing=engines.refusal(n))
        for n in names
    ]
    notes = []
    present = [i.name for i in infos if not i.missing]
    with warm.started([r for r in wanted], present, min(150.0, 0.45 * budget), progress) as warming:
        if "unsloth" in present:
            hf.capture()
            from sparkproof.bench.engines import unsloth

            try:
                unsloth.kernels()
            except Exception as e:  # each row of its says so too
                notes.append(f"Unsloth could not be imported: {_said(e)}")
            if unsloth.replaced:
                notes.append("Put back after Unsloth's import replaced it: " + ", ".join(unsloth.replaced) + ".")
        notes += warming.wait()
    gc.collect()
    gc.freeze()  # each row collects; what was imported need not be looked through every time
    before = copy_bandwidth(properties)
    bench = Bench(clock, device, names, budget, progress=progress, started=started)
    rows, left_out = bench.rows(wanted, before)
    after = copy_bandwidth(properties)
    drift = statistics.median(after) / statistics.median(before) - 1
    return Document(
        device=torch.cuda.get_device_name(device), multiprocessors=properties.sm_count, l2_bytes=properties.l2_bytes,
        software=software(), engines=infos, trusted=abs(drift) <= CANARY_BAND, rows=rows, left_out=left_out, notes=notes,
        canary=Canary(before=before, after=after, drift=drift, band=CANARY_BAND),
        copy_gb_s=Interval.of(intervals.median(before)), seconds=round(time.monotonic() - started, 1),
    )  # fmt: skip
