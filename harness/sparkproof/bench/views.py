"""The views of a bench document: a table for the terminal, Markdown, and one HTML page with charts. All made from the JSON."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

from sparkproof.bench.document import Document, EngineTime, PassTimes, RowTimes
from sparkproof.report import words
from sparkproof.report.charts import Bar, Chart, bar_chart
from sparkproof.report.html import TEMPLATES

TITLE = "Ops against their peers"
SHORT = {"sparktune": "sparktune", "hf": "hf", "compiled": "compiled", "liger": "Liger", "unsloth": "Unsloth"}
COLOURS = {"faster": "green", "slower": "red", "no difference": "yellow", "": "dim"}


def lines(d: Document) -> list[tuple[RowTimes, PassTimes]]:
    """Every row and direction that was measured."""
    return [(row, p) for row in d.rows for p in row.passes]


def title(row: RowTimes) -> str:
    """The op, and which of its layers."""
    return f"{row.op} {row.part}".strip()


def cell(e: EngineTime) -> str:
    """A fraction of the yardstick in percent, or why there is none, in a word."""
    if e.status != "timed" or e.ms is None:
        return {"missing": "–", "failed": "error", "wrong": "wrong"}.get(e.status, "–")
    if e.fraction is None:
        return f"{1000 * e.ms.value:.0f} us"
    return f"{100 * e.fraction.value:.0f}" + ("*" if e.method == "events" else "")


def verdict(p: PassTimes, trusted: bool) -> str:
    """The verdict with its factor, against whom."""
    if not trusted:
        return "retest"
    if p.speedup is None:
        return ""
    return f"{p.verdict}, {p.speedup.value:.2f} x {SHORT.get(p.best_peer, p.best_peer)}"


def tally(d: Document) -> str:
    """One sentence over all verdicts."""
    if not d.trusted:
        return (
            f"Copy bandwidth moved by {100 * d.canary.drift:+.1f}% during the run (at most {100 * d.canary.band:.0f}%): "
            "no verdict stands, measure again on an idle machine."
        )
    found = [p.verdict for _, p in lines(d) if p.verdict]
    counts = {v: found.count(v) for v in ("faster", "no difference", "slower")}
    return (
        f"Against the best other engine of each row, of {len(found)}: faster {counts['faster']}, no difference "
        f"{counts['no difference']}, slower {counts['slower']}."
    )


def problems(d: Document) -> list[str]:
    """What was not measured, each with its reason; what an engine has not got is said once an op."""
    found = [f"{e.words}: {e.missing}" for e in d.engines if e.missing]
    absent = {e.name for e in d.engines if e.missing}
    for row in d.rows:
        where = f"{title(row)}, {row.model}" + (f", {row.tokens} tokens" if row.tokens else "")
        if row.error:
            found.append(f"{where}: {row.error}")
        for p in row.passes:
            for e in p.engines:
                if e.name in absent or e.status == "timed":
                    continue
                place = title(row) if e.status == "missing" else f"{where}, {p.which}"
                found.append(f"{place}, {SHORT.get(e.name, e.name)}: {e.status}: {e.reason}")
    return list(dict.fromkeys(found)) + [f"{r.row}: not reached: {r.reason}" for r in d.left_out]


def remarks(d: Document) -> list[str]:
    """What is different about numbers that were measured, a line a remark, with how many rows it holds for."""
    found: dict[str, int] = {}
    for _, p in lines(d):
        for e in p.engines:
            if e.note:
                key = f"{SHORT.get(e.name, e.name)}: {e.note}"
                found[key] = found.get(key, 0) + 1
    return [f"{text} ({count} of the timings)" for text, count in found.items()] + d.notes


def table(d: Document) -> Table:
    """The terminal's."""
    t = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "model", "tokens", "pass", "us"):
        t.add_column(name, justify="right" if name in ("tokens", "us") else "left", no_wrap=True)
    for e in d.engines:
        t.add_column(SHORT.get(e.name, e.name), justify="right", no_wrap=True)
    t.add_column("against the best other", no_wrap=True)
    for row in d.rows:
        if row.error:
            said = f"[red]{escape(row.error)}[/red]"
            t.add_row(escape(title(row)), row.model, str(row.tokens or "-"), "-", "-", *["-"] * len(d.engines), said)
        for p in row.passes:
            by_name = {e.name: e for e in p.engines}
            cells = [cell(by_name[e.name]) if e.name in by_name else "–" for e in d.engines]
            ours = by_name.get("sparktune")
            us = f"{1000 * ours.ms.value:.1f}" if ours and ours.ms else "-"
            colour = COLOURS[p.verdict if d.trusted else ""]
            t.add_row(
                escape(title(row)), row.model, str(row.tokens or "-"), p.which, us, *cells,
                f"[{colour}]{escape(verdict(p, d.trusted))}[/{colour}]",
            )  # fmt: skip
    return t


def footer(d: Document) -> list[str]:
    """What stands under every table."""
    return [
        "Columns: percent of a copy of as many bytes (memory-bound ops) or of the bare GEMM (matrix-bound ops), measured in "
        "turn with the engines. * timed with launches. us: sparktune's GPU time a call.",
        f"{d.device}, {d.multiprocessors} SMs; large copy {d.copy_gb_s.value:.0f} GB/s, drift {100 * d.canary.drift:+.1f}%; "
        f"{d.seconds:.0f} s.",
        tally(d),
    ]


def markdown(d: Document) -> str:
    """For reports/published/."""
    heads = [
        "op",
        "model",
        "tokens",
        "pass",
        "us",
        *(SHORT.get(e.name, e.name) for e in d.engines),
        "against the best other",
    ]
    out = [
        f"# {TITLE}", "", tally(d), "",
        ", ".join(f"{k} {v}" for k, v in d.software.items()) + ".", "",
        "| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |",
    ]  # fmt: skip
    for row in d.rows:
        for p in row.passes:
            by_name = {e.name: e for e in p.engines}
            ours = by_name.get("sparktune")
            us = f"{1000 * ours.ms.value:.1f}" if ours and ours.ms else "–"
            cells = [cell(by_name[e.name]) if e.name in by_name else "–" for e in d.engines]
            line = [title(row), row.model, str(row.tokens or "–"), p.which, us, *cells, verdict(p, d.trusted)]
            out.append("| " + " | ".join(x.replace("|", "\\|") for x in line) + " |")
    out += ["", *footer(d)[:2], *sections(problems(d), remarks(d))]
    return "\n".join(out) + "\n"


def charts(d: Document) -> list[Chart]:
    """One chart an op and direction: sparktune's share of the yardstick, the best other engine's as a mark."""
    groups: dict[tuple[str, str], list[Bar]] = {}
    notes: dict[tuple[str, str], str] = {}
    for row, p in lines(d):
        by_name = {e.name: e for e in p.engines if e.fraction is not None}
        ours, best = by_name.get("sparktune"), by_name.get(p.best_peer)
        if ours is None or ours.fraction is None:
            continue
        key = (title(row), p.which)
        f = ours.fraction
        label = row.model + (f", {row.tokens} tokens" if row.tokens else "")
        other = f" ({SHORT.get(p.best_peer, p.best_peer)})" if best is not None else ""
        bar = Bar(
            label + other, f"{title(row)}, {label}, {p.which}: {p.sentence}", 100 * f.value, 100 * f.low, 100 * f.high,
            100 * best.fraction.value if best is not None and best.fraction is not None else None,
            p.verdict != "slower",
        )  # fmt: skip
        groups.setdefault(key, []).append(bar)
        notes[key] = "% of the bare GEMM" if row.bound == "matrix" else "% of a copy of as many bytes"
    found = []
    for (op, which), bars in groups.items():
        chart = bar_chart(f"{op}, {which}", bars, notes[op, which], "higher is better", "the best other engine")
        if chart is not None:
            note = chart.footnote.replace(
                "Hatched: the case did not pass.", "Hatched: slower than the best other engine."
            )
            found.append(Chart(chart.title, chart.note, chart.svg, chart.legend, note))
    return found


HERE = Path(__file__).parent


@lru_cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["line"] = words.one_line
    return environment


def page(d: Any, title: str, **parts: Any) -> str:
    """One self-contained page, without script, of any bench document; `parts` are the template's other names."""
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    brand = f"sparkproof {d.kind.replace('-', ' ')}"
    return _environment().get_template("page.html.j2").render(d=d, title=title, brand=brand, css=Markup(css), **parts)


def sections(problems: list[str], remarks: list[str]) -> list[str]:
    """Markdown of what was not measured, and of remarks."""
    out = []
    for head, found in (("Not measured", problems), ("Remarks", remarks)):
        if found:
            out += ["", f"## {head}", "", *(f"- {words.one_line(x)}" for x in found)]
    return out


def html(d: Document) -> str:
    """One self-contained page, without script."""
    rows = []
    for row, p in lines(d):
        by_name = {e.name: e for e in p.engines}
        rows.append(
            [title(row), row.model, str(row.tokens or "–"), p.which]
            + [cell(by_name[e.name]) if e.name in by_name else "–" for e in d.engines]
            + [verdict(p, d.trusted)]
        )
    heads = ["op", "model", "tokens", "pass", *(SHORT.get(e.name, e.name) for e in d.engines), "against the best other"]
    return page(
        d, TITLE, charts=charts(d), heads=heads, rows=rows, tally=tally(d), footer=footer(d), problems=problems(d),
        remarks=remarks(d),
    )  # fmt: skip
