"""The views of an export bench: a table for an 80-column terminal, Markdown, and one HTML page. All made from the JSON."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from sparkproof.bench import views as shared
from sparkproof.bench.document import Interval
from sparkproof.bench.export import proof
from sparkproof.bench.export.document import Document, Row
from sparkproof.report import words
from sparkproof.report.charts import Bar, Chart, bar_chart

TITLE = "Exports: what they cost to write, and how fast they are read"
HEADS = ("format", "MiB", "write s", "peak GiB", "load s", "prefill", "decode", "read by, on")
SHOWN = tuple(h for h in HEADS if h != "load s")  # what a terminal has room for
SHORT = {"transformers": "hf"}
COLOURS = {"wrong backend": "red", "failed": "red", "measured": "", "written": "dim"}
COUNTED = ("measured", "written")


def spread(i: Interval | None, places: int = 0, samples: int = 2) -> str:
    """A median with how far its 95% interval reaches, in percent, in at most 12 characters; one sample has no interval."""
    if i is None:
        return "–"
    if samples < 2:
        return f"{i.value:,.{places}f}"
    reach = 100 * max(i.high - i.value, i.value - i.low) / i.value if i.value else 0.0
    return f"{i.value:,.{places}f} ±{f'{reach:.0f}' if reach >= 0.95 or not reach else '<1'}%"


def speed(i: Interval | None, samples: int) -> str:
    """Tokens a second."""
    return spread(i, 0 if i is None or i.value >= 99.95 else 1, samples)


def seconds(i: Interval | None, samples: int) -> str:
    """Seconds of a write."""
    return spread(i, 2 if i is None or i.value < 9.995 else 1 if i.value < 99.95 else 0, samples)


def place(row: Row) -> str:
    """Who read it and on what, as proven; or who would have."""
    by = SHORT.get(row.consumer, row.consumer)
    return f"{by} {proof.ran_on(row.proof)}" if row.proof is not None else by


def memory(row: Row) -> str:
    """GiB at the peak of writing, and of reading: on the GPU where it ran there."""
    read = row.read_peak_gib if row.read_gpu_gib is None else row.read_gpu_gib
    return "/".join("–" if x is None else f"{x:.{2 if x < 9.995 else 1}f}" for x in (row.write_peak_gib, read))


def cells(row: Row) -> list[str]:
    """One row of any table, under HEADS; where there is no speed, the row's state is in its place."""
    size = (row.bytes or 0) / 2**20
    mib = "–" if row.bytes is None else f"{size:,.{1 if size < 999.95 else 0}f}"
    state = f"row {row.failure_row}" if row.failure_row else "" if row.status in COUNTED else row.status
    count = sum(len(r.prefill_tokens_s) for r in row.reads)
    speeds = [speed(i, count) for i in (row.prefill_tokens_s, row.decode_tokens_s)] if not state else [state, "–"]
    load = "–" if row.load_s is None else f"{row.load_s.value:.1f}"
    return [row.format, mib, seconds(row.write_s, len(row.writes)), memory(row), load, *speeds, place(row)]


def table(d: Document) -> Table:
    """The terminal's, at most 80 columns wide for figures of usual size."""
    t = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for head in SHOWN:
        t.add_column(head, justify="left" if head in (HEADS[0], HEADS[-1]) else "right", no_wrap=True)
    for row in d.rows:
        t.add_row(
            *(escape(c) for h, c in zip(HEADS, cells(row), strict=True) if h in SHOWN),
            style=COLOURS.get(row.status, "dim"),
        )
    return t


def what(d: Document) -> str:
    """What was exported, one sentence."""
    if d.model is None:
        return "No model was there yet."
    m = d.model
    return (
        f"{m.name}, {m.parameters / 1e6:,.1f} M parameters, {m.bytes / 2**20:,.1f} MiB; the adapter: {m.adapter}, "
        f"{m.adapter_parameters / 1e6:,.1f} M."
    )


def tally(d: Document) -> str:
    """What came of it."""
    count = {s: sum(r.status == s for r in d.rows) for s in ("measured", "written", "wrong backend", "failed")}
    said = [f"Partial: {d.partial}."] if d.partial else []
    said.append(f"{count['measured']} of {len(d.rows)} formats written and read, each of these on a proven backend.")
    if count["written"]:
        said.append(f"{count['written']} written only.")
    if count["wrong backend"]:
        said.append(f"{count['wrong backend']} not read where it should be (row {proof.ROW}): no speed of it is given.")
    if count["failed"]:
        said.append(f"{count['failed']} failed.")
    if d.device_type == "cpu":
        said.append("Consumers ran on the CPU: their speeds say nothing about a GPU.")
    elif d.canary is None:
        said.append("No process could time a large copy, so nothing says whether the clock held.")
    elif not d.trusted:
        said.append(
            f"Copy bandwidth moved by {100 * d.canary.drift:+.1f}% between processes (at most {100 * d.canary.band:.0f}%): "
            "measure again on an idle machine."
        )
    return " ".join(said)


def problems(d: Document) -> list[str]:
    """What was not measured or does not count, each with its reason and what to do."""
    found = []
    for row in d.rows:
        where = f" in round {row.failed_round}" if row.failed_round else ""
        fix = f" Fix: {row.fix}" if row.fix else ""
        if row.status == "measured":
            if len(row.reads) < d.rounds:
                found.append(f"{row.format}: {len(row.reads)} of {d.rounds} rounds: {d.partial}")
        elif row.status == "written":
            found.append(f"{row.format}: not read: {row.reason.rstrip('.')}.{fix}")
        else:
            found.append(f"{row.format}: {row.status}{where}: {row.reason.rstrip('.')}.{fix}")
    return found


def remarks(d: Document) -> list[str]:
    """What proves each row, and what else a reader should know."""
    found = [f"{r.format}, {r.consumer}: {proof.evidence(r.proof)}" for r in d.rows if r.proof is not None and r.reads]
    for row in d.rows:
        if row.fallbacks:
            held = ", ".join(f"{n} {kind}" for kind, n in row.types.items())
            found.append(f"{row.format}: tensors whose rows don't fit their type: {row.fallbacks}; it holds {held}")
    return [*found, *d.notes]


def footer(d: Document) -> list[str]:
    """What stands under every table."""
    drift = f"; copies within {100 * abs(d.canary.drift):.1f}%" if d.canary else ""
    return [
        f"prefill, decode: tokens/s of a prompt of {d.prompt_tokens} tokens and of the {d.new_tokens} after it. ±: reach of the "
        f"95% interval over {d.rounds} rounds of fresh processes, {d.repeats} prompts each, formats in turn. peak GiB: above the "
        "start, of writing/reading, on the GPU where that ran there. Loading is from a file just written.",
        f"{what(d)} {d.device}, {d.threads} thread{'s' if d.threads > 1 else ''}{drift}; {d.seconds:.0f} s.",
        tally(d),
    ]


def markdown(d: Document) -> str:
    """For reports/published/."""
    out = [f"# {TITLE}", "", tally(d), "", ", ".join(f"{k} {v}" for k, v in d.software.items()) + ".", ""]
    out += ["| " + " | ".join(HEADS) + " |", "| --- |" + " ---: |" * (len(HEADS) - 2) + " --- |"]
    out += ["| " + " | ".join(words.one_line(c).replace("|", "\\|") for c in cells(row)) + " |" for row in d.rows]
    out += ["", *footer(d)[:2], *shared.sections(problems(d), remarks(d))]
    return "\n".join(out) + "\n"


def charts(d: Document) -> list[Chart]:
    """Bytes, and tokens a second both ways."""
    size: list[Bar] = []
    prefill: list[Bar] = []
    decode: list[Bar] = []
    for row in d.rows:
        full = f"{row.format}, {place(row)}"
        if row.bytes is not None:
            size.append(Bar(row.format, full, row.bytes / 2**20))
        for bars, i in ((prefill, row.prefill_tokens_s), (decode, row.decode_tokens_s)):
            if i is not None:
                bars.append(Bar(f"{row.format} ({place(row)})", full, i.value, i.low, i.high))
    wanted = (
        ("On the disk", size, "MiB", "lower is better"),
        (f"A prompt of {d.prompt_tokens} tokens", prefill, "tokens/s", "higher is better"),
        (f"The {d.new_tokens} tokens after it", decode, "tokens/s", "higher is better"),
    )
    found = (bar_chart(head, bars, unit, note) for head, bars, unit, note in wanted)
    return [c for c in found if c is not None]


def html(d: Document) -> str:
    """One self-contained page, without script."""
    return shared.page(
        d, TITLE, charts=charts(d), heads=list(HEADS), rows=[cells(r) for r in d.rows], tally=tally(d), footer=footer(d),
        problems=problems(d), remarks=remarks(d),
    )  # fmt: skip
