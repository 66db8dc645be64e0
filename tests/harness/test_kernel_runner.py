"""From a kernel scenario to a verdict: real children for the parts that need no GPU, constructed timings for those that do."""

import json

import pytest
from pydantic import TypeAdapter
from sparkproof.catalog import load
from sparkproof.errors import UserError
from sparkproof.facts.model import Facts
from sparkproof.results import CaseResult, Verdict
from sparkproof.runners import kernel, kernel_speed
from sparkproof.runners.base import Context
from sparkproof.runners.process import Outcome
from sparkproof.scenario import SCENARIO_ADAPTER, Case, KernelScenario
from sparktune.ops import discover, load_op, op_names


def case(**fields) -> Case:
    scenario = {"kind": "kernel", "summary": "a case of these tests", "op": "swiglu"} | fields
    return Case(name="kernels/x", file="x.yaml", scenario=SCENARIO_ADAPTER.validate_python(scenario))


@pytest.fixture
def context(tmp_path) -> Context:
    facts = TypeAdapter(Facts).validate_python({"origin": "constructed for this test"})
    return Context(run_dir=tmp_path, facts=facts, cache_dir=tmp_path, memory_floor_gib=0.5)


def answering(monkeypatch, context, outcome) -> dict:
    """Make `spawn` answer `outcome`; returns what it was called with."""
    seen = {}

    def spawn(entry, payload, **options):
        seen.update(options, entry=entry, payload=payload)
        return outcome

    monkeypatch.setattr(context, "spawn", spawn)
    return seen


def check(**changes):
    base = {"what": "error", "of": "out", "where": "bf16, typical, normal", "passed": True, "value": 0.5, "detail": "d"}
    return base | changes


@pytest.mark.slow
def test_correctness_in_a_real_child(context):
    result = kernel.run(case(dtype="bf16", timeout_s=300), context)
    assert result.verdict is Verdict.PASSED, result.reason
    assert result.mode == "interpreter" and "interpreter" in result.notices[0]
    names = {a.name for a in result.assertions}
    assert {"out: error", "gradient of gate: error", "gradient of up: error", "out: rounding order"} <= names
    assert any("needs a GPU" in n for n in result.notices)
    worst = {m.name: m for m in result.measurements}["gradient of gate: worst error"]
    assert 0 < worst.value <= 1 and worst.conditions["family"] and worst.higher_is_better is False
    json.dumps(result.model_dump(mode="json"))


def test_the_worst_family_is_named_and_one_failure_fails(monkeypatch, context):
    checks = [check(), check(value=3.0, passed=False, where="bf16, typical, outlier channel"), check(value=0.9)]
    seen = answering(
        monkeypatch, context, Outcome("ok", {"op": "swiglu", "mode": "interpreter", "checks": checks, "not_run": []})
    )
    result = kernel.run(case(dtype="bf16"), context)
    assert result.verdict is Verdict.FAILED
    (a,) = result.assertions
    assert a.value == 3.0 and "outlier channel" in a.detail and "2 of 3 held" in a.detail
    assert seen["env"]["TRITON_INTERPRET"] == "1" and seen["payload"]["dtype"] == "bf16"
    assert result.evidence["failed"][0]["where"] == "bf16, typical, outlier channel"


def test_no_checks_is_broken_not_passed(monkeypatch, context):
    answering(monkeypatch, context, Outcome("ok", {"op": "x", "mode": "interpreter", "checks": [], "not_run": []}))
    assert kernel.run(case(), context).verdict is Verdict.BROKEN


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (Outcome("timeout", duration_s=300), Verdict.FAILED),
        (Outcome("died", returncode=-11), Verdict.FAILED),
        (Outcome("error", error_type="OutOfResources", error="x", stage="timing the kernel"), Verdict.FAILED),
        (Outcome("error", error_type="Unsound", error="the oracle is all one value"), Verdict.BROKEN),
    ],
)
def test_a_child_that_does_not_end_well(monkeypatch, context, outcome, verdict):
    answering(monkeypatch, context, outcome)
    result = kernel.run(case(), context)
    assert result.verdict is verdict and result.reason and result.next_step


def test_the_gpu_is_used_where_torch_can(monkeypatch, context):
    context.facts = TypeAdapter(Facts).validate_python(
        {
            "origin": "constructed",
            "gpus": [{"name": "NVIDIA GB10", "compute_capability": "12.1", "usable_by_torch": True}],
        }
    )
    done = Outcome("ok", {"op": "swiglu", "mode": "gpu", "checks": [check()], "not_run": []})
    seen = answering(monkeypatch, context, done)
    result = kernel.run(case(), context)
    assert result.mode == "gpu" and not result.notices and seen["env"]["TRITON_INTERPRET"] == "0"


def row(**changes):
    mutants = [
        {"id": "a", "description": "d", "killed": True, "by": "out, error", "seconds": 0.1},
        {"id": "b", "description": "d", "killed": True, "by": "out, error", "seconds": 0.1},
    ]
    base = {"op": "swiglu", "killed": 2, "total": 2, "survivors": [], "error": "", "seconds": 1, "mutants": mutants}
    return base | changes


def test_mutants_all_killed_passes_and_gives_the_rate(monkeypatch, context):
    answering(monkeypatch, context, Outcome("ok", row()))
    result = kernel.run(case(task="mutants"), context)
    assert result.verdict is Verdict.PASSED
    assert result.measurements[0].value == 100 and len(result.assertions) == 2


def test_a_survivor_fails_and_a_stale_table_breaks(monkeypatch, context):
    survivor = row(killed=1, survivors=["b"])
    survivor["mutants"][1] |= {"killed": False, "by": "every check held"}
    answering(monkeypatch, context, Outcome("ok", survivor))
    result = kernel.run(case(task="mutants"), context)
    assert result.verdict is Verdict.FAILED and "mutant b" in result.reason and result.measurements[0].value == 50
    answering(monkeypatch, context, Outcome("ok", row(error="edits text that occurs 0 times", killed=0, mutants=[])))
    result = kernel.run(case(task="mutants"), context)
    assert result.verdict is Verdict.BROKEN and "0 times" in result.reason


def configuration(**changes):
    base = {
        "op": "swiglu", "arch": "sm_121", "kernel": "forward_kernel", "configuration": "much work", "dtype": "bf16",
        "variant": "", "num_warps": 4, "passed": True, "reason": "", "registers": 40, "registers_limit": 255, "spills": 0,
        "shared_bytes": 2048, "shared_limit": 101376, "seconds": 0.1,
    }  # fmt: skip
    return base | changes


def test_compile_rows_become_assertions(monkeypatch, context):
    from sparkproof.judge import aot

    bad = configuration(passed=False, reason="147456 bytes of shared memory, 101376 are allowed", shared_bytes=147456)
    for rows, verdict in (([configuration()], Verdict.PASSED), ([configuration(), bad], Verdict.FAILED)):
        monkeypatch.setattr(aot, "compile_all", lambda *a, r=rows, **k: {"configurations": r, "triton": "3.8.0"})
        result = kernel.run(case(task="compile"), context)
        assert result.verdict is verdict and result.mode == "ahead-of-time"
    assert "147456" in result.assertions[0].detail
    lost = configuration(passed=False, reason="does not compile: x", registers=None, spills=None, shared_bytes=None)
    monkeypatch.setattr(aot, "compile_all", lambda *a, **k: {"configurations": [lost], "triton": "3.8.0"})
    assert kernel.run(case(task="compile"), context).verdict is Verdict.FAILED


def timings(drift=0.0, fraction=0.85, speedup=1.5, reference=0):
    def interval(x):
        return {"value": x, "low": x * 0.99, "high": x * 1.01}

    ms = {n: interval(1.0) | {"samples": [1.0]} for n in ("sparktune", "plain PyTorch")}
    which = {
        "gb_s": interval(200.0) | {"samples": [200.0]}, "copy_fraction": interval(fraction), "ms": ms, "notes": [],
        "speedup": {"plain PyTorch": interval(speedup)}, "sentences": ["1.50 x faster than plain PyTorch"],
    }  # fmt: skip
    return {
        "device": "GB10", "dims": {"rows": 1}, "input_sets": 3, "variant": "", "trusted": abs(drift) <= 0.05,
        "copy": {"before": [230.0], "after": [230.0], "drift": drift, "band": 0.05, "unit": "GB/s"},
        "watermarks": {"triton": 9, "interpreter": 0, "reference": reference}, "passes": {"forward": which},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("document", "verdict"),
    [
        (timings(), Verdict.PASSED),
        (timings(fraction=0.4), Verdict.FAILED),
        (timings(speedup=0.8), Verdict.FAILED),
        (timings(speedup=0.995), Verdict.PASSED),  # the interval spans 1: no difference
        (timings(drift=0.2), Verdict.RETEST),
        (timings(drift=-0.2, fraction=0.4), Verdict.RETEST),
        (timings(drift=0.2, reference=3), Verdict.FAILED),  # the reference was timed: no canary excuses that
    ],
)
def test_speed_verdicts(document, verdict):
    scenario = case(task="speed", dtype="bf16", min_copy_fraction=0.7).scenario
    assert isinstance(scenario, KernelScenario)
    empty = CaseResult(name="x", kind="kernel", verdict=Verdict.BROKEN)
    result = kernel_speed.judge_speed(scenario, empty, document)
    assert result.verdict is verdict, result.reason
    share = {m.name: m for m in result.measurements}["forward share of copy bandwidth"]
    assert share.unit == "%" and share.low < share.value < share.high


def test_unknown_ops_and_variants_are_named(context):
    with pytest.raises(UserError, match="no op called 'gelu'"):
        kernel.run(case(op="gelu"), context)
    with pytest.raises(UserError, match="no variant 't5'"):
        kernel.run(case(op="rms_norm", variant="t5"), context)


def test_every_op_has_each_kind_of_scenario(pytestconfig):
    catalog = load(pytestconfig.rootpath / "scenarios")
    kernels = [c.scenario for c in catalog.cases.values() if isinstance(c.scenario, KernelScenario)]
    assert not [p for p in catalog.problems if "kernels" in p.file]
    have = {(s.op, s.task) for s in kernels}
    tasks = {op: {task for o, task in have if o == op} for op in op_names()}
    for op, spec in discover().items():
        timed = {"speed"} if "speed" in spec.sizes else set()
        assert tasks[op] == {"correctness", "mutants", "compile"} | timed, op
    for op in op_names():
        assert {s.dtype for s in kernels if s.op == op and s.task == "correctness"} == {"fp32", "bf16", "fp16"}, op
    for s in kernels:
        if s.task == "speed":
            memory = load_op(s.op).bound == "memory"
            assert s.requires.gpu and (s.min_copy_fraction if memory else s.min_matrix_fraction) > 0, s.op


def test_the_op_list_that_imports_nothing_is_the_list_of_specs():
    assert op_names() == list(discover())
