"""Two runs side by side: refused when they are not alike, and what got worse as a list, worst first.

Alike means the same device, the same profile and cases, each case with the same scenario (steps, batch, revision ... all of it),
model bytes and way of running. Otherwise a difference would be a percentage of two different things. What may differ is what a
comparison is for: versions, driver, the checkout's commit; those are named.

A measurement is worse when its 95% bootstrap interval of the ratio lies beyond 1 on the wrong side, and its value by more than
the tolerance. One without repeated samples has no interval and is held to the tolerance and to what it says of its own noise.
A case that passed and does not is worse than any percentage. Speeds of a CPU are told and not judged: no canary says how fast it
was just then, and of two like runs a minute apart one was 0.70 (0.66 to 0.83) times as fast as the other (a virtual machine).
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import Field

from sparkproof.bench import intervals
from sparkproof.report.record import device_key
from sparkproof.report.runrecord import RunRecord
from sparkproof.results import CaseResult, Measurement, Strict, Verdict

SCHEMA: Literal["sparkproof/compare/1"] = "sparkproof/compare/1"
ON_CPU = ("host", "reference", "interpreter")  # ways of running
FEWEST = 5  # samples, of each run, for an interval


class Unlike(Strict):
    """Something that makes the two runs incomparable."""

    what: str
    a: str
    b: str


class Change(Strict):
    """One measurement of both runs."""

    case: str
    measurement: str
    unit: str
    a: float
    b: float
    ratio: float = Field(description="b / a.")
    low: float | None = Field(description="Lower end of the ratio's 95% interval; None without samples.")
    high: float | None
    worse: float = Field(description="How many times worse b is than a; below 1: better.")
    judged: Literal["regression", "improvement", "no difference", "a CPU's"]


class Turned(Strict):
    """A case whose verdict is another."""

    case: str
    a: Verdict
    b: Verdict
    reason: str = Field(description="Why it is not passed in the run where it is not.")


class Comparison(Strict):
    """The document of `sparkproof compare --json`."""

    schema_: Literal["sparkproof/compare/1"] = Field(alias="schema")
    a: str
    b: str
    alike: bool
    unlike: list[Unlike] = Field(description="Why they can't be compared; nothing below is filled then.")
    tolerance: float
    differences: list[Unlike] = Field(description="What differs and may: versions, driver, commit.")
    broke: list[Turned] = Field(description="Passed in a, and not in b.")
    mended: list[Turned] = Field(description="Not passed in a, passed in b.")
    retest: list[str] = Field(description="Cases of b whose speed could not be judged.")
    regressions: list[Change] = Field(description="Worst first.")
    improvements: list[Change] = Field(description="Best first.")
    on_cpu: list[Change] = Field(default=[], description="Speeds of a CPU that differ: told, not judged. Worst first.")
    compared: int = Field(description="Measurements that both have and that have a direction.")

    @property
    def exit_code(self) -> int:
        """0: nothing worse; 1: a regression; 2: unlike; 3: speed must be measured again."""
        if not self.alike:
            return 2
        return 1 if self.broke or self.regressions else 3 if self.retest else 0


def compare(a: RunRecord, b: RunRecord, tolerance: float = 0.05) -> Comparison:
    """Compare `b` with the older `a`; `tolerance` is the share by which a value may be worse."""
    unlike = _unlike(a, b)
    found = Comparison(
        schema=SCHEMA, a=a.run_id, b=b.run_id, alike=not unlike, unlike=unlike, tolerance=tolerance, differences=[], broke=[],
        mended=[], retest=[], regressions=[], improvements=[], compared=0,
    )  # fmt: skip
    if unlike:
        return found
    found.differences = _differences(a, b)
    before, after = ({r.name: r for r in run.results} for run in (a, b))
    changes: list[Change] = []
    for name in [n for n in before if n in after]:
        x, y = before[name], after[name]
        if Verdict.PASSED in (x.verdict, y.verdict) and x.verdict is not y.verdict:
            turned = Turned(case=name, a=x.verdict, b=y.verdict, reason=x.reason or y.reason)
            if y.verdict is Verdict.PASSED:
                found.mended.append(turned)
            elif y.verdict is not Verdict.RETEST:
                found.broke.append(turned)
        if y.verdict is Verdict.RETEST:
            found.retest.append(name)
        elif Verdict.RETEST is not x.verdict:
            changes += _changes(x, y, tolerance)
    found.on_cpu = sorted((c for c in changes if c.judged == "a CPU's"), key=lambda c: -c.worse)
    found.compared = len(changes)
    found.regressions = sorted((c for c in changes if c.judged == "regression"), key=lambda c: -c.worse)
    found.improvements = sorted((c for c in changes if c.judged == "improvement"), key=lambda c: c.worse)
    return found


def _unlike(a: RunRecord, b: RunRecord) -> list[Unlike]:
    found: list[Unlike] = []

    def same(what: str, x: Any, y: Any) -> None:
        if x != y:
            found.append(Unlike(what=what, a=_said(x), b=_said(y)))

    if device_key(a.facts) != device_key(b.facts):
        same("device", a.facts.device_sentence(), b.facts.device_sentence())
        if not found:  # two of one kind
            found.append(Unlike(what="device", a=str(device_key(a.facts)), b=str(device_key(b.facts))))
    here, there = a.facts.runs_in, b.facts.runs_in
    if here.where and there.where:
        same("where it ran", here.where, there.where)
        same("image digest", here.digest, there.digest)
    same("profile", a.profile.value, b.profile.value)
    before, after = ({p.name for p in run.header.planned} for run in (a, b))
    same("cases that the other run did not plan", sorted(before - after), sorted(after - before))
    for run, letter in ((a, "a"), (b, "b")):
        if run.missing:
            lost = f"{len(run.missing)} of {len(run.header.planned)} cases have no result, {run.missing[0].name} first"
            found.append(Unlike(what="completeness", a=lost if letter == "a" else "", b=lost if letter == "b" else ""))
    if all(r.verdict is Verdict.SKIPPED for run in (a, b) for r in run.results):
        found.append(Unlike(what="cases that ran", a="none, all were skipped", b="none, all were skipped"))
    for name in [n for n in a.entries if n in b.entries]:
        x, y = a.entries[name], b.entries[name]
        same(f"scenario of {name}", x.digest, y.digest)
        old, new = x.result, y.result
        if Verdict.SKIPPED in (old.verdict, new.verdict):
            continue
        if old.mode and new.mode:
            same(f"what ran in {name}", old.mode, new.mode)
        for key, words in (("base", "model revision"), ("data", "training data")):
            one, other = (_identity(r, key) for r in (old, new))
            if one and other:
                same(f"{words} of {name}", one, other)
    return found


def _identity(result: CaseResult, key: str) -> str:
    part = result.evidence.get(key)
    return str(part.get("revision") or part.get("digest") or "") if isinstance(part, dict) else ""


def _said(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _differences(a: RunRecord, b: RunRecord) -> list[Unlike]:
    def told(run: RunRecord) -> dict[str, str]:
        facts = run.facts
        return {
            **dict(run.header.versions), "commit": run.header.revision, "driver": facts.driver.version or "",
            "operating system": facts.os.version or "", "kernel": facts.os.kernel or "",
        }  # fmt: skip

    x, y = told(a), told(b)
    names = [*x, *(n for n in y if n not in x)]
    return [Unlike(what=n, a=x.get(n, ""), b=y.get(n, "")) for n in names if x.get(n, "") != y.get(n, "")]


def _changes(a: CaseResult, b: CaseResult, tolerance: float) -> list[Change]:
    new = {m.name: m for m in b.measurements}
    pairs = [(m, new[m.name]) for m in a.measurements if m.name in new and m.higher_is_better is not None]
    found = [c for x, y in pairs if x.unit == y.unit if (c := _change(a.name, x, y, tolerance)) is not None]
    for c in found:
        if b.mode in ON_CPU and _is_time(c) and c.judged != "no difference":
            c.judged = "a CPU's"
    return found


def _change(case: str, a: Measurement, b: Measurement, tolerance: float) -> Change | None:
    """None where a ratio has no meaning: a value that is not finite or not above 0."""
    if not all(math.isfinite(v) and v > 0 for v in (a.value, b.value)):
        return None
    ratio = b.value / a.value
    low = high = None
    if min(len(a.samples), len(b.samples)) >= FEWEST and all(v > 0 for v in (*a.samples, *b.samples)):
        interval = intervals.ratio(b.samples, a.samples)
        low, high = interval.low, interval.high
    worse = 1 / ratio if a.higher_is_better else ratio
    certain = low is None or high is None or not low <= 1 <= high
    certain = certain and abs(b.value - a.value) > max(a.noise, b.noise)
    judged: Literal["regression", "improvement", "no difference", "a CPU's"] = "no difference"
    if certain and worse > 1 + tolerance:
        judged = "regression"
    elif certain and worse < 1 / (1 + tolerance):
        judged = "improvement"
    return Change(
        case=case, measurement=a.name, unit=a.unit, a=a.value, b=b.value, ratio=ratio, low=low, high=high, worse=worse,
        judged=judged,
    )  # fmt: skip


def text(c: Comparison) -> str:
    """For people: why not, or what is worse, worst first."""
    if not c.alike:
        lines = [f"{c.a} and {c.b} can't be compared:"]
        return "\n".join([*lines, *(f"  {u.what}: {u.a or '-'} | {u.b or '-'}" for u in c.unlike)])
    lines = [f"differs: {d.what}: {d.a or 'absent'} -> {d.b or 'absent'}" for d in c.differences]
    lines += [f"BROKE     {t.case}: {t.a.value} -> {t.b.value}. {t.reason}" for t in c.broke]
    lines += [f"SLOWER    {_line(x)}" if _is_time(x) else f"WORSE     {_line(x)}" for x in c.regressions]
    lines += [f"RETEST    {name}" for name in c.retest]
    lines += [f"mended    {t.case}: {t.a.value} -> {t.b.value}" for t in c.mended]
    lines += [f"better    {_line(x)}" for x in c.improvements]
    lines += [f"not judged, a CPU's: {_line(x)}" for x in c.on_cpu]
    worse = len(c.broke) + len(c.regressions)
    lines.append(
        f"{worse} worse, {len(c.mended) + len(c.improvements)} better, of {c.compared} measurements compared; "
        f"tolerance {c.tolerance:.0%}."
    )
    return "\n".join(lines)


def _is_time(c: Change) -> bool:
    return c.unit in ("s", "ms", "us", "tokens/s", "GB/s", "TFLOP/s")


def _line(c: Change) -> str:
    span = f" ({c.low:.3g} to {c.high:.3g})" if c.low is not None and c.high is not None else ""
    return f"{c.ratio:.3g} x{span}  {c.case}: {c.measurement} {c.a:.4g} -> {c.b:.4g} {c.unit}"


def compare_schema() -> str:
    """The text of `reports/schema/compare-1.json`."""
    schema = Comparison.model_json_schema(mode="serialization", by_alias=True)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "compare-1.json"}
    return json.dumps({**head, **schema}, indent=2, ensure_ascii=False) + "\n"
