"""The end of a run on the terminal: a table, what was measured, the failures again, the report, the sentence."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sparkproof.report import engines
from sparkproof.report.export_table import export_table
from sparkproof.report.runrecord import RunRecord
from sparkproof.report.words import (
    KIND_TITLES,
    by_urgency,
    clean,
    duration,
    held,
    label,
    main_metric,
    number,
    one_line,
    shorten,
)
from sparkproof.results import CaseResult, Verdict

OUTPUT_LINES = 12
MISSED = 5  # assertions of one failure
MEASURED_ROWS = 40
NARROW = 72
WIDE = 110
EXPORT_STYLES = {Verdict.FAILED: "red", Verdict.BROKEN: "red", Verdict.SKIPPED: "dim"}
NOT_GOOD = (Verdict.FAILED, Verdict.BROKEN, Verdict.RETEST)


def failure_lines(result: CaseResult) -> Iterator[tuple[str, str]]:
    """Heading and text of everything that helps with a failure: why, evidence, next step, last output, rerun."""
    yield "why", one_line(result.reason) or "No reason was given."
    missed = [a for a in result.assertions if not a.passed]
    for a in missed[:MISSED]:
        seen = "; ".join(s for s in (held(a), one_line(a.detail)) if s)
        yield "evidence", f"{one_line(a.name)}: {seen}" if seen else one_line(a.name)
    if len(missed) > MISSED:
        yield "evidence", f"and {len(missed) - MISSED} more, in the report"
    output = clean(result.output_tail).strip("\n")
    if not output and os.environ.get("SPARKPROOF_DEBUG"):  # a traceback is for developers; the record has it
        output = clean(result.traceback).strip("\n")
    if output:
        yield "last output", "\n" + "\n".join(output.splitlines()[-OUTPUT_LINES:])
    if result.next_step:
        yield "next step", one_line(result.next_step)
    if result.rerun:
        yield "run again", one_line(result.rerun)


def closing(record: RunRecord, width: int, safe: Callable[[str], str]) -> Iterator[RenderableType]:
    """Everything that is shown when a run has ended, the sentence that matters last."""
    yield Text("")
    yield _table(record, width)
    metrics = _measured(record, width, safe)
    if metrics.row_count:
        yield Text("")
        yield metrics
    yield from _engines(record, width, safe)
    fits = engines.fits(record)
    if fits:
        yield Text("")
        yield fit_table(fits, width, safe)
    yield from _exports(record, width, safe)
    bad = by_urgency(record.of(*NOT_GOOD))
    if bad:
        yield Text("\nWhat went wrong:", "bold")
    for r in bad:
        style = "bold red" if r.verdict is Verdict.FAILED else "bold yellow"
        yield Text.assemble((f"{r.verdict.value:>7} ", style), safe(r.name), ": ", safe(r.reason))
        if r.next_step:
            yield Text(f"        next step: {safe(r.next_step)}")
        if r.rerun:
            yield Text(f"        run again: {safe(r.rerun)}")
    yield Text("")
    if record.interrupted or record.missing:
        begin = "Interrupted" if record.interrupted else "Some cases left no result"
        yield Text(f"{begin}. Go on with: sparkproof validate --resume {shlex.quote(str(record.run_dir))}", "yellow")
    if where := record.facts.runs_in.sentence():
        yield Text(f"It ran {safe(where)}.")
    yield Text(f"Report: {record.run_dir / 'report.html'}")
    verdict = record.verdict
    style = {"yes": "bold green", "no": "bold red", "not shown": "bold yellow"}[verdict.answer]
    yield Text.assemble("Can this machine fine-tune? ", (safe(verdict.answer_sentence), style))
    yield Text(safe(record.sentence), "bold green" if record.validated else "bold")


def _engines(record: RunRecord, width: int, safe: Callable[[str], str]) -> Iterator[RenderableType]:
    """The table of engines and the sentence on their speeds; nothing in a run that trained nothing."""
    rows = engines.rows(record)
    if not rows and not any(r.kind == "comparison" for r in record.results):
        return
    yield Text("")
    shown = range(len(engines.HEADS)) if width >= WIDE else (0, 2, 3, 4, 5, 6)
    if width < WIDE:  # without the model's column, what was not compared can't be told apart
        rows = [row for row in rows if row.compared] or rows
    table = Table(box=None, pad_edge=False, padding=(0, 2 if width >= NARROW else 1, 0, 0))
    for i in shown:
        table.add_column(engines.HEADS[i], justify="right" if i in (4, 5, 7) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(safe(row.cells[i])) for i in shown), style="" if row.counted else "dim")
    if rows:
        yield table
    for sentence in engines.claims(record):
        yield Text(safe(sentence), "bold")


def fit_table(rows: Sequence[tuple[str, ...]], width: int, safe: Callable[[str], str]) -> Table:
    """The largest batch at each context; the reasons only where there is room."""
    shown = range(len(engines.FIT_HEADS)) if width >= WIDE else (0, 2, 3, 4, 5, 6)
    table = Table(box=None, pad_edge=False, padding=(0, 2 if width >= NARROW else 1, 0, 0))
    for i in shown:
        table.add_column(engines.FIT_HEADS[i], justify="right" if i in (3, 5, 6) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(safe(row[i])) for i in shown))
    return table


def _table(record: RunRecord, width: int) -> Table:
    """A line a kind; columns that are zero everywhere are left out."""
    names = [v.value for v in Verdict] + ["missing"]
    rows: dict[str, dict[str, float]] = {}
    for r in record.results:
        row = rows.setdefault(r.kind, dict.fromkeys([*names, "time"], 0))
        row[r.verdict.value] += 1
        row["time"] += r.duration_s
    for p in record.missing:
        rows.setdefault(p.kind, dict.fromkeys([*names, "time"], 0))["missing"] += 1
    shown = [n for n in names if n in ("passed", "failed") or any(row[n] for row in rows.values())]
    table = Table(box=None, pad_edge=False, show_footer=True, padding=(0, 1 if width < NARROW else 2, 0, 0))
    table.add_column("", footer="all")
    for n in shown:
        total = sum(row[n] for row in rows.values())
        style = "red" if n in ("failed", "broken") and total else ""
        table.add_column(n, justify="right", footer=f"{total:g}", style=style)
    table.add_column("time", justify="right", footer=duration(sum(row["time"] for row in rows.values())))
    for kind, row in rows.items():
        title = KIND_TITLES.get(kind, (kind, ""))[0]
        table.add_row(Text(one_line(title)), *(f"{row[n]:g}" if row[n] else "." for n in shown), duration(row["time"]))
    return table


def _exports(record: RunRecord, width: int, safe: Callable[[str], str]) -> Iterator[RenderableType]:
    """Formats and consumers across, families down: KL in nats and top-1; as many tables as the width asks for."""
    whole = export_table(record)
    if whole is None:
        return
    longest = max(len(family) for family, _ in whole.rows)
    wide = max(
        [len(c.text) for _, cells in whole.rows for c in cells if c] + [len(w) for pair in whole.columns for w in pair]
    )
    for part in whole.parts(max(1, (width - longest) // (wide + 2))):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(
            "export: KL (nats), top-1" if width >= NARROW else "export", overflow="fold", min_width=longest
        )
        for format_, consumer in part.columns:
            table.add_column(Text(f"{safe(format_)}\n{safe(consumer)}"), justify="right", no_wrap=True)
        for family, cells in part.rows:
            shown = [
                Text("." if c is None else c.text, EXPORT_STYLES.get(c.verdict, "") if c else "dim") for c in cells
            ]
            table.add_row(Text(safe(family)), *shown)
        yield Text("")
        yield table


def _measured(record: RunRecord, width: int, safe: Callable[[str], str]) -> Table:
    """The main metric of each case that has one; on a narrow terminal name and value alone."""
    wide = width >= NARROW
    rows = [(r, m) for r in record.results if (m := main_metric(r)) and r.verdict is not Verdict.SKIPPED]
    shown = [(safe(r.name), f"{number(m.value)} {safe(m.unit)}".rstrip(), m) for r, m in rows[:MEASURED_ROWS]]
    room = width - max((len(value) for _, value, _ in shown), default=0) - 3
    longest = max((len(name) for name, _, _ in shown), default=0)
    table = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0))
    table.add_column("measured", overflow="fold", min_width=min(longest, room * 4 // 5) if wide else None)
    table.add_column("", justify="right", no_wrap=True)
    if wide:
        table.add_column("", overflow="fold")
    for name, value, m in shown:
        cells = [Text(name if wide else shorten(name, max(16, room))), Text(value)]
        if wide:
            compared = (
                f", {safe(m.reference_name) or 'reference'} {number(m.reference)}" if m.reference is not None else ""
            )
            cells.append(Text(f"{safe(label(m.name, m.unit))}{compared}", "dim"))
        table.add_row(*cells)
    if len(rows) > MEASURED_ROWS:
        table.add_row(Text(f"and {len(rows) - MEASURED_ROWS} more, in the report"), *[""] * (2 if wide else 1))
    return table
