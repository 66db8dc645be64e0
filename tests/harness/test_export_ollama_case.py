"""An Ollama case against a server that speaks Ollama's API, right, wrong and dying; and without one, by template parity."""

import json
import sys
from pathlib import Path

import pytest
from fake_ollama import Brain, FakeOllama, hide, install, serving
from sparkproof.errors import UserError
from sparkproof.report.export_table import export_table
from sparkproof.results import ReasonClass, Verdict
from sparkproof.runners import export, export_account, export_go, export_modelfile, export_ollama_judge, export_source
from sparkproof.scenario import Case, ExportScenario
from sparktune.export import ollama as writer
from test_export_runner import FACTS, SameProcess, train_case

sys.path.insert(0, str(Path(__file__).parents[1] / "sparktune"))
import export_tiny

WITH_GO = pytest.mark.skipif(not export_go.available(), reason="needs Go's compiler: sudo apt install golang-go")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    base = export_tiny.save_base(folder / "base")
    return base, export_tiny.save_adapter(base, folder / "lora", steps=80)


@pytest.fixture(scope="module")
def brain(tiny):
    return Brain(*tiny)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")  # Go's program is built once


@pytest.fixture
def context(tiny, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(export_source, "ensure_trained", lambda case, context: tiny[1])
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # the discard port: nobody answers
    return SameProcess(
        run_dir=tmp_path / "run", facts=FACTS, cache_dir=cache, memory_floor_gib=0.2,
        cases={"train/tiny": train_case(tiny[0])},
    )  # fmt: skip


def case():
    scenario = ExportScenario(kind="export", summary="a folder for Ollama", source="train/tiny", format="ollama_q8_0",
                              consumer="ollama", timeout_s=240)  # fmt: skip
    return Case(name="export/tiny-ollama", file="export/tiny.yaml", scenario=scenario)


def failed(result):
    return [a.name for a in result.assertions if not a.passed]


def out(context):
    return context.run_dir / "cases/export-tiny-ollama/ollama_q8_0"


def test_ollama_that_answers_right_passes_and_keeps_nothing(context, brain, monkeypatch):
    hide("go", monkeypatch)
    with serving(FakeOllama(brain), monkeypatch) as fake:
        result = export.run(case(), context)
    assert result.verdict is Verdict.PASSED, result.reason
    names = {a.name for a in result.assertions}
    assert {"answer of Ollama to the bare prompt", "answer of Ollama through its template", "file size"} <= names
    assert result.evidence["versions"] == {"ollama": "0.33.2"} and result.mode == "host"
    assert result.evidence["backend"]["created by"] == "the API"
    assert result.evidence["canary"]["exported"] == export_tiny.ANSWER
    assert {"generation", "load time", "export size"} <= {m.name for m in result.measurements}
    assert fake.models == {"the-users-own:latest": {}}, "its own model is gone, the user's is not"
    (made,) = [json.loads(body) for _, path, body in fake.calls if path == "/api/create"]
    read = made["template"], made["parameters"]["stop"], list(made["files"])
    assert read[0].startswith("{{- if .System }}") and "<|im_end|>" in read[1] and read[2] == ["model.Q8_0.gguf"]
    assert not out(context).exists(), "a folder that passed is removed"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("says", "canary answer from the consumer"),
        ("space", "prompts that Ollama feeds as another number of tokens"),
        ("doubled", "prompts that Ollama feeds as another number of tokens"),
        ("runs on", "stop texts in Ollama's answers"),
        ("template", "template that Ollama keeps"),
    ],
)
def test_wrong_answers_fail_by_what_names_them(context, brain, monkeypatch, wrong, says):
    hide("go", monkeypatch)
    with serving(FakeOllama(brain, wrong), monkeypatch) as fake:
        result = export.run(case(), context)
    assert result.verdict is Verdict.FAILED and says in failed(result), failed(result)
    assert result.next_step and fake.models == {"the-users-own:latest": {}}
    assert out(context).exists(), "a failed export stays for whoever looks"


def test_a_server_that_dies_midway_fails_and_the_user_is_told_what_it_may_have_kept(context, brain, monkeypatch):
    hide("go", monkeypatch)
    with serving(FakeOllama(brain, "dies"), monkeypatch) as fake:
        result = export.run(case(), context)
    assert result.verdict is Verdict.FAILED and "converse raised" in result.reason
    (name,) = [n for n in fake.models if n.startswith("sparkproof-")]
    assert any(f"`ollama rm {name}`" in notice for notice in result.notices)


def test_a_model_that_ollama_does_not_delete_is_named(context, brain, monkeypatch):
    hide("go", monkeypatch)
    with serving(FakeOllama(brain, "keeps"), monkeypatch) as fake:
        result = export.run(case(), context)
    (name,) = [n for n in fake.models if n.startswith("sparkproof-")]
    assert result.verdict is Verdict.PASSED and any(f"`ollama rm {name}`" in notice for notice in result.notices)


def test_a_killed_conversation_leaves_no_model(context, brain, monkeypatch):
    """The watchdog kills the process that talks; who waits for it deletes."""
    hide("go", monkeypatch)
    spawn = SameProcess.spawn

    def killed(self, entry, payload, **other):
        outcome = spawn(self, entry, payload, **other)
        if other["phase"] == "converse":
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(SameProcess, "spawn", killed)
    with serving(FakeOllama(brain), monkeypatch) as fake, pytest.raises(KeyboardInterrupt):
        export.run(case(), context)
    assert fake.models == {"the-users-own:latest": {}}


def test_ollama_that_refuses_the_file_fails_and_one_that_does_not_know_the_architecture_skips(
    context, brain, monkeypatch
):
    hide("go", monkeypatch)
    with serving(FakeOllama(brain, "refuses"), monkeypatch):
        refused = export.run(case(), context)
    assert refused.verdict is Verdict.FAILED and "invalid file magic" in refused.reason
    with (
        serving(FakeOllama(brain, "architecture"), monkeypatch) as fake,
        pytest.raises(UserError, match="unknown model") as e,
    ):
        export.run(case(), context)
    assert e.value.skip_class == ReasonClass.PLATFORM.value and fake.models == {"the-users-own:latest": {}}


def test_the_program_ollama_creates_where_it_is_installed(context, brain, monkeypatch, tmp_path):
    """A stand-in that reads the Modelfile as the program would, and creates through the API."""
    hide("go", monkeypatch)
    program = f"""#!{sys.executable}
import sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
import ollama
from sparkproof.runners import export_modelfile
command, name, flag, file = sys.argv[1:]
assert (command, flag) == ("create", "-f")
read = export_modelfile.read(Path(file).resolve().parent)
if "{{{{ bad" in read.template:
    sys.exit("Error: template error")
client = ollama.Client(trust_env=False)
client.create(name, files={{read.model.name: client.create_blob(read.model)}}, template=read.template)
"""
    install(tmp_path / "bin", program, monkeypatch)
    with serving(FakeOllama(brain), monkeypatch, program=True):
        result = export.run(case(), context)
        assert result.verdict is Verdict.PASSED, result.reason
        assert result.evidence["backend"]["created by"] == "ollama create"
        monkeypatch.setattr(writer, "go_template", lambda form: "{{ bad")
        refused = export.run(case(), context)
    assert refused.verdict is Verdict.FAILED and "template error" in refused.reason


@WITH_GO
def test_without_ollama_parity_that_holds_is_a_skip_that_says_so(context, tmp_path):
    result = export.run(case(), context)
    assert result.verdict is Verdict.SKIPPED and result.reason_class is ReasonClass.SOFTWARE, result.reason
    assert result.reason == "Template parity held; Ollama itself was not run: no Ollama answers at 127.0.0.1:9."
    assert "ollama serve" in result.next_step and "OLLAMA_HOST" in result.next_step
    assert result.evidence["template_parity"] == "held" and all(a.passed for a in result.assertions)
    assert not any(m.name.startswith("KL") for m in result.measurements) and not out(context).exists()
    assert table_cell(result, tmp_path) == "template parity"


@WITH_GO
def test_parity_that_differs_fails_with_the_first_difference(context, monkeypatch, tmp_path):
    right = writer.go_template
    monkeypatch.setattr(writer, "go_template", lambda form: right(form).replace("<|im_end|>\\n", "<|im_end|> \\n", 1))
    result = export.run(case(), context)
    assert result.verdict is Verdict.FAILED
    assert failed(result) == ["conversations that Go renders otherwise from Ollama's template"]
    assert "differs from character" in result.reason and "<|im_end|> " in result.reason
    assert "chat_template.jinja" in result.next_step and table_cell(result, tmp_path) == "failed"


@WITH_GO
def test_a_template_that_is_none_fails(context, monkeypatch):
    monkeypatch.setattr(writer, "go_template", lambda form: "{{ if .Messages }}never ended")
    result = export.run(case(), context)
    assert result.verdict is Verdict.FAILED and "unexpected EOF" in result.reason


def test_without_ollama_and_go_the_skip_names_both(context, monkeypatch, tmp_path):
    hide("go", monkeypatch)
    result = export.run(case(), context)
    assert result.verdict is Verdict.SKIPPED and "without Go" in result.reason
    assert "apt install golang-go" in result.next_step and "ollama serve" in result.next_step
    assert result.evidence["template_parity"] == "Go is not installed" and table_cell(result, tmp_path) == "–"


def test_what_is_no_ollama_is_not_asked(context, brain, monkeypatch):
    hide("go", monkeypatch)
    with serving(FakeOllama(brain), monkeypatch) as other:
        monkeypatch.setattr(other, "answer", lambda *asked: (200, ["hello"]))
        result = export.run(case(), context)
    assert result.verdict is Verdict.SKIPPED and "is no Ollama that works" in result.reason
    assert {method for method, *_ in other.calls} == {"GET"}


def table_cell(result, tmp_path):
    from report_sample import record_of

    ((_, (cell,)),) = export_table(record_of(tmp_path, [result])).rows
    return cell.text


def test_a_bound_on_distributions_is_refused():
    with pytest.raises(ValueError, match="no distributions"):
        ExportScenario(kind="export", summary="a folder for Ollama", source="train/x", format="ollama_q8_0",
                       consumer="ollama", max_kl=0.1)  # fmt: skip


def test_a_modelfile_is_read_as_it_was_written(tmp_path):
    text = '''# a note
FROM ./model.Q8_0.gguf
ADAPTER ./adapter.gguf
TEMPLATE """{{ if .System }}"x"
{{ end }}"""
SYSTEM "Be brief."
PARAMETER stop "<|end|>"
PARAMETER stop """a
b"""
PARAMETER temperature 0.5
PARAMETER num_ctx 2048
'''
    (tmp_path / "Modelfile").write_text(text)
    read = export_modelfile.read(tmp_path)
    assert read == export_modelfile.Modelfile(
        tmp_path / "model.Q8_0.gguf", tmp_path / "adapter.gguf", '{{ if .System }}"x"\n{{ end }}', "Be brief.",
        ["<|end|>", "a\nb"], {"temperature": 0.5, "num_ctx": 2048}, ["a note"],
    )  # fmt: skip
    for wrong, words in (
        ('FROM x\nTEMPLATE "open\n', "no command"),
        ("# only a note", "no FROM"),
        ("FRM x", "no command"),
    ):
        (tmp_path / "Modelfile").write_text(wrong)
        with pytest.raises(ValueError, match=words):
            export_modelfile.read(tmp_path)


def test_every_assertion_fails_on_its_own_fault_and_has_a_next_step():
    reply = {"text": "It is so.", "stopped": True}
    said = {"template": ["t", "t"], "chat": reply, "raw": reply, "stops": ["<end>"], "fed": [[3, 3]],
            "firsts": [{"prompt": "p", "want": " a", "got": "a"}]}  # fmt: skip
    questions = {"answers": {"canary": "It is so.", "stopped": True}}
    right = export_ollama_judge.answers(said, questions, "It is so.")
    assert all(a.passed for a in right)
    bad = {"text": "It was <end>", "stopped": False}
    wrong = export_ollama_judge.answers(
        {"template": ["t", "u"], "chat": bad, "raw": bad, "stops": ["<end>"], "fed": [[3, 4]],
         "firsts": [{"prompt": "p", "want": "a", "got": "b"}]}, questions, "It is so.",
    )  # fmt: skip
    assert not any(a.passed for a in wrong) and len(wrong) == len(right)
    wrong.append(export_ollama_judge.parity({"conversations": 2, "differ": ["Conversation 1 differs."]}))
    assert all(export_account.next_step([a]) for a in wrong)
    assert not export_ollama_judge.parity({"conversations": 0, "differ": []}).passed, "nothing rendered proves nothing"
    assert not export_ollama_judge.fed([]).passed and not export_ollama_judge.markers([], "x").passed
