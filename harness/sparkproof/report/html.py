"""`report.html`: one self-contained page that first answers "can this machine fine-tune?".

It has no script and asks nothing of the network, and a content security policy holds it to both, whatever a case name
or a log contains. Everything is escaped by the template engine; only the charts, drawn from numbers, are markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from sparkproof.report import engines, words
from sparkproof.report.charts import Chart, Line, line_chart
from sparkproof.report.export_table import export_table
from sparkproof.report.runrecord import RunRecord
from sparkproof.report.sections import floats, sections
from sparkproof.results import CaseResult, Verdict

TEMPLATES = Path(__file__).parent / "templates"
TEXT_CHARS = 20_000  # of one text in the page; the record has the whole
TABLE_ROWS = 60
BAD = (Verdict.FAILED, Verdict.BROKEN, Verdict.RETEST)
Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Exhibit:
    """One piece of a case's evidence, in the shape that suits it."""

    title: str
    chart: Chart | None = None
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""
    left_out: int = 0


@dataclass(frozen=True)
class CaseView:
    """A case as the page shows it."""

    result: CaseResult
    anchor: str
    metric: str
    exhibits: list[Exhibit]
    artifacts: dict[str, str]
    changed: bool


@dataclass(frozen=True)
class KindView:
    """The cases of one kind."""

    kind: str
    title: str
    meaning: str
    cases: list[CaseView]
    counts: dict[str, int]
    missing: list[str]


def render(record: RunRecord) -> str:
    """The page."""
    views = [_case_view(record, r, n) for n, r in enumerate(record.results)]
    by_kind: dict[str, list[CaseView]] = {}
    for v in views:
        by_kind.setdefault(v.result.kind, []).append(v)
    for p in record.missing:
        by_kind.setdefault(p.kind, [])
    kinds = [_kind_view(record, kind, cases) for kind, cases in by_kind.items()]
    order = words.WORST_FIRST
    bad = sorted((v for v in views if v.result.verdict in BAD), key=lambda v: order.index(v.result.verdict))
    skipped: dict[str, list[CaseView]] = {}
    for v in views:
        if v.result.verdict is Verdict.SKIPPED:
            skipped.setdefault(v.result.reason_class.value if v.result.reason_class else "unknown", []).append(v)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            record=record,
            header=record.header,
            verdict=record.verdict,
            facts=record.facts,
            machine=_machine(record),
            facts_json=words.clean(json.dumps(record.facts.model_dump(mode="json"), indent=1, ensure_ascii=False)),
            kinds=kinds,
            bad=bad,
            skipped=skipped,
            sections=sections(record),
            engines=engines,
            exports=export_table(record),
            anchors={v.result.name: v.anchor for v in views},
            verdicts=[v.value for v in Verdict],
            css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        )
    )


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "clean": _long_text,
        "line": words.one_line,
        "prose": _prose,
        "opening": _opening,
        "num": words.number,
        "dur": words.duration,
        "label": words.label,
        "measured": words.measured,
        "direction": words.direction,
        "held": words.held,
        "plural": lambda n, word: f"{n} {word}{'' if n == 1 else 's'}",
        "moment": lambda s: words.one_line(s).replace("T", " ").replace("+00:00", " UTC"),
    }
    env.globals |= {
        "SYMBOLS": {v.value: s for v, s in words.SYMBOLS.items()},
        "MEANING": {v.value: m for v, m in words.MEANING.items()},
        "with_unit": words.with_unit,
        "why_skipped": words.why_skipped,
    }
    return env


def _prose(text: str) -> Markup:
    """A sentence; what it puts between backticks is code."""
    parts = words.one_line(text).split("`")
    if len(parts) % 2 == 0:  # an odd backtick marks nothing
        return escape("`".join(parts))
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _opening(sentence: str) -> Markup:
    """The answer's sentence without its 'Yes: ', which stands above it; a capital where it begins with a word."""
    rest = words.one_line(sentence).partition(": ")[2] or words.one_line(sentence)
    first = rest.partition(" ")[0]
    return _prose(rest[:1].upper() + rest[1:] if first.isalpha() else rest)


def _long_text(text: str) -> str:
    text = words.clean(text)
    return text if len(text) <= TEXT_CHARS else f"…\n{text[-TEXT_CHARS:]}"


def _kind_view(record: RunRecord, kind: str, cases: list[CaseView]) -> KindView:
    title, meaning = words.KIND_TITLES.get(kind, (kind, ""))
    counts = {v.value: sum(c.result.verdict is v for c in cases) for v in Verdict}
    return KindView(kind, title, meaning, cases, counts, [p.name for p in record.missing if p.kind == kind])


def _case_view(record: RunRecord, r: CaseResult, n: int) -> CaseView:
    metric = words.main_metric(r)
    return CaseView(
        result=r,
        anchor=f"case-{n}",
        metric=f"{words.label(metric.name, metric.unit)} {words.with_unit(metric.value, metric.unit)}"
        if metric
        else "",
        exhibits=[e for key, value in r.evidence.items() if (e := exhibit(key, value)) is not None],
        artifacts={k: v for k, v in r.artifacts.items() if _safe_link(v)},
        changed=r.name in record.changed,
    )


def _safe_link(path: str) -> bool:
    """Whether a path leads from the page into the run's own folder and is no address."""
    return bool(re.fullmatch(r"[\w][\w ./\[\]=,+-]*", path)) and ".." not in path.split("/")


def exhibit(key: str, value: Any) -> Exhibit | None:
    """Evidence as a chart (numbers), a table (like rows, or names and values) or a text; None for an empty value."""
    title = words.label(key)
    if value is None or value in ([], {}, ""):
        return None
    numbers = floats(value)
    if len(numbers) > 2:
        chart = line_chart(
            title, [Line(title, numbers)], title, "index" if key not in ("loss", "grad_norm") else "step", ""
        )
        if chart is not None:
            return Exhibit(title, chart=chart)
    if isinstance(value, dict) and all(_flat(v) for v in value.values()):
        rows = [[words.label(str(k)), _cell(v)] for k, v in value.items()]
        return Exhibit(title, None, ["", ""], rows[:TABLE_ROWS], left_out=max(0, len(rows) - TABLE_ROWS))
    if isinstance(value, dict) and all(isinstance(v, dict) and all(map(_flat, v.values())) for v in value.values()):
        value = [{"": str(k), **v} for k, v in value.items()]  # named rows
    if isinstance(value, list) and all(isinstance(v, dict) and all(map(_flat, v.values())) for v in value):
        columns = list(dict.fromkeys(k for v in value for k in v))
        rows = [[_cell(v.get(c)) for c in columns] for v in value]
        names = [words.label(str(c)) for c in columns]
        return Exhibit(title, None, names, rows[:TABLE_ROWS], left_out=max(0, len(rows) - TABLE_ROWS))
    if isinstance(value, str | int | float | bool):
        return Exhibit(title, text=_long_text(value) if isinstance(value, str) else words.number(value))
    return Exhibit(title, text=_long_text(json.dumps(value, indent=1, ensure_ascii=False, default=str)))


def _flat(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 8 and all(isinstance(v, Cell) and not (isinstance(v, str) and len(v) > 40) for v in value)
    return isinstance(value, Cell)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value)
    return words.number(value) if value is not None else ""


def _machine(record: RunRecord) -> list[tuple[str, str]]:
    """What most readers want to know of the machine; the rest is in the whole facts below it."""
    return [(name, words.one_line(value)) for name, value in _machine_rows(record) if value]


def _machine_rows(record: RunRecord) -> Iterable[tuple[str, str]]:
    f = record.facts
    yield "Device", f.device_sentence()
    yield "Runs", f.runs_in.sentence()
    yield "Is the target", "yes: GB10-class (aarch64, 12.1, one memory pool)" if f.is_target else "no"
    yield "Facts", f.origin
    yield "System", ", ".join(s for s in (f.os.version or f.os.name, f.os.kernel, f.arch) if s)
    yield "Processor", ", ".join(s for s in (f.cpu.model, f"{f.cpu.cores} cores" if f.cpu.cores else "") if s)
    m = f.memory
    yield (
        "Memory",
        f"{words.number(m.total_gib)} GiB, {words.number(m.available_gib)} GiB available" if m.total_gib else "",
    )
    yield (
        "Driver",
        ", ".join(s for s in (f.driver.version, f.driver.cuda_version and f"CUDA {f.driver.cuda_version}") if s),
    )
    for gpu in f.gpus:
        clock = f"{gpu.sm_clock_mhz} of {gpu.max_sm_clock_mhz} MHz" if gpu.sm_clock_mhz and gpu.max_sm_clock_mhz else ""
        heat = f"{words.number(gpu.temperature_c)} °C" if gpu.temperature_c is not None else ""
        slow = f"throttled: {', '.join(gpu.throttle_reasons)}" if gpu.throttle_reasons else ""
        yield "GPU", ", ".join(s for s in (gpu.name, clock, heat, slow) if s)
    yield "torch", ", ".join(s for s in (f.torch.version, f.torch.cuda and f"CUDA {f.torch.cuda}") if s)
    yield "Triton", f.triton.version or ""
    yield "bitsandbytes", f.bitsandbytes.version or ""
    yield "Containers", f.container.engine or ""
    yield "Not read", ", ".join(f"{k} ({v})" for k, v in list(f.errors.items())[:6])
