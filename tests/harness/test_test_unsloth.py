"""The playbook's script: its verdict, its exit codes, its sentences."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch, tmp_path):
    from sparkproof.facts.model import Facts

    spec = importlib.util.spec_from_file_location("playbook_script", ROOT / "test_unsloth.py")
    assert spec and spec.loader
    test_unsloth = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(test_unsloth)
    monkeypatch.setattr(test_unsloth, "collect", lambda **asked: Facts.model_construct())
    monkeypatch.chdir(tmp_path)
    return test_unsloth


def result(verdict="passed", **changes):
    from sparkproof.results import Assertion, CaseResult

    passed = verdict == "passed"
    row = Assertion(name="loss fall", passed=passed, value=1.0, bound=">= 0.6", unit="nats")
    return CaseResult(name="test_unsloth", kind="train", verdict=verdict, assertions=[row], **changes)


@pytest.mark.parametrize(
    ("verdict", "code", "said"), [("passed", 0, "PASSED"), ("failed", 1, "FAILED"), ("broken", 2, "BROKEN")]
)
def test_it_exits_by_its_verdict(script, monkeypatch, capsys, verdict, code, said):
    monkeypatch.setattr(script, "run", lambda case, context: result(verdict, reason="why.", next_step="what next."))
    assert script.main(["--engine", "hf"]) == code
    out = capsys.readouterr().out
    assert f"{said}: " in out
    assert "loss fall: 1.0 nats (allowed: >= 0.6)" in out


def test_the_playbooks_job_is_sixty_steps_of_4_bit_lora(script, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "run", lambda case, context: seen.append(case.scenario) or result())
    script.main(["--engine", "sparktune"])
    assert (seen[0].steps, seen[0].load_in_4bit, seen[0].engine) == (60, True, "sparktune")
    script.main(["--engine", "hf", "--steps", "7", "--model", "owner/name"])
    assert (seen[1].steps, seen[1].model, seen[1].revision) == (7, "owner/name", "main")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "unsloht"], "There is no engine 'unsloht'. Did you mean 'unsloth'?"),
        (["--engine", "hf", "--steps", "2"], "2 steps are too few to judge."),
        (["--engine", "hf", "--out", "/proc/nowhere"], "Give another folder with --out"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(script, capsys, arguments, said):
    assert script.main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_where_unsloth_is_not_installed_it_says_so(tmp_path):
    """The real way, in its own process: a sentence with the cure, exit 2, no traceback."""
    if importlib.util.find_spec("unsloth"):
        pytest.skip("unsloth is installed here")
    done = subprocess.run(
        [sys.executable, str(ROOT / "test_unsloth.py"), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "NOT JUDGED: Unsloth is not installed" in done.stderr
    assert "pip install unsloth" in done.stderr
    assert "Traceback" not in done.stderr


def test_pytest_does_not_collect_it():
    import tomllib

    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]
    source = (ROOT / "test_unsloth.py").read_text()
    assert "\ndef test_" not in source
    assert "\nclass Test" not in source
