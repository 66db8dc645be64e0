"""Which charts a run gets: measurements and curves of its cases, grouped so that only like things share an axis."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparkproof.report.charts import SERIES, Bar, Chart, Line, bar_chart, line_chart
from sparkproof.report.runrecord import RunRecord
from sparkproof.report.words import direction, label, one_line
from sparkproof.results import CaseResult, Measurement, Verdict

TABLED = ("comparison", "fit")  # kinds whose numbers stand in tables of their own, one engine a row
BARS = 24  # of one chart; a longer one is split
CURVES = {  # key of CaseResult.evidence -> title, unit, note
    "loss": ("Loss", "nats a token", "lower is better"),
    "grad_norm": ("Gradient norm", "L2 norm", "steady is better"),
}
MEMORY = re.compile(r"rss|memory|alloc|reserv|peak|available|vram", re.IGNORECASE)
SPEED_UNIT = re.compile(r"/s$|^%|^(ns|us|µs|ms|s|min)$|FLOP|of copy", re.IGNORECASE)
BYTES = re.compile(r"^[KMGT]?i?B$|^bytes$")


@dataclass(frozen=True)
class Section:
    """A group of charts, or the sentence that says why there is none."""

    title: str
    lead: str
    charts: list[Chart]
    empty: str = ""


def floats(value: Any) -> list[float]:
    """A list of numbers, however a record spells them; [] when it is anything else."""
    if not isinstance(value, list | tuple) or not value:
        return []
    out = []
    for v in value:
        if isinstance(v, bool) or not (
            isinstance(v, int | float) or v in ("NaN", "Infinity", "-Infinity") or v is None
        ):
            return []
        out.append(math.nan if v is None else float(v))
    return out


def sections(record: RunRecord) -> list[Section]:
    """Learning, speed, memory, export; each is there, empty or not."""
    results = record.results
    learning = list(_curves(results))
    speed = list(_engines(results, "tokens_per_s", "tokens a second", "tokens/s", "higher is better"))
    speed += list(_bars(results, lambda m: bool(SPEED_UNIT.search(m.unit)) and m.higher_is_better is not None))
    memory = list(_engines(results, "peak_gib", "peak memory", "GiB", "lower is better"))
    memory += list(_bars(results, lambda m: bool(BYTES.match(m.unit) and MEMORY.search(m.name))))
    fidelity = list(_bars(results, lambda m: m.unit.startswith("nat") and "kl" in m.name.lower()))
    return [
        Section("Learning", "What training did to the loss, step by step.", learning, _why(record, "train", "curve")),
        Section("Speed", "Measured on this machine in this run.", speed, _why(record, "", "speed")),
        Section("Memory", "The most that cases held while they ran.", memory, _why(record, "train", "memory")),
        Section(
            "Export",
            "How far an exported model is from its reference: Kullback-Leibler divergence of the next token.",
            fidelity,
            _why(record, "export", "divergence"),
        ),
    ]


def _why(record: RunRecord, kind: str, what: str) -> str:
    """Why a section has nothing to draw."""
    cases = [r for r in record.results if not kind or r.kind == kind]
    noun = {"train": "training", "export": "export"}.get(kind, "measuring")
    if not cases:
        left = any(p.kind == kind for p in record.missing)
        return f"Not measured: {'the run ended before its' if left else 'this run had no'} {noun} cases."
    ran = [r for r in cases if r.verdict is not Verdict.SKIPPED]
    if not ran:
        return f"Not measured: no {noun} case could run here. {one_line(cases[0].reason)}".strip()
    return f"Not measured: no case of this run left a {what} to draw."


def _curves(results: Sequence[CaseResult]) -> Iterable[Chart]:
    for key, (title, unit, note) in CURVES.items():
        drawn = [(r.name, v) for r in results if r.kind == "train" and len(v := floats(r.evidence.get(key))) > 1]
        labels = _labels([name for name, _ in drawn])
        lines = [Line(labels[name], v) for name, v in drawn]
        for part in _chunks(lines, SERIES):
            chart = line_chart(title, part, unit, "step", note)
            if chart:
                yield chart


def _bars(results: Sequence[CaseResult], wanted: Any) -> Iterable[Chart]:
    """A chart for each kind, measurement and unit, in the order they first occur."""
    groups: dict[tuple[str, str, str, str], list[tuple[CaseResult, Measurement]]] = {}
    for r in results:
        for m in r.measurements:
            if r.verdict is not Verdict.SKIPPED and r.kind not in TABLED and wanted(m) and math.isfinite(m.value):
                groups.setdefault((r.kind, m.name, m.unit, direction(m)), []).append((r, m))
    for (kind, name, unit, better), members in groups.items():
        labels = _labels([r.name for r, _ in members])
        bars = [
            Bar(labels[r.name], r.name, m.value, m.low, m.high, m.reference, r.verdict is Verdict.PASSED)
            for r, m in members
        ]
        named = next((m.reference_name for _, m in members if m.reference_name), "")
        what = {"train": "Training", "kernel": "Kernels", "export": "Export"}.get(kind, kind.capitalize())
        for part in _chunks(bars, BARS):
            chart = bar_chart(f"{what}: {label(name, unit)}", part, one_line(unit), better, named)
            if chart:
                yield chart


def _engines(results: Sequence[CaseResult], key: str, what: str, unit: str, note: str) -> Iterable[Chart]:
    """A chart for each comparison, a bar for each engine; hatched where an engine is not counted."""
    for r in results:
        rows = r.evidence.get("engines")
        if r.kind != "comparison" or not isinstance(rows, list):
            continue
        bars = []
        for e in rows:
            if e.get(key) is not None and math.isfinite(e[key]):
                low, high = (e.get(f"tokens_{end}") if key == "tokens_per_s" else None for end in ("low", "high"))
                counted = e["status"] == "timed" and r.verdict is Verdict.PASSED
                bars.append(Bar(e["engine"], f"{e['engine']}, {r.name}", e[key], low, high, None, counted))
        chart = bar_chart(f"Engines: {what}, {one_line(r.evidence['subject']['model'])}", bars, unit, note)
        if chart:
            yield chart


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Names without the folders that all of them share."""
    parts = [n.partition("[")[0].split("/")[:-1] for n in names]
    shared = 0
    while all(len(p) > shared for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return {n: "/".join([*n.partition("[")[0].split("/")[shared:]]) + "".join(n.partition("[")[1:]) for n in names}


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
