"""Engines in a run: who learned, how fast, with how much memory, and one sentence on whether any of them is faster than hf.

Ratios come from comparison cases alone, whose blocks alternate on one device; a training case's own tokens a second stand for
themselves. What was not measured is said to be not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparkproof.judge.comparison import said, speed
from sparkproof.judge.stats import Interval
from sparkproof.report.runrecord import RunRecord
from sparkproof.report.words import number, one_line
from sparkproof.results import CaseResult, Verdict

HEADS = ("family", "model and batch", "engine", "learned", "tokens/s", "peak GiB", "times hf", "memory of hf's")
FIT_HEADS = ("family", "model", "engine", "context", "largest batch", "peak GiB", "of GiB", "no more because")
QUESTION = "Is any engine faster than hf here?"


@dataclass(frozen=True)
class Row:
    """One engine on one model, as cells under HEADS; `counted` is false for one that is wrong, failed or missing."""

    cells: tuple[str, ...]
    counted: bool
    compared: bool = True


def rows(record: RunRecord) -> list[Row]:
    """Comparisons first, each engine in its order; then training cases that no comparison covers."""
    found = [row for c in _comparisons(record) for row in _compared(record, c)]
    covered = {(c.evidence["subject"]["family"], c.evidence["subject"]["model"]) for c in _comparisons(record)}
    for r in record.results:
        subject = r.evidence.get("subject")
        if r.kind == "train" and isinstance(subject, dict) and (subject["family"], subject["model"]) not in covered:
            found.append(_trained(r, subject))
    return found


def claims(record: RunRecord) -> list[str]:
    """One sentence a comparison; or the one that says why there is none."""
    on_gpu = [c for c in _comparisons(record) if c.mode == "gpu"]
    if on_gpu:
        return [_claim(c) for c in on_gpu]
    return [f"Whether Unsloth or sparktune is faster than hf was not measured: {_why_not(record)}"]


def fits(record: RunRecord) -> list[tuple[str, ...]]:
    """`fit_rows` of a run."""
    return fit_rows(record.results)


def fit_rows(results: Sequence[CaseResult]) -> list[tuple[str, ...]]:
    """The largest batch at each context, as cells under FIT_HEADS; what was predicted and not tried says so."""
    found: list[tuple[str, ...]] = []
    for r in results:
        if r.kind == "fit" and isinstance(r.evidence.get("fits"), list):
            s = r.evidence["subject"]
            for f in r.evidence["fits"]:
                batch = str(f["batch"]) if f["batch"] else "none"
                more = f" ({f['predicted']} predicted)" if f["predicted"] > f["batch"] else ""
                found.append(
                    (
                        one_line(s["family"]), f"{one_line(s['model'])}, {s['settings']}", s["engine"], f"{f['context']:,}",
                        f"{batch}{more}", _gib(f["peak_gib"]), _gib(s["limit_gib"]), one_line(f["why"]),
                    )
                )  # fmt: skip
    return found


def _comparisons(record: RunRecord) -> list[CaseResult]:
    return [r for r in record.results if r.kind == "comparison" and isinstance(r.evidence.get("engines"), list)]


def _why_not(record: RunRecord) -> str:
    cases = [r for r in record.results if r.kind == "comparison"]
    if any(r.mode == "host" for r in cases):
        return "there is no GPU, and the CPU's times say nothing about one's."
    if cases:
        return f"{one_line(cases[0].reason).rstrip('.') or 'its case gave no result'}."
    if any(p.kind == "comparison" for p in record.missing):
        return "the run ended before its comparison of engines did."
    return "this run had no comparison of engines."


def _claim(c: CaseResult) -> str:
    """'On this machine, at these settings (...), Unsloth was 1.44 ± 0.03 times as fast as hf with 0.54 of its memory; ...'"""
    settings = one_line(c.evidence["subject"]["settings"])
    if c.verdict is Verdict.RETEST:
        return (
            f"On this machine, at these settings ({settings}), the engines' speeds can't be told. {one_line(c.reason)}"
        )
    parts = [_part(e) for e in c.evidence["engines"] if e["engine"] != "hf"]
    return f"On this machine, at these settings ({settings}), {'; '.join(parts)}."


def _part(e: dict[str, Any]) -> str:
    who, why = said(e["engine"]), one_line(e["why"]).rstrip(".")
    if e["status"] == "missing":
        return f"{who} was not measured ({why})"
    if e["status"] != "timed":
        word = "failed" if e["status"] == "failed" else "computed something else than hf"
        return f"{who} {word} and is not counted ({why})"
    if "ratio" not in e:
        return f"{who} has nothing to be compared with, since hf failed"
    ratio = Interval(e["ratio"], e["ratio_low"], e["ratio_high"])
    return f"{who} {speed(ratio)} with {e['memory_share']:.2f} of its memory"


def _compared(record: RunRecord, c: CaseResult) -> Iterator[Row]:
    subject = c.evidence["subject"]
    what = one_line(subject["settings"]).split(", rank ")[0]
    kind = subject.get("architecture") or subject["family"]
    for e in c.evidence["engines"]:
        timed = e["status"] == "timed" and c.verdict is not Verdict.RETEST
        ratio = "1" if e["engine"] == "hf" else e["status"] if e["status"] != "timed" else "–"
        if "ratio" in e and timed:
            ratio = f"{e['ratio']:.2f} ({e['ratio_low']:.2f} to {e['ratio_high']:.2f})"
            if e["ratio_low"] <= 1 <= e["ratio_high"]:
                ratio += ", no difference"
        elif e["status"] == "timed" and not timed:
            ratio = "retest"
        yield Row(
            (
                one_line(subject["family"]), what, e["engine"], _learned(record, kind, e["engine"]),
                _whole(e.get("tokens_per_s")), _gib(e.get("peak_gib")), ratio,
                f"{e['memory_share']:.2f}" if "memory_share" in e else "1" if e["engine"] == "hf" else "–",
            ),
            timed,
        )  # fmt: skip


def _learned(record: RunRecord, architecture: str, engine: str) -> str:
    """What training cases of this architecture and engine say: all that ran learned, one did not, or none was run."""
    cases = [r for r in record.results if r.kind == "train" and _is(r, architecture, engine)]
    said = {_outcome(r) for r in cases}
    for word in ("no", "no verdict", "yes", "yes, on the CPU"):
        if word in said:
            return word
    return "not run" if cases else "not tried"


def _is(r: CaseResult, architecture: str, engine: str) -> bool:
    """Whether a training case is of this engine, and its model of this architecture; one that left no account by its name."""
    subject = r.evidence.get("subject")
    if isinstance(subject, dict):
        return (subject.get("architecture") or subject["family"], subject["engine"]) == (architecture, engine)
    return r.name.startswith(f"train/{architecture}/") and f"engine={engine}]" in r.name


def _outcome(r: CaseResult) -> str:
    if r.verdict in (Verdict.PASSED, Verdict.RETEST):
        return "yes" if r.mode == "gpu" else "yes, on the CPU"
    return {Verdict.FAILED: "no", Verdict.BROKEN: "no verdict"}.get(r.verdict, "not run")


def _trained(r: CaseResult, subject: dict[str, Any]) -> Row:
    measured = {m.name: m.value for m in r.measurements}
    peak = measured.get("peak_gpu_allocated_gib", measured.get("peak_rss_gib"))
    what = f"{one_line(subject['model'])}, {subject['batch']} rows of up to {subject['seq_len']} tokens"
    cells = (
        one_line(subject["family"]), what, subject["engine"], _outcome(r), _whole(measured.get("tokens_per_s")),
        _gib(peak), "not compared", "not compared",
    )  # fmt: skip
    return Row(cells, r.verdict is Verdict.PASSED, compared=False)


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _gib(value: float | None) -> str:
    return "–" if value is None else number(value)
