"""`junit.xml` as CI servers read it: parsed back, not compared as text."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
from junitparser import JUnitXml
from report_sample import case, evil_result, metric, mixed_results, record_of
from sparkproof.report.junit import identity, render
from sparkproof.report.runrecord import RunRecord
from sparkproof.results import CaseResult, ReasonClass, Verdict


def parsed(record: RunRecord) -> dict[str, ET.Element]:
    root = ET.fromstring(render(record))
    return {f"{c.get('classname')}::{c.get('name')}": c for c in root.iter("testcase")}


def only(tmp_path: Path, result: CaseResult) -> ET.Element:
    (element,) = parsed(record_of(tmp_path, [result])).values()
    return element


def test_every_case_once_with_the_counts_ci_shows(tmp_path: Path) -> None:
    record = record_of(tmp_path, mixed_results(), planned_only=("export/later",))
    cases = parsed(record)
    assert len(cases) == len(record.results) + 1
    document = JUnitXml.fromstring(render(record).encode())
    assert (document.tests, document.failures, document.errors, document.skipped) == (26, 1, 3, 1)
    assert cases["sparkproof.train.smollm2::135m_qlora_single_device[engine=hf]"].get("file") == "scenarios/train.yaml"
    suites = {s.get("name") for s in ET.fromstring(render(record)).iter("testsuite")}
    assert suites == {f"sparkproof.{k}" for k in ("environment", "kernel", "train", "export", "rollback")}


@pytest.mark.parametrize(
    ("verdict", "tag", "kind"),
    [
        (Verdict.FAILED, "failure", "failed"),
        (Verdict.BROKEN, "error", "broken"),
        (Verdict.RETEST, "error", "retest"),
        (Verdict.SKIPPED, "skipped", "no-gpu"),
        (Verdict.PASSED, None, None),
    ],
)
def test_verdicts(tmp_path: Path, verdict: Verdict, tag: str | None, kind: str | None) -> None:
    reason_class = ReasonClass.GPU if verdict is Verdict.SKIPPED else None
    element = only(
        tmp_path, case("k/a", verdict=verdict, reason="Because.", reason_class=reason_class, next_step="Do it.")
    )
    endings = [e for e in element if e.tag in ("failure", "error", "skipped")]
    assert [e.tag for e in endings] == ([tag] if tag else [])
    if tag:
        assert endings[0].get("type") == kind
        assert endings[0].get("message") == ("no-gpu: Because." if tag == "skipped" else "Because.")
    if tag in ("failure", "error"):
        assert "next step: Do it." in (endings[0].text or "") and "run again: sparkproof validate" in (
            endings[0].text or ""
        )


def test_a_case_without_a_result_is_an_error(tmp_path: Path) -> None:
    (element,) = parsed(record_of(tmp_path, [], planned_only=("k/left",), interrupted=True)).values()
    error = element.find("error")
    assert error is not None and error.get("type") == "missing"


def test_metrics_are_properties_and_never_time(tmp_path: Path) -> None:
    element = only(
        tmp_path,
        case(
            "k/a", duration_s=2.5, measurements=[metric("speed", 123.4, "tokens/s"), metric("n", math.nan, "x", None)]
        ),
    )
    assert float(element.get("time", "")) == 2.5
    properties = {p.get("name"): p.get("value") for p in element.iter("property")}
    assert properties["speed (tokens/s, higher is better)"] == "123.4" and properties["n (x)"] == "not a number"
    assert properties["verdict"] == "passed" and properties["mode"] == "gpu"


def test_output_and_attachments_stand_inside_the_case(tmp_path: Path) -> None:
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "run.log").write_text("x")
    (tmp_path.parent / "outside.log").write_text("x")
    artifacts = {"log": "cases/run.log", "gone": "cases/gone.log", "out": "../outside.log", "folder": "cases"}
    element = only(tmp_path, case("k/a", output_tail="the last line", artifacts=artifacts))
    text = element.findtext("system-out") or ""
    assert "the last line" in text and "held: output error: 1.12" in text
    attached = [line for line in text.splitlines() if line.startswith("[[ATTACHMENT|")]
    assert len(attached) == 1 and attached[0].endswith("cases/run.log]]")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    element = only(tmp_path, evil_result())
    text = element.findtext("system-out") or ""
    assert "<script>" in text and "\x1b" not in text and "\u202e" not in text
    assert {e.tag for e in element.iter()} == {"testcase", "properties", "property", "failure", "system-out"}
    assert not any(line.startswith("[[ATTACHMENT|") for line in text.splitlines())
    assert float(element.get("time", "")) == 0.0


def test_names_are_unique_whatever_dots_do() -> None:
    taken: Counter[tuple[str, str]] = Counter()
    names = ["a/b/c", "a.b/c", "a_b/c", "c", "a/b/c[x=1/2]", "a/b/c"]
    pairs = [identity(n, taken) for n in names]
    assert len(set(pairs)) == len(names)
    assert pairs[0] == ("a.b", "c") and pairs[3] == ("scenarios", "c") and pairs[4] == ("a.b", "c[x=1/2]")
