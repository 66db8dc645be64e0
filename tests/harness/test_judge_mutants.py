"""The self-test's own honesty: stale tables, weak judges, broken controls and survivors are told, never counted as kills."""

import json
import os
import signal
import subprocess
import sys

import pytest
import typer
from sparkproof.cli.proof import selftest_kernels
from sparkproof.errors import UserError
from sparkproof.judge import mutants, selftest
from sparkproof.judge.mutants import MutantError
from sparkproof.judge.record import Judgement, Raised
from sparktune.ops import load_op, op_names
from sparktune.ops.spec import Mutant


@pytest.mark.parametrize("op", op_names())
def test_every_mutant_applies_and_its_file_still_parses(op):
    spec = load_op(op)
    for m in spec.mutants:
        compile(mutants.apply(mutants.source_of(spec, m.file), m, op), m.id, "exec")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("text that is nowhere", "x", "0 times"),
        ("mask=mask", "x", r"[0-9]+ times"),
        ("dup = dy * gate * s", "dup = dy * gate * s", "changes nothing"),
    ],
)
def test_a_stale_or_ambiguous_mutant_is_an_error(old, new, match):
    source = mutants.source_of(load_op("swiglu"))
    with pytest.raises(MutantError, match=match):
        mutants.apply(source, Mutant("m", "d", old, new), "swiglu")


def test_text_in_the_table_itself_is_not_edited():
    source = "x = 1\n\nMUTANTS = '''\n- y = 2\n'''\n"
    with pytest.raises(MutantError, match="0 times"):
        mutants.apply(source, Mutant("m", "d", "y = 2", "y = 3"), "op")


def test_a_mutant_that_does_not_load_is_an_error():
    with pytest.raises(MutantError, match="does not load: SyntaxError"), mutants.loaded("def", "op", "m"):
        pass


def test_an_unknown_op_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="no op called 'rms'") as e:
        selftest.kernels(["rms"])
    assert "swiglu" in e.value.fix


def in_interpreter(code: str) -> dict:
    """Run `code`, which prints JSON last, in a process that interprets kernels."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


PLANT = """
import dataclasses, json, torch
from sparkproof.judge import mutants, selftest
from sparkproof.judge.mutants import MutantError
from sparkproof.judge.record import Judgement, Raised
from sparktune.ops import load_op
from sparktune.ops.spec import Mutant
spec = load_op("swiglu")
import sparkproof.judge.correctness as judge
judge.FAMILIES = judge.FAMILIES[:2]
few = {k: v for k, v in spec.sizes.items() if k in ("typical",)}
def attempt(*planted, **changes):
    s = dataclasses.replace(spec, mutants=planted, sizes=few, **changes)
    try:
        return [dataclasses.asdict(t) for t in mutants.try_mutants(s, dtypes=[torch.bfloat16])]
    except MutantError as e:
        return str(e)
"""


@pytest.mark.slow
def test_survivors_planting_errors_and_broken_controls_are_told_apart():
    seen = in_interpreter(
        PLANT
        + """
harmless = Mutant("harmless", "nothing wrong", "dup = dy * gate * s", "dup = gate * dy * s")
real = Mutant("real", "no gate", "dup = dy * gate * s", "dup = dy * s")
typo = Mutant("typo", "a name that is not there", "dup = dy * gate * s", "dup = dy * gate * sigmoid")
wrong = dict(reference=lambda t, p, c: torch.nn.functional.gelu(t["gate"]) * t["up"], exact=None)
print(json.dumps({
    "harmless": attempt(harmless), "real": attempt(real), "typo": attempt(typo), "control": attempt(real, **wrong),
}))
"""
    )
    assert [t["killed"] for t in seen["harmless"]] == [False]
    assert seen["harmless"][0]["by"] == "every check held"
    assert [t["killed"] for t in seen["real"]] == [True]
    assert "gradient of up" in seen["real"][0]["by"]
    assert "mistake in the planting" in seen["typo"]
    assert "fails unmutated" in seen["control"]


def test_a_mutant_that_kills_its_process_is_found_and_harms_no_other():
    mutant = load_op("swiglu").mutants[0]
    fine = mutants.Trial(mutant.id, "", False, "every check held", 0.0)
    assert mutants.apart(mutant, "swiglu", lambda: fine) == fine
    dead = mutants.apart(mutant, "swiglu", lambda: os.kill(os.getpid(), signal.SIGBUS))
    assert dead.killed and dead.by == "its process died: SIGBUS" and dead.id == mutant.id
    with pytest.raises(MutantError, match="exit code -9 and no result"):
        mutants.apart(mutant, "swiglu", lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(MutantError, match="ended with exit code 3 and no result"):
        mutants.apart(mutant, "swiglu", lambda: os._exit(3))

    def stale():
        raise MutantError("bring the table up to date")

    with pytest.raises(MutantError, match="up to date"):
        mutants.apart(mutant, "swiglu", stale)


@pytest.mark.slow
def test_a_judge_without_teeth_lets_mutants_live_and_the_document_says_so():
    row = in_interpreter(
        PLANT
        + """
judge._Trial.compare = lambda self, *a, **k: None
judge.promises.laws = lambda *a: None
judge._Trial.users = lambda self, *a: None
spec = dataclasses.replace(spec, sizes=few, exact=None, mutants=spec.mutants[:1])
selftest.load_op = lambda name: spec
print(json.dumps(selftest.one("swiglu")))
"""
    )
    assert row["killed"] == 0 and row["total"] == 1 and len(row["survivors"]) == 1


@pytest.mark.slow
def test_the_document_of_a_whole_op():
    document = selftest.kernels(["quantize_scales"])
    assert document["schema"] == "sparkproof/selftest-kernels/2"
    assert document["passed"] and document["killed"] == document["total"] >= 8
    (row,) = document["ops"]
    assert row["op"] == "quantize_scales" and not row["survivors"] and not row["error"]
    assert {m["id"] for m in row["mutants"]} == {m.id for m in load_op("quantize_scales").mutants}
    assert all(m["by"] for m in row["mutants"])
    json.dumps(document)


@pytest.mark.slow
def test_all_mutants_of_all_ops_die():
    document = selftest.kernels()
    assert document["passed"], [(r["op"], r["survivors"], r["error"]) for r in document["ops"]]
    assert [r["op"] for r in document["ops"]] == op_names()


def test_the_table_says_why_an_op_was_not_tried_and_what_survived(monkeypatch, capsys):
    survivor = {"id": "no-eps", "description": "eps left out", "killed": False, "by": "no check failed"}
    row = {"op": "rope", "killed": 0, "total": 1, "survivors": ["no-eps"], "seconds": 1.0, "mutants": [survivor]}
    row |= {"error": "", "let_pass": {}}
    failed = row | {"op": "swiglu", "survivors": [], "mutants": [], "error": "swiglu fails unmutated: NaN [there]"}
    document = {"ops": [row, failed], "peers": {}, "passed": False, "killed": 0, "total": 2, "seconds": 2.0}
    monkeypatch.setattr(selftest, "kernels", lambda ops, progress: document)
    with pytest.raises(typer.Exit) as end:
        selftest_kernels(op=[], json_out=False)
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.exit_code == 1
    assert "survived: rope no-eps: eps left out; no check failed" in said
    assert "not tried: swiglu fails unmutated: NaN [there]" in said
    assert "0 of 2 wrong kernels killed" in said


def test_what_an_interpreter_wraps_at_each_call_is_told_once():
    record = Judgement("rope", "interpreter")

    def fails():
        try:
            raise ValueError("sizes differ")
        except ValueError as e:
            raise RuntimeError(repr(e)) from e

    with pytest.raises(Raised), record.tested("call"):
        fails()
    assert record.failures[0].detail == "ValueError: sizes differ"
