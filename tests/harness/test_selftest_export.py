"""Every planted export fault is caught by the assertion that names it, and an export without a fault passes."""

import contextlib
import json
from pathlib import Path

import jsonschema
import pytest
from sparkproof.judge import export_faults, selftest_export
from sparkproof.judge.export_faults import FAULTS, Fault
from sparkproof.results import Assertion, CaseResult
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
WANTED = {  # what an export judge must be able to find
    "merged-twice", "wrong-scale", "four-bit-base", "transposed", "tied-dropped", "vocabulary-padded", "rope-scaling",
    "pre-tokenizer", "no-system-prompt", "bos-doubled", "stop-missing", "repacked", "wrong-tensor", "truncated",
}  # fmt: skip


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    told = []
    found = selftest_export.in_process(tmp_path_factory.mktemp("cache"), told.append)
    assert len(told) == 1 + len(selftest_export.HEALTHY) + len(FAULTS)
    return found


def test_the_table_has_every_fault_of_the_list():
    assert {f.id for f in FAULTS} == WANTED and len(FAULTS) == len(WANTED)


def test_an_export_without_a_fault_passes(document):
    for u in document["unplanted"]:
        assert u["verdict"] == "passed", u
    names = {u["format"]: u["assertions"] for u in document["unplanted"]}
    for fault in FAULTS:
        assert any(name.startswith(fault.caught_by) for name in names[fault.format]), fault.id


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.id)
def test_each_fault_is_caught_by_the_assertion_that_names_it(document, fault):
    (trial,) = [t for t in document["faults"] if t["id"] == fault.id]
    assert trial["caught"] and trial["verdict"] == "failed", trial
    assert trial["by"].startswith(fault.caught_by) and fault.words in trial["message"]


def test_the_document_keeps_its_schema(document):
    jsonschema.validate(document, json.loads((ROOT / "reports/schema/selftest-export-1.json").read_text()))
    assert document["passed"] and document["caught"] == document["total"] == len(FAULTS)


@pytest.mark.parametrize(
    ("name", "detail", "caught"),
    [("mean KL", "twice", True), ("mean KL", "something else", False), ("chat template", "twice", False)],
)
def test_what_only_another_assertion_or_other_words_find_is_not_caught(monkeypatch, tmp_path, name, detail, caught):
    monkeypatch.setattr(export_faults, "FAULTS", (Fault("some", "is wrong", "gguf_f16", "mean KL", "twice"),))
    monkeypatch.setattr(selftest_export, "_taught", lambda *args: (tmp_path, tmp_path))

    def trial(folder, base, adapter, case, format_, fault):
        names = ("mean KL of it", "chat template")
        assertions = [Assertion(name=n, passed=fault is None or not n.startswith(name), detail=detail) for n in names]
        return CaseResult(name=case, kind="export", verdict=CaseResult.decide(assertions)[0], assertions=assertions)

    monkeypatch.setattr(selftest_export, "_trial", trial)
    assert selftest_export.run(tmp_path).passed is caught


@pytest.mark.parametrize("passed", [True, False])
def test_the_verb_says_what_survived_by_its_exit_code(monkeypatch, document, passed):
    from sparkproof.cli import app

    changed = {**document, "passed": passed, "faults": [{**t, "caught": passed} for t in document["faults"]]}
    monkeypatch.setattr(selftest_export, "in_process", lambda cache, progress: changed)
    for arguments in ([], ["--json"]):
        done = CliRunner().invoke(app, ["selftest", "export", *arguments])
        assert done.exit_code == (0 if passed else 1)
        assert json.loads(done.stdout)["caught"] if arguments else "faults caught" in done.stdout


def test_nothing_planted_stays(tmp_path):
    from sparkproof.runners import export_write

    right = export_write.write
    with contextlib.suppress(RuntimeError), selftest_export._planted(tmp_path, FAULTS[0]):
        assert export_write.write is not right
        raise RuntimeError
    assert export_write.write is right
