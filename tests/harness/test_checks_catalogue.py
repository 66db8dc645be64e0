"""Catalogue, registry and documentation agree, and cover the rows that were promised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sparkproof.catalog import load_file
from sparkproof.checks import catalogue, registry
from sparkproof.checks.catalogue import CATALOGUE, ROWS, TOPICS
from sparkproof.checks.lore import LORE
from sparkproof.checks.registry import run_checks
from sparkproof.errors import UserError
from sparkproof.facts.model import Facts

ROOT = Path(__file__).parents[2]


def test_every_entry_has_a_function_and_every_function_an_entry() -> None:
    run_checks(Facts(origin="nothing"))
    assert set(registry.CHECKS) == set(CATALOGUE)
    for check_id, function in registry.CHECKS.items():
        assert function.__module__ == f"sparkproof.checks.{CATALOGUE[check_id].topic}"


def test_every_row_is_there_and_has_become_something() -> None:
    assert list(ROWS) == list(range(1, 61))
    for row in ROWS.values():
        assert row.checks or row.tests or row.note, row.row
        if row.kind == "not detectable":
            assert len(row.note) > 30, f"row {row.row} must say why it can't be detected"
    assert {r for e in CATALOGUE.values() for r in e.rows} <= set(ROWS)
    assert sum(r.kind == "check" for r in ROWS.values()) >= 57
    assert "bitsandbytes.avx512_repack" in CATALOGUE


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda r: str(r.row))
def test_what_a_row_names_as_its_test_exists(row: catalogue.Row) -> None:
    for reference in row.tests:
        path, _, function = reference.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert path.startswith(("scenarios/", "tests/"))
        if function:
            assert f"def {function}(" in text, reference


def test_every_topic_file_is_a_topic() -> None:
    folder = ROOT / "harness" / "sparkproof" / "checks" / "data"
    assert {p.stem for p in folder.glob("*.toml")} == {*TOPICS, "rows", "lore"}


def test_the_catalogue_as_data() -> None:
    document = catalogue.document()
    assert document["schema"] == "sparkproof-failures-1"
    assert [r["row"] for r in document["rows"]] == list(range(1, 61))
    assert {c for r in document["rows"] for c in r["checks"]} == {e.id for e in CATALOGUE.values() if e.rows}
    assert {r["kind"] for r in document["rows"]} <= {"check", "test", "not detectable"}
    assert [c["id"] for c in document["checks"]] == list(CATALOGUE)


def test_fixes_name_the_cuda_that_is_set_up() -> None:
    """Row 60: instructions that lead backwards. One CUDA version in all that is told to be installed."""
    told = {n for e in CATALOGUE.values() for n in re.findall(r"whl/cu(\d+)", e.fix)}
    told |= {n for line in LORE.no_arm_wheel.values() for n in re.findall(r"whl/cu(\d+)", line)}
    assert told == {"130"}, "what DGX OS, NVIDIA's images and the lock's torch for aarch64 are built for"
    assert not [e.id for e in CATALOGUE.values() if re.search(r"cuda-toolkit-12|CUDA 12", e.fix)]


def test_documentation_is_fresh() -> None:
    path = ROOT / "docs" / "failures.md"
    assert path.read_text(encoding="utf-8") == catalogue.markdown(), "run: sparkproof schemas"


def test_documentation_has_every_check_with_fix_and_source() -> None:
    text = catalogue.markdown()
    for entry in CATALOGUE.values():
        section = text.split(f"### {entry.id}\n")[1].split("\n#")[0]
        assert entry.cause in section and entry.source in section and entry.detects in section
        assert f"`{entry.fix}`" in section if entry.fix else "nothing to do" in section


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=lambda e: e.id)
def test_only_harmless_entries_have_nothing_to_do(entry: catalogue.Entry) -> None:
    assert entry.fix or entry.severity == "info"


def test_one_scenario_a_topic_in_smoke() -> None:
    seen = {}
    for path in sorted((ROOT / "scenarios" / "environment").glob("*.yaml")):
        cases, problems = load_file(path, ROOT / "scenarios")
        assert not problems
        for case in cases:
            assert case.kind == "environment" and case.scenario.profile == "smoke"
            seen[path.stem] = case.scenario.topic  # type: ignore[union-attr]
    assert seen == {topic: topic for topic in TOPICS}


def test_unknown_topic_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        run_checks(Facts(origin="x"), "memori")
    assert "Did you mean 'memory'?" in caught.value.fix


def test_unregistered_id_is_refused() -> None:
    with pytest.raises(KeyError):
        registry.check("gpu.no_such_check")


def test_an_empty_answer_is_a_fault_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    run_checks(Facts(origin="nothing"))
    monkeypatch.setitem(registry.CHECKS, "gpu.unusable", lambda facts: [])
    with pytest.raises(ValueError, match="empty list"):
        registry.evaluate("gpu.unusable", Facts(origin="x"))


@pytest.mark.parametrize("topic", ["models", "export", "build"])
def test_what_keeps_nobody_from_training_is_no_error(topic: str) -> None:
    assert not [e.id for e in CATALOGUE.values() if e.topic == topic and e.severity == "error"]
