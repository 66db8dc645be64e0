"""The views as files: golden texts, the JSON schema, one failing view, atomic writes. `UPDATE_GOLDEN=1` writes anew."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import jsonschema
import pytest
from markdown_it import MarkdownIt
from report_sample import XSS, case, evil_result, good_results, laptop, mixed_results, record_of
from sparkproof.errors import UserError
from sparkproof.report import junit, model, summary, views
from sparkproof.report.words import clean, duration, label, number, shorten
from sparkproof.results import Verdict

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def same_as_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), (
        f"{path} differs; UPDATE_GOLDEN=1 writes it anew, then read the diff"
    )


def test_golden_summary_and_junit(tmp_path: Path) -> None:
    record = record_of(tmp_path, mixed_results(), planned_only=("export/later",))
    same_as_golden("report_summary.md", summary.render(record))
    same_as_golden("report_junit.xml", junit.render(record))


# --- report.json ---


def test_the_committed_schema_is_fresh() -> None:
    committed = (ROOT / "reports" / "schema" / "report-1.json").read_text(encoding="utf-8")
    assert committed == model.report_schema(), "sparkproof.report.model.report_schema() gives the new text"


@pytest.mark.parametrize("results", [mixed_results(), [*good_results(), evil_result()], []])
def test_a_report_is_strict_json_and_fits_its_schema(tmp_path: Path, results: list) -> None:
    def forbid(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    text = model.render(record_of(tmp_path, results, planned_only=("k/left",)))
    document = json.loads(text, parse_constant=forbid)
    validator = jsonschema.Draft202012Validator(model.json_schema())
    validator.check_schema(validator.schema)
    validator.validate(document)
    assert document["schema"] == "sparkproof-report-1" and len(document["cases"]) == len(results)
    assert document["missing"][0]["name"] == "k/left" and not document["verdict"]["validated"]
    assert model.Report.model_validate(document).run.run_id == "2026-11-24_06-30-00-abcd"
    document["cases"] = [{"name": 1}]
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(document)


# --- summary.md ---


def test_the_summary_stays_under_githubs_limit_with_failures_first(tmp_path: Path) -> None:
    bad = [case(f"k/bad{i}", verdict=Verdict.FAILED, reason="it did", output_tail="o" * 20_000) for i in range(300)]
    good = [case(f"k/good{i}") for i in range(2000)]
    text = summary.render(record_of(tmp_path, [*good, *bad]))
    assert len(text.encode()) < 1024 * 1024
    assert "left out for length" in text and text.index("k/bad0") < len(text) / 10


def test_nothing_in_the_summary_is_markup(tmp_path: Path) -> None:
    hostile = "<b>x</b> [link](https://evil.example) @someone #1 `tick` | cell\n# heading\n*em* _em_ fence"
    result = case(
        "k/a", verdict=Verdict.FAILED, reason=hostile, next_step=hostile, output_tail="```\n</details><script>\n````"
    )
    text = summary.render(record_of(tmp_path, [result], laptop()))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    tags = set(re.findall(r"<(\w+)", html))
    assert tags == {
        "h2",
        "h3",
        "h4",
        "p",
        "strong",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "pre",
        "code",
        "details",
        "summary",
    }
    assert html.count("<h2") == html.count("<h3") == html.count("<h4") == 1 and html.count("</details>") == 1
    assert "&lt;/details&gt;&lt;script&gt;" in html and "<code>tick</code>" in html
    assert "@someone" not in text and "https://" not in text, "no mention, no link that GitHub would make by itself"


# --- writing ---


def test_write_all_writes_every_view_and_again(tmp_path: Path) -> None:
    record = record_of(tmp_path, [*mixed_results(), evil_result()])
    first = {n: p.read_bytes() for n, p in views.write_all(record, tmp_path).items()}
    assert sorted(first) == ["junit.xml", "report.html", "report.json", "summary.md"] and all(first.values())
    assert {n: p.read_bytes() for n, p in views.write_all(record, tmp_path).items()} == first, "nothing depends on when"
    assert not list(tmp_path.glob(".*")), "no half file is left"


def test_one_view_that_fails_does_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of(tmp_path, good_results())

    def fails(record: object) -> str:
        raise ZeroDivisionError("planted")

    monkeypatch.setitem(views.VIEWS, "report.json", fails)
    with pytest.raises(UserError, match=r"report\.json could not be made: ZeroDivisionError: planted") as e:
        views.write_all(record, tmp_path)
    assert "sparkproof report" in e.value.fix
    assert sorted(p.name for p in tmp_path.iterdir()) == ["junit.xml", "record.jsonl", "report.html", "summary.md"]


def test_a_view_that_cannot_be_written_keeps_its_older_self(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of(tmp_path, good_results())
    views.write_all(record, tmp_path)
    old = (tmp_path / "junit.xml").read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full.*and 3 more views"):
        views.write_all(record_of(tmp_path, mixed_results()), tmp_path)
    assert (tmp_path / "junit.xml").read_bytes() == old and not list(tmp_path.glob(".*"))


# --- words ---


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1.0, "1"), (3461.2, "3,461"), (0.0123456, "0.01235"), (4.9e-6, "4.9e-6"), (12345678, "12,345,678"),
        (2.5e12, "2.5e12"), (-0.5, "-0.5"), (float("nan"), "not a number"), (True, "yes"), (None, "–"), ("a\nb", "a b"),
    ],
)  # fmt: skip
def test_numbers(value: object, text: str) -> None:
    assert number(value) == text  # type: ignore[arg-type]


def test_other_words() -> None:
    assert [duration(s) for s in (0.04, 9.96, 65, 3700)] == ["0.0 s", "10 s", "1 min 05 s", "1 h 01 min"]
    assert label("peak_rss_gib", "GiB") == "peak RSS" and label("tokens_per_s", "tokens/s") == "speed"
    assert label("KL, mean", "nats") == "KL, mean" and label("step_p50_ms", "ms") == "step p50"
    assert clean("10%\r50%\r100%\r\nnext\x1b[31m!\x1b]0;title\x07\u202e") == "100%\nnext!"
    name = "train/smollm2/135m_qlora_single_device[engine=sparktune]"
    assert len(shorten(name, 30)) == 30 and shorten(name, 30).endswith("[engine=sparktune]")
    assert shorten("short", 30) == "short"
    assert XSS in clean(XSS), "cleaning is not escaping"
