"""The table of what came back: every case in its cell, in each view, and template parity never passes for Ollama."""

import io

import pytest
from report_sample import record_of
from rich.console import Console
from sparkproof.report import html, summary
from sparkproof.report.closing import closing
from sparkproof.report.export_table import export_table
from sparkproof.results import CaseResult, Measurement, ReasonClass, Verdict


def case(family, format_, consumer, verdict=Verdict.PASSED, kl=None, top1=None, **evidence):
    found = [("KL, mean", kl, "nats", False), ("top-1 agreement", top1, "fraction", True)]
    return CaseResult(
        name=f"export/{family}/{format_}-{consumer}", kind="export", verdict=verdict, reason="said so",
        reason_class=ReasonClass.SOFTWARE if verdict is Verdict.SKIPPED else None,
        measurements=[Measurement(name=n, value=v, unit=u, higher_is_better=h) for n, v, u, h in found if v is not None],
        evidence={"family": family, "format": format_, "consumer": consumer, **evidence},
    )  # fmt: skip


CASES = [
    case("llama", "gguf_q8_0", "llama.cpp", kl=2.6e-3, top1=1.0),
    case("llama", "merged_16bit", "transformers", kl=1.2e-4, top1=1.0),
    case("llama", "merged_16bit", "vllm", Verdict.SKIPPED),
    case("llama", "ollama_q8_0", "ollama", Verdict.SKIPPED, template_parity="held"),
    case("qwen2", "ollama_q8_0", "ollama", Verdict.SKIPPED, template_parity="Go is not installed"),
    case("phi3", "ollama_q8_0", "ollama", template_parity="held"),
    case("qwen3", "merged_16bit", "transformers", Verdict.FAILED, kl=0.5, top1=0.75),
]


@pytest.fixture
def record(tmp_path):
    return record_of(tmp_path, CASES)


def test_cells_are_ordered_by_format_and_say_what_happened(record):
    table = export_table(record)
    assert table.columns == [
        ("merged_16bit", "transformers"), ("merged_16bit", "vllm"), ("gguf_q8_0", "llama.cpp"), ("ollama_q8_0", "ollama"),
    ]  # fmt: skip
    texts = {family: [c.text if c else None for c in cells] for family, cells in table.rows}
    assert texts["llama"] == ["1.2e-4 100%", "–", "0.0026 100%", "template parity"]
    assert texts["qwen3"] == ["failed 0.5 75%", None, None, None]
    assert (texts["qwen2"][3], texts["phi3"][3]) == ("–", "passed")
    assert [len(part.columns) for part in table.parts(3)] == [3, 1]


def test_every_view_has_it(record):
    assert "| llama |" in summary.render(record) and "template parity" in summary.render(record)
    page = html.render(record)
    assert '<table class="grid">' in page and "failed 0.5 75%" in page
    for width in (60, 120):
        console = Console(width=width, record=True, file=io.StringIO())
        for part in closing(record, width, str):
            console.print(part)
        text = console.export_text()
        assert "template parity" in text and "failed 0.5 75%" in text
        assert all(len(line) <= width for line in text.splitlines())


def test_a_run_without_exports_has_none(tmp_path):
    record = record_of(tmp_path, [CaseResult(name="kernels/x", kind="kernel", verdict=Verdict.PASSED)])
    assert export_table(record) is None and '<table class="grid">' not in html.render(record)
