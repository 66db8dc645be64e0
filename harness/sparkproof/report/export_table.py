"""What came back of what went out: a row a family, a column a format and its consumer; KL and top-1 in each cell.

A case that did not pass says so in its cell; one that was skipped is a dash, and its reason stands with the skipped cases. Where
only Go rendered Ollama's template the cell says template parity: Ollama itself was not asked, and the case counts as skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparkproof.report.runrecord import RunRecord
from sparkproof.report.words import number, one_line
from sparkproof.results import CaseResult, Verdict

KL, TOP1 = "KL, mean", "top-1 agreement"
ORDER = (
    "adapter", "merged_16bit", "merged_4bit", "gguf_f32", "gguf_bf16", "gguf_f16", "gguf_q8_0", "gguf_q6_k", "gguf_q5_k_m",
    "gguf_q4_k_m", "gguf_q4_0", "gguf_mxfp4", "gguf_lora", "ollama_q8_0",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One case."""

    text: str
    verdict: Verdict
    name: str


@dataclass(frozen=True)
class ExportTable:
    """`rows` are (family, a cell or None for each column)."""

    columns: list[tuple[str, str]]  # format, consumer
    rows: list[tuple[str, list[Cell | None]]]

    def parts(self, columns: int) -> Iterator[ExportTable]:
        """The same with at most so many columns each."""
        for at in range(0, len(self.columns), columns):
            yield ExportTable(
                self.columns[at : at + columns], [(f, cells[at : at + columns]) for f, cells in self.rows]
            )


def export_table(record: RunRecord) -> ExportTable | None:
    """The table of a run's export cases; None where it has none that say where they stand."""
    placed = [(r, r.evidence) for r in record.results if r.kind == "export" and "format" in r.evidence]
    if not placed:
        return None
    found: dict[tuple[str, tuple[str, str]], Cell] = {}
    for r, e in placed:
        key = (one_line(str(e["family"])), (str(e["format"]), str(e["consumer"])))
        cell = Cell(_text(r), r.verdict, r.name)
        if key not in found or found[key].verdict is Verdict.SKIPPED:
            found[key] = cell
    columns = sorted({column for _, column in found}, key=_place)
    families = list(dict.fromkeys(family for family, _ in found))
    return ExportTable(columns, [(f, [found.get((f, c)) for c in columns]) for f in families])


def _place(column: tuple[str, str]) -> tuple[int, str, str]:
    format_, consumer = column
    return (ORDER.index(format_) if format_ in ORDER else len(ORDER), format_, consumer)


def _text(r: CaseResult) -> str:
    if r.verdict is Verdict.SKIPPED:
        return "template parity" if r.evidence.get("template_parity") == "held" else "–"
    values = {m.name: m.value for m in r.measurements}
    parts = [] if r.verdict is Verdict.PASSED else [r.verdict.value]
    if KL in values:
        parts.append(number(values[KL]))
    if TOP1 in values:
        parts.append(f"{values[TOP1]:.0%}")
    return " ".join(parts) or r.verdict.value
