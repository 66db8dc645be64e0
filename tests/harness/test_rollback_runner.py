"""The two scenarios of the smoke profile in earnest, and the ways in which they must fail."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rollback_machine import Machine
from sparkproof import catalog
from sparkproof.errors import UserError
from sparkproof.results import CaseResult, Verdict
from sparkproof.rollback import standin
from sparkproof.rollback.diff import diff
from sparkproof.runners import rollback
from sparkproof.runners.base import Context
from sparkproof.runners.rollback_sandbox import Sandbox, prepare
from sparkproof.scenario import Case

ROOT = Path(__file__).parents[2] / "scenarios"


def case(name: str, **fields: Any) -> Case:
    found = catalog.load(ROOT).cases[f"rollback/{name}"]
    return found.model_copy(update={"scenario": found.scenario.model_copy(update=fields)})


def run(chosen: Case, tmp_path: Path) -> CaseResult:
    facts: Any = SimpleNamespace()
    return rollback.run(chosen, Context(tmp_path, facts, tmp_path / "cache", memory_floor_gib=0.1))


@pytest.mark.slow  # `make validate` runs this case too
def test_the_playbook_leaves_orphans_and_caches(tmp_path: Path) -> None:
    result = run(case("playbook_leftovers"), tmp_path)
    assert result.verdict is Verdict.PASSED, result
    left = result.evidence["leftovers"]
    assert len(left["orphaned"]) > 80 and "triton 3.8.0" in left["orphaned"] and len(left["caches"]) >= 5
    assert any("stand-in" in n.lower() for n in result.notices)
    assert {m.name: m.value for m in result.measurements}["size of the real wheels of what is left"] > 2e9
    assert not (tmp_path / "cases/rollback-playbook_leftovers/machine").exists()


@pytest.mark.slow  # 25 s; the same case is in profile smoke, which CI validates after the tests
def test_ours_leaves_nothing(tmp_path: Path) -> None:
    result = run(case("sparkproof_clean"), tmp_path)
    assert result.verdict is Verdict.PASSED, result
    assert {a.name for a in result.assertions} >= {
        "the diff against the snapshot is empty",
        "the user's own files and package survived",
        "a second uninstall finds nothing to do",
        "a dry run changes nothing",
    }


def judged(machine: Machine, chosen: Case, before: Any) -> Verdict:
    scenario: Any = chosen.scenario
    return CaseResult.decide(rollback.judge(scenario, diff(before, machine.snap())))[0]


def test_the_judge_can_fail(tmp_path: Path) -> None:
    clean, leftovers = case("sparkproof_clean"), case("playbook_leftovers")
    machine = Machine(tmp_path)
    before = machine.snap()
    assert judged(machine, clean, before) is Verdict.PASSED
    assert judged(machine, leftovers, before) is Verdict.FAILED
    machine.install("sympy", requested=False)
    assert judged(machine, clean, before) is Verdict.FAILED
    assert judged(machine, leftovers, before) is Verdict.FAILED, "caches are missing"
    machine.put(machine.hub / "x", "bytes")
    assert judged(machine, leftovers, before) is Verdict.PASSED
    machine.install("torch")
    assert judged(machine, leftovers, before) is Verdict.FAILED, "torch is still there"


def test_a_lost_file_of_the_user_fails(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"a")
    assert rollback._survived({kept: b"a"}).passed
    assert not rollback._survived({kept: b"b"}).passed and not rollback._survived({tmp_path / "lost": b""}).passed


def test_python_without_ensurepip_is_a_skip_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        prepare(Sandbox(tmp_path / "m", 10))
    assert error.value.skip_class == "not-installed" and "python3-venv" in error.value.fix


def test_a_step_that_fails_is_told_with_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rollback, "prepare", lambda box, offline: box.run(["sh", "-c", "echo no space left; exit 1"], {})
    )
    monkeypatch.setattr(Sandbox, "work", property(lambda box: tmp_path))
    result = run(case("sparkproof_clean"), tmp_path)
    assert (
        result.verdict is Verdict.FAILED and "no space left" in result.output_tail and "ended with 1" in result.reason
    )


def test_the_recorded_graph_is_whole() -> None:
    g = standin.graph()
    reached, todo = set(g.requested), list(g.requested)
    while todo:
        for name in g.distributions[todo.pop()].requires:
            if name not in reached:
                reached.add(name)
                todo.append(name)
    assert reached == set(g.distributions) and len(reached) > 90
    assert g.distributions["unsloth"].version == "2026.10.7" and standin.real_bytes(reached) > 3e9


def test_stand_ins_have_the_same_bytes_each_time(tmp_path: Path) -> None:
    one = standin.wheel(tmp_path, "torch", "1.0", ["numpy==2"]).read_bytes()
    assert standin.wheel(tmp_path, "torch", "1.0", ["numpy==2"]).read_bytes() == one
