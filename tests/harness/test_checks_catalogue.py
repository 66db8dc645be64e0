"""Catalogue, registry and documentation agree, and cover the rows that were promised."""

from __future__ import annotations

from pathlib import Path

import pytest
from sparkproof.catalog import load_file
from sparkproof.checks import catalogue, registry
from sparkproof.checks.catalogue import CATALOGUE, TOPICS
from sparkproof.checks.registry import run_checks
from sparkproof.errors import UserError
from sparkproof.facts.model import Facts

ROOT = Path(__file__).parents[2]
PROMISED = {14, 16, 17, 18, 19, 23, 32, 36, 37, 43, 45, 52}


def test_every_entry_has_a_function_and_every_function_an_entry() -> None:
    run_checks(Facts(origin="nothing"))
    assert set(registry.CHECKS) == set(CATALOGUE)
    for check_id, function in registry.CHECKS.items():
        assert function.__module__ == f"sparkproof.checks.{CATALOGUE[check_id].topic}"


def test_promised_rows_are_covered() -> None:
    assert {row for e in CATALOGUE.values() for row in e.rows} >= PROMISED
    assert "bitsandbytes.avx512_repack" in CATALOGUE


def test_documentation_is_fresh() -> None:
    path = ROOT / "docs" / "failures.md"
    assert path.read_text(encoding="utf-8") == catalogue.markdown(), (
        "run: python -m sparkproof.checks.catalogue > docs/failures.md"
    )


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
