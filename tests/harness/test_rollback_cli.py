"""What `sparkproof snapshot` and `sparkproof rollback` print and return."""

import json
from pathlib import Path

import pytest
from rollback_machine import Machine
from sparkproof.cli import rollback as cli
from sparkproof.errors import UserError
from sparkproof.rollback import snapshot


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Only the sandbox is looked at: without this the verbs would list this machine's own caches."""
    m = Machine(tmp_path)
    m.install("mine")
    for name, value in m.env.items():
        monkeypatch.setenv(name, value)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "UV_CACHE_DIR", "PIP_CACHE_DIR", "SPARKPROOF_CACHE", "DOCKER_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("sparkproof.rollback.host._first_socket", lambda paths: "")
    monkeypatch.chdir(m.work)
    return m


def test_there_and_back(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    seen = machine.tree()
    assert cli.snapshot(environment=[machine.venv]) == 0
    assert "Recorded in" in capsys.readouterr().out and snapshot.default_path().is_file()
    assert cli.rollback() == 0
    assert "Nothing is left" in capsys.readouterr().out

    machine.install("torch")
    machine.put(machine.hub / "models--x/blob")
    assert cli.rollback() == 1
    said = capsys.readouterr().out
    assert "torch 1.0" in said and "Nothing was changed" in said and "--include-caches" in " ".join(said.split())
    assert cli.rollback(yes=True) == 1
    assert "Leftovers remain: 1 things stay" in capsys.readouterr().out
    assert cli.rollback(yes=True, include_caches=True) == 0
    assert "Nothing is left" in capsys.readouterr().out and machine.tree() == seen


def test_a_snapshot_is_not_overwritten_by_mistake(machine: Machine) -> None:
    out = machine.root / "s.json"
    cli.snapshot(out, [machine.venv])
    first = out.read_text()
    machine.install("torch")
    with pytest.raises(UserError, match="already"):
        cli.snapshot(out, [machine.venv])
    assert out.read_text() == first
    assert cli.snapshot(out, [machine.venv], force=True) == 0 and out.read_text() != first


def test_json_out(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.snapshot(environment=[machine.venv], json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == "sparkproof-snapshot/1" and not snapshot.default_path().exists()
    cli.snapshot(environment=[machine.venv])
    machine.install("torch")
    capsys.readouterr()
    assert cli.rollback(json=True) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["exit_code"] == 1 and not data["carried_out"] and data["steps"][0]["title"] == "torch 1.0"
    assert data["steps"][0]["entries"] > 3 and data["diff"]["schema"] == "sparkproof-diff/1"


def test_wrong_input(machine: Machine) -> None:
    with pytest.raises(UserError, match="no environment at"):
        cli.snapshot(environment=[machine.root / "nowhere"])
    with pytest.raises(UserError, match="There is no snapshot"):
        cli.rollback(machine.root / "nowhere.json")
    cli.snapshot(environment=[machine.venv])
    with pytest.raises(UserError, match="does not cover"):
        cli.rollback(environment=[machine.root / "other"])


def test_what_was_not_read_is_said(machine: Machine) -> None:
    found = machine.snap()
    found.caches[0].not_read = "closed"
    found.profiles.not_read["/x"] = "Permission denied"
    assert cli.not_read(found) == [(found.caches[0].root, "closed"), ("/x", "Permission denied")]
