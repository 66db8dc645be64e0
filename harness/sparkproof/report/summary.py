"""`summary.md`: the run for a merge request or a GitHub step summary; the verdict, then failures, then the rest.

GitHub drops a step summary over 1,024 KiB whole, so this one is cut below that, from its end: what failed stands first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from sparkproof.report import engines
from sparkproof.report.export_table import export_table
from sparkproof.report.runrecord import RunRecord
from sparkproof.report.words import (
    KIND_TITLES,
    SYMBOLS,
    by_urgency,
    clean,
    duration,
    held,
    label,
    main_metric,
    measured,
    one_line,
    why_skipped,
)
from sparkproof.results import CaseResult, Verdict

LIMIT_BYTES = 1000 * 1024
OUTPUT_BYTES = 6000  # of one case's last output
TEXT_CHARS = 2000  # of a sentence that came from outside
NOT_GOOD = (Verdict.FAILED, Verdict.BROKEN, Verdict.RETEST)


def render(record: RunRecord) -> str:
    """`summary.md` as text, under 1,024 KiB."""
    out: list[str] = []
    size = 0
    blocks = [
        *_head(record), *_failures(record), *_missing(record), *_engines(record), *_exports(record), *_skipped(record),
        *_cases(record), *_foot(record),
    ]  # fmt: skip
    for n, block in enumerate(blocks):
        size += len(block.encode("utf-8", errors="replace")) + 1
        if size > LIMIT_BYTES:
            out.append(f"\n_{len(blocks) - n} more parts are left out for length; report.html has everything._")
            break
        out.append(block)
    return "\n".join(out) + "\n"


def _head(record: RunRecord) -> Iterable[str]:
    verdict = record.verdict
    sign = {"yes": "✅", "no": "❌", "not shown": "⚪"}[verdict.answer]
    yield f"## {sign} Can this machine fine-tune? {verdict.answer.capitalize()}\n"
    yield f"{prose(verdict.answer_sentence)}\n"
    yield f"**{md(record.sentence)}**\n"
    counts = verdict.counts
    names = [*(v.value for v in Verdict), "missing"]
    shown = [n for n in names if counts[n] or n in ("passed", "failed")]
    yield f"| {' | '.join(shown)} | total |\n|{' ---: |' * (len(shown) + 1)}"
    yield f"| {' | '.join(str(counts[n]) for n in shown)} | {counts['total']} |\n"


def _failures(record: RunRecord) -> Iterable[str]:
    bad = by_urgency(record.of(*NOT_GOOD))
    if bad:
        yield "### What went wrong, and what to do\n"
    for r in bad:
        yield f"#### {SYMBOLS[r.verdict]} {code(r.name)} {r.verdict.value}\n"
        yield f"{prose(r.reason) or 'No reason was given.'}\n"
        if r.next_step:
            yield f"**Next step:** {prose(r.next_step)}\n"
        if r.rerun:
            yield fence(r.rerun, "sh")
        missed = [a for a in r.assertions if not a.passed]
        if missed:
            yield "| did not hold | seen, allowed | evidence |\n| --- | --- | --- |"
            for a in missed:
                yield f"| {md(a.name)} | {md(held(a))} | {prose(a.detail)} |"
            yield ""
        if r.output_tail or r.traceback:
            yield "<details><summary>last output</summary>\n"
            yield fence("\n".join(s for s in (r.output_tail, r.traceback) if s))
            yield "</details>\n"


def _missing(record: RunRecord) -> Iterable[str]:
    if record.missing:
        yield "### Without a result\n"
        yield f"The run ended before these. `sparkproof validate --resume {record.run_id}` runs them.\n"
        yield "\n".join(f"- {code(p.name)}" for p in record.missing) + "\n"


def _engines(record: RunRecord) -> Iterable[str]:
    rows = engines.rows(record)
    if rows or any(r.kind == "comparison" for r in record.results):
        yield "### Engines\n"
        yield from (f"{md(sentence)}\n" for sentence in engines.claims(record))
    if rows:
        yield f"| {' | '.join(engines.HEADS)} |\n|{' --- |' * len(engines.HEADS)}"
        yield from (f"| {' | '.join(md(c) for c in row.cells)} |" for row in rows)
        yield ""
    fits = engines.fits(record)
    if fits:
        yield "### The largest batch that fits\n"
        yield f"| {' | '.join(engines.FIT_HEADS)} |\n|{' --- |' * len(engines.FIT_HEADS)}"
        yield from (f"| {' | '.join(md(c) for c in row)} |" for row in fits)
        yield ""


def _skipped(record: RunRecord) -> Iterable[str]:
    skipped = record.of(Verdict.SKIPPED)
    if skipped:
        yield "### Not run\n"
        yield "| case | why |\n| --- | --- |"
        yield from (f"| {code(r.name)} | {md(why_skipped(r))} |" for r in skipped)
        yield ""


def _exports(record: RunRecord) -> Iterable[str]:
    table = export_table(record)
    if table is None:
        return
    yield "### Exports: mean KL from the reference in nats, and top-1 agreement\n"
    yield "| family | " + " | ".join(f"{code(f)} {md(c)}" for f, c in table.columns) + " |"
    yield "| --- |" + " ---: |" * len(table.columns)
    for family, cells in table.rows:
        yield f"| {md(family)} | " + " | ".join(f"{SYMBOLS[c.verdict]} {md(c.text)}" if c else "" for c in cells) + " |"
    yield ""


def _cases(record: RunRecord) -> Iterable[str]:
    passed = record.of(Verdict.PASSED)
    for kind in dict.fromkeys(r.kind for r in passed):
        title = KIND_TITLES.get(kind, (kind, ""))[0]
        cases = [r for r in passed if r.kind == kind]
        yield f"<details><summary>{md(title)}: {len(cases)} passed</summary>\n"
        yield "| case | how | time | measured |\n| --- | --- | ---: | --- |"
        yield from (_row(r) for r in cases)
        yield "\n</details>\n"


def _row(r: CaseResult) -> str:
    metric = main_metric(r)
    shown = f"{label(metric.name, metric.unit)}: {measured(metric)}" if metric else ""
    return f"| {code(r.name)} | {md(r.mode)} | {duration(r.duration_s)} | {md(shown)} |"


def _foot(record: RunRecord) -> Iterable[str]:
    header = record.header
    made = f"sparkproof {header.versions.get('sparkproof', '')}".strip()
    revision = f", revision {code(header.revision[:13])}" if header.revision else ""
    device, profile = md(record.facts.device_sentence()), record.profile.value
    where = record.facts.runs_in.sentence()
    device = f"{device}, {md(where)}" if where else device
    yield f"{device}. Run {code(record.run_id)}, profile {profile}, {md(made)}{revision}."


def md(text: str) -> str:
    """Text as plain text: nothing in it is markup, a link, a mention or the end of a table cell."""
    text = one_line(text)
    if len(text) > TEXT_CHARS:
        text = text[:TEXT_CHARS] + " …"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|#~!$])", r"\\\1", text)
    text = re.sub(r"(?<!\w)@(?=\w)", "@\u200b", text)
    return re.sub(r"(https?):(?=//)", "\\1\u200b:", text)


def prose(text: str) -> str:
    """A sentence as plain text, but what it puts between backticks is code."""
    parts = one_line(text)[:TEXT_CHARS].split("`")
    if len(parts) % 2 == 0:  # an odd backtick marks nothing
        return md(text)
    return "".join(code(p) if i % 2 else _spaced(p) for i, p in enumerate(parts) if p.strip() or not i % 2)


def _spaced(text: str) -> str:
    """`md`, which trims, with the spaces at both ends kept."""
    return " " * text.startswith(" ") + md(text) + " " * (text.endswith(" ") and bool(text.strip()))


def code(text: str) -> str:
    """Text as a code span, whatever backticks and pipes it holds."""
    text = one_line(text)[:TEXT_CHARS].replace("|", "\\|") or " "
    run = max((len(m) for m in re.findall(r"`+", text)), default=0)
    ticks = "`" * (run + 1)
    pad = " " if run else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fence(text: str, language: str = "") -> str:
    """The end of a text as a code block that nothing in it can close."""
    text = clean(text)
    if len(text) > OUTPUT_BYTES:
        text = "…\n" + text[-OUTPUT_BYTES:]
    run = max((len(m) for m in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, run + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}\n"
