"""From rounds to a verdict: who is right, how fast each is against hf, and sparktune against the best of the others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from sparkproof.bench.document import Interval
from sparkproof.bench.train.document import Canary, EngineSteps, Memory, ModelSteps, Round
from sparkproof.bench.train.setting import OURS, REFERENCE, WORDS
from sparkproof.judge import nested, stats
from sparkproof.judge.stats import CANARY_BAND

LOSS_BOUND = 0.02  # absolute; losses of random weights lie near log(vocabulary), about 12
NORM_BOUND = 0.02  # relative


def samples(e: EngineSteps) -> list[list[float]]:
    """Milliseconds, a list a round."""
    return [r.step_ms for r in e.rounds]


def finish(m: ModelSteps) -> None:
    """Set everything that follows from the rounds."""
    by_name = {e.name: e for e in m.engines}
    reference = by_name.get(REFERENCE)
    for e in m.engines:
        if e.rounds:
            _summary(e, m)
        if e.status == "timed" and e.rounds:
            _check(e, reference)
    if reference is not None and reference.status == "timed" and reference.rounds:
        for e in m.engines:
            if e is not reference and e.rounds and e.status in ("timed", "wrong"):
                e.speedup = Interval.of(nested.ratio(samples(reference), samples(e)))
    _verdict(m, by_name)


def _summary(e: EngineSteps, m: ModelSteps) -> None:
    ms = nested.median(samples(e))
    rate = 1e3 * m.setting.tokens
    e.step_ms = Interval.of(ms)
    e.tokens_per_s = Interval(value=rate / ms.value, low=rate / ms.high, high=rate / ms.low)
    e.useful_tflop_s = 1e3 * m.useful_tflop / ms.value
    e.light = m.floor.floor_ms / ms.value if m.floor else None
    e.memory = _largest([r.memory for r in e.rounds])
    e.load_s, e.first_step_s = e.rounds[0].load_s, e.rounds[0].first_step_s


def _largest(found: Sequence[Memory]) -> Memory:
    names = list(Memory.model_fields)
    known = {n: [v for v in (getattr(x, n) for x in found) if v is not None] for n in names}
    return Memory(**{n: max(v) for n, v in known.items() if v})


def _first(r: Round) -> tuple[float, float] | None:
    loss, norm = r.loss[0], r.gradient_norm[0]
    return None if loss is None or norm is None else (loss, norm)


def _check(e: EngineSteps, reference: EngineSteps | None) -> None:
    """Hold step 0 of each round to hf's first round."""
    right = _first(reference.rounds[0]) if reference is not None and reference.rounds else None
    if right is None or right[1] == 0:
        e.status, e.reason = "unchecked", f"{REFERENCE} gave no finite loss and gradient norm to compare with"
        return
    e.loss_difference = e.norm_difference = 0.0
    for r in e.rounds:
        mine = _first(r)
        if mine is None:
            e.status, e.reason = "wrong", f"loss or gradient norm of step 0 is not finite in round {r.number}"
            e.loss_difference = e.norm_difference = None
            return
        loss, norm = abs(mine[0] - right[0]), abs(mine[1] / right[1] - 1)
        e.loss_difference, e.norm_difference = max(e.loss_difference, loss), max(e.norm_difference, norm)
    said = []
    if e.loss_difference > LOSS_BOUND:
        said.append(f"loss of step 0 is {e.loss_difference:.3f} from {REFERENCE}'s (at most {LOSS_BOUND})")
    if e.norm_difference > NORM_BOUND:
        said.append(f"gradient norm of step 0 is {e.norm_difference:.1%} from {REFERENCE}'s (at most {NORM_BOUND:.0%})")
    if said:
        e.status, e.reason = "wrong", "; ".join(said)


def _verdict(m: ModelSteps, by_name: dict[str, EngineSteps]) -> None:
    right = {k: e for k, e in by_name.items() if e.status == "timed" and e.rounds}
    others = [e for k, e in right.items() if k != OURS]
    if OURS not in right or not others:
        missing = REFERENCE if REFERENCE not in right else OURS
        cause = by_name.get(missing)
        if cause is not None and not m.error and cause.status != "not reached":
            m.error = f"no verdict, since {missing} is {cause.status}: {cause.reason}"
        return
    best = min(others, key=lambda e: e.step_ms.value if e.step_ms else float("inf"))
    against = nested.ratio(samples(best), samples(right[OURS]))
    m.best_other, m.against_best = best.name, Interval.of(against)
    if m.setting.device == "cpu":
        return
    m.verdict = "no difference" if against.spans(1.0) else "faster" if against.value > 1 else "slower"
    m.sentence = stats.verdict(against, WORDS[best.name])


def canary(models: Sequence[ModelSteps]) -> Canary | None:
    """Every process's large copy against their median."""
    found = {
        f"{m.setting.model}, {e.name}, round {r.number}": r.copy_gb_s
        for m in models for e in m.engines for r in e.rounds if r.copy_gb_s
    }  # fmt: skip
    return drift(found)


def drift(found: Mapping[str, float]) -> Canary | None:
    """Copies of several processes, GB/s, against their median; None without any."""
    if not found:
        return None
    middle = statistics.median(found.values())
    largest = max((v / middle - 1 for v in found.values()), key=abs)
    return Canary(samples=dict(found), drift=largest, band=CANARY_BAND)
