"""The views of a training bench: a table for an 80-column terminal, Markdown, and one HTML page. All made from the JSON."""

from __future__ import annotations

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparkproof.bench import views as shared
from sparkproof.bench.document import Interval
from sparkproof.bench.train.document import Document, EngineSteps, ModelSteps
from sparkproof.bench.train.setting import OURS, REFERENCE, SHAPES, WORDS
from sparkproof.report import words
from sparkproof.report.charts import Bar, Chart, bar_chart

TITLE = "A QLoRA training step, engine by engine"
HEADS = ("engine", "ms", "tok/s", "x hf", "GiB", "TFLOP/s", "light", "1st s")
STANDINGS = {"faster": "green", "slower": "red", "no difference": "yellow", "": "dim"}


def title(m: ModelSteps) -> str:
    """The step on one line."""
    s = m.setting
    of = SHAPES[s.model].layers
    layers = f"{s.layers} layers" if s.layers == of else f"{s.layers} of {of} layers"
    rows = f"{s.packed} documents in {s.tokens} tokens" if s.packed else f"{s.batch} x {s.seq} tokens"
    kept = "everything" if s.memory_budget_gib == "inf" else f"{s.memory_budget_gib:g} GiB"
    budget = f", sparktune keeps {kept}" if s.memory_budget_gib else ""
    offload = ", sparktune offloads" if s.offload else ""
    embedding = ", sparktune's embedding in host memory" if s.offload_embedding else ""
    return f"{s.model}, {layers}, {rows}, rank {s.rank}, checkpointing {s.gc}{budget}{offload}{embedding}"


def around(i: Interval | None) -> str:
    """A ratio with its interval, in at most 16 characters."""
    if i is None:
        return "–"
    places = 2 if i.high < 9.995 else 1 if i.high < 99.95 else 0
    return f"{i.value:.{places}f} ({i.low:.{places}f}–{i.high:.{places}f})"


def _gib(*found: float | None) -> str:
    return "/".join("–" if x is None else f"{x:.1f}" for x in found)


def cells(e: EngineSteps) -> list[str]:
    """One row of any table, under HEADS; an engine that is not counted has its state where the ratio would be."""
    if e.step_ms is None or e.tokens_per_s is None:
        return [e.name, "–", "–", e.status, "–", "–", "–", "–"]
    ratio = "1" if e.name == REFERENCE else around(e.speedup)
    ratio = ratio if e.status == "timed" else e.status
    return [
        e.name, f"{e.step_ms.value:.{1 if e.step_ms.value < 9999.5 else 0}f}", f"{e.tokens_per_s.value:,.0f}", ratio,
        _gib(e.memory.peak_allocated_gib, e.memory.peak_reserved_gib),
        "–" if e.useful_tflop_s is None else f"{e.useful_tflop_s:.{0 if e.useful_tflop_s >= 10 else 2}f}",
        "–" if e.light is None else f"{e.light:.0%}", "–" if e.first_step_s is None else f"{e.first_step_s:.1f}",
    ]  # fmt: skip


def standing(d: Document, m: ModelSteps) -> str:
    """Against the best of the others, one sentence."""
    if m.error:
        return f"{m.setting.model}: {m.error}."
    if m.verdict and d.trusted:
        return f"{m.setting.model}: sparktune: {m.sentence}."
    if m.against_best is None:
        return f"{m.setting.model}: nothing to compare sparktune with."
    return f"{m.setting.model}: {around(m.against_best)} x {m.best_other}, no verdict."


def tally(d: Document) -> str:
    """What came of it."""
    said = [f"Partial: {d.partial}."] if d.partial else []
    if d.device_type == "cpu":
        said.append("Measured on a CPU: a trial of the road, whose times say nothing about a GPU.")
    elif d.canary is None:
        said.append("No process could time a large copy, so nothing says whether the clock held: no verdict stands.")
    elif not d.trusted:
        said.append(
            f"Copy bandwidth moved by {100 * d.canary.drift:+.1f}% between processes (at most {100 * d.canary.band:.0f}%): "
            "no verdict stands, measure again on an idle machine."
        )
    return " ".join([*said, *(standing(d, m) for m in d.models)])


def problems(d: Document) -> list[str]:
    """What was not measured or does not count, each with its reason."""
    found = [f"{e.words}: {e.missing}" for e in d.engines if e.missing]
    for m in d.models:
        for e in m.engines:
            if e.status not in ("timed", "missing"):
                where = f" in round {e.failed_round}" if e.failed_round else ""
                found.append(f"{m.setting.model}, {e.name}: {e.status}{where}: {e.reason}")
            elif e.status == "timed" and len(e.rounds) < d.rounds:
                found.append(f"{m.setting.model}, {e.name}: {len(e.rounds)} of {d.rounds} rounds: {d.partial}")
    return found


def remarks(d: Document) -> list[str]:
    """What a reader of the numbers should know besides."""
    found = list(d.notes)
    for m in d.models:
        pinned = [
            f"{e.name} {e.memory.host_pinned_peak_gib:.2f}"
            for e in m.engines
            if e.memory.host_pinned_peak_gib is not None and e.memory.host_pinned_peak_gib >= 0.005
        ]
        if pinned:
            found.append(f"{m.setting.model}: GiB of pinned host memory: {', '.join(pinned)}")
        for e in m.engines:
            if e.rounds and e.name == OURS:
                found.append(f"{m.setting.model}: {_what_ran(e)}")
            for r in e.rounds:
                found += [f"{m.setting.model}, {e.name}, round {r.number}: no {k}: {v}" for k, v in r.failures.items()]
    return found


def _what_ran(e: EngineSteps) -> str:
    notes = e.rounds[-1].notes
    marks, fell = notes.get("watermarks"), notes.get("fallbacks")
    if not isinstance(marks, dict) or not isinstance(fell, dict):
        return "what ran in sparktune is not known"
    ways: dict[str, list[str]] = {}
    for op, counts in marks.items():
        for way, count in counts.items():
            if count:
                ways.setdefault(way, []).append(op)
    ran = "; ".join(f"by {way}: {', '.join(sorted(ops))}" for way, ops in ways.items()) or "none of its ops"
    left = "; ".join(f"{why} ({count} calls)" for why, count in fell.items()) or "none"
    return f"sparktune ran {ran}. Module by module: {left}"


def table(d: Document) -> Group:
    """The terminal's, one a model, at most 80 columns wide."""
    parts: list[Table | Text] = []
    for m in d.models:
        parts.append(Text(title(m), style="bold"))
        t = Table(box=None, pad_edge=False, header_style="bold")
        for head in HEADS:
            t.add_column(head, justify="left" if head == "engine" else "right", no_wrap=True)
        for e in m.engines:
            row = [escape(x) for x in cells(e)]
            colour = STANDINGS[m.verdict if d.trusted else ""] if e.name == OURS and e.status == "timed" else ""
            row[3] = f"[{colour}]{row[3]}[/{colour}]" if colour else row[3]
            t.add_row(*row, style="" if e.status == "timed" else "dim")
        parts += [t, Text("")]
    return Group(*parts)


def footer(d: Document) -> list[str]:
    """What stands under every table."""
    sizes = (
        f"{d.multiprocessors} SMs, {d.memory_gib:.0f} GiB" if d.device_type == "cuda" else "plain references, no kernel"
    )
    drift = f"; copies within {100 * abs(d.canary.drift):.1f}%" if d.canary else ""
    return [
        f"x hf: {REFERENCE}'s time over the engine's, with its 95% interval; rounds: {d.rounds}. GiB: peak allocated/reserved. "
        "TFLOP/s: useful ones, recomputation not counted. light: share of the time that bare products and attention would "
        "take. 1st s: seconds of the first step with its compilation.",
        f"{d.device}, {sizes}{drift}; {d.seconds:.0f} s.",
        tally(d),
    ]


def _rows(d: Document) -> list[list[str]]:
    return [[title(m), *cells(e)] for m in d.models for e in m.engines]


def markdown(d: Document) -> str:
    """For reports/published/."""
    out = [f"# {TITLE}", "", tally(d), "", ", ".join(f"{k} {v}" for k, v in d.software.items()) + ".", ""]
    heads = ["step", *HEADS]
    out += ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    out += ["| " + " | ".join(words.one_line(x).replace("|", "\\|") for x in row) + " |" for row in _rows(d)]
    out += ["", *footer(d)[:2], *shared.sections(problems(d), remarks(d))]
    return "\n".join(out) + "\n"


def charts(d: Document) -> list[Chart]:
    """Two a model: tokens a second and peak memory."""
    found = []
    for m in d.models:
        speed, memory = [], []
        for e in m.engines:
            right = e.status == "timed"
            label = e.name if right else f"{e.name} ({e.status})"
            full = f"{WORDS[e.name]}, {title(m)}"
            if e.tokens_per_s is not None:
                t = e.tokens_per_s
                speed.append(Bar(label, full, t.value, t.low, t.high, None, right))
            if e.memory.peak_allocated_gib is not None:
                memory.append(Bar(label, full, e.memory.peak_allocated_gib, passed=right))
        for bars, head, unit, note in (
            (speed, "tokens a second", "tokens/s", "higher is better"),
            (memory, "peak memory", "GiB allocated", "lower is better"),
        ):
            chart = bar_chart(f"{m.setting.model}, {head}", bars, unit, note)
            if chart is not None:
                said = chart.footnote.replace("Hatched: the case did not pass.", "Hatched: not counted.")
                found.append(Chart(chart.title, chart.note, chart.svg, chart.legend, said))
    return found


def html(d: Document) -> str:
    """One self-contained page, without script."""
    return shared.page(
        d, TITLE, charts=charts(d), heads=["step", *HEADS], rows=_rows(d), tally=tally(d), footer=footer(d),
        problems=problems(d), remarks=remarks(d),
    )  # fmt: skip
