"""What `sparkproof snapshot`, `uninstall` and `verify-rollback` print and return."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import fake_engine
import pytest
from rollback_machine import Machine
from sparkproof.cli import way_back as cli
from sparkproof.cli.verify_rollback import verify_rollback
from sparkproof.errors import UserError
from sparkproof.rollback import manifest, snapshot


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Only the sandbox is looked at: without this the verbs would list this machine's own caches and engines."""
    m = Machine(tmp_path)
    m.install("mine")
    for name, value in m.env.items():
        monkeypatch.setenv(name, value)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "UV_CACHE_DIR", "PIP_CACHE_DIR", "SPARKPROOF_CACHE", "CONTAINER_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(
        manifest, "SETUP_MARK", "no-such-mark"
    )  # the environment that runs the tests is not this machine's
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(m.work)
    return m


@pytest.fixture
def engine(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_engine.FakeEngine]:
    with fake_engine.serving(machine.root) as found:
        monkeypatch.setenv("DOCKER_HOST", found.address)
        yield found


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_there_and_back(machine: Machine, engine: fake_engine.FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    seen = machine.tree()
    assert cli.snapshot(environment=[machine.venv]) == 0
    assert "Recorded in" in said(capsys) and snapshot.default_path().is_file()
    assert verify_rollback() == 0
    assert "Nothing differs" in said(capsys)
    assert cli.uninstall() == 0
    assert "nothing new that could be removed" in said(capsys)

    machine.install("torch")
    machine.put(machine.hub / "models--x/blob")
    assert cli.uninstall(dry_run=True) == 0
    text = said(capsys)
    assert "1 distributions" in text and "--include caches" in text and "Nothing was changed" in text
    assert cli.uninstall(yes=True) == 0
    assert "Not asked for, so it stays: packages, caches" in said(capsys)
    assert (machine.site / "torch").exists() and verify_rollback() == 1
    assert "torch 1.0" in said(capsys)
    assert cli.uninstall(yes=True, include=["packages"]) == 0
    assert "Not asked for, so it stays: caches" in said(capsys)
    assert cli.uninstall(yes=True, include=["packages", "caches"]) == 0
    assert "Nothing is left" in said(capsys) and machine.tree() == seen
    assert verify_rollback(forget=True) == 0 and not (machine.root / "state/sparkproof").exists()


def test_it_asks_group_by_group(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    cli.snapshot(environment=[machine.venv])
    machine.install("torch")
    blob = machine.put(machine.hub / "models--x/blob")
    questions: list[str] = []

    def ask(question: str) -> bool:
        questions.append(question)
        return "Python environments" in question

    assert cli.uninstall(ask=lambda question: False) == 1 and (machine.site / "torch").exists()
    assert cli.uninstall(ask=ask) == 0 and not (machine.site / "torch").exists() and blob.exists()
    assert len(questions) == 2 and "models of your own may lie" in questions[1]
    capsys.readouterr()
    assert cli.uninstall() == 1 and blob.exists()
    assert "no terminal to ask on" in said(capsys)


def test_what_carries_our_label_goes_and_nothing_else(
    machine: Machine, engine: fake_engine.FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.image("sha256:" + "aa" * 32, "theirs:1")
    assert cli.snapshot(environment=[machine.venv]) == 0
    engine.image("sha256:" + "bb" * 32, "sparkproof:local", labels=fake_engine.OURS)
    engine.image("sha256:" + "cc" * 32, "sparkproof:fake")  # our name, but not our label
    engine.container("serving", "sparkproof:local", fake_engine.OURS, running=True)
    engine.container("users", "theirs:1")
    engine.volumes["sparkproof-cache"] = {"Name": "sparkproof-cache", "Labels": fake_engine.OURS}
    engine.volumes["mine"] = {"Name": "mine", "Labels": {}}
    engine.networks["ff" * 32] = {"Id": "ff" * 32, "Name": "sparkproof", "Labels": fake_engine.OURS}
    capsys.readouterr()
    assert cli.uninstall(dry_run=True) == 0
    text = said(capsys)
    assert "container serving (sparkproof:local), which runs" in text and "volume sparkproof-cache 1.9 MiB" in text
    assert "docker volume rm mine" in text and "image sparkproof:local 3.8 MiB" in text
    assert engine.containers.keys() == {"serving", "users"}, "a dry run removes nothing"
    assert cli.uninstall(yes=True) == 0
    assert "4 things in container engines" in said(capsys)
    assert engine.containers.keys() == {"users"} and engine.volumes.keys() == {"mine"} and not engine.networks
    assert {t for i in engine.images.values() for t in i["RepoTags"]} == {"theirs:1", "sparkproof:fake"}
    assert verify_rollback() == 1, "what is not ours came too"
    del engine.containers["users"], engine.volumes["mine"], engine.images["sha256:" + "cc" * 32]
    capsys.readouterr()
    assert verify_rollback() == 0, said(capsys)


def test_without_a_snapshot_only_ours_goes(
    machine: Machine, engine: fake_engine.FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.install("torch")
    cache = machine.put(machine.home / ".cache/sparkproof/model.gguf").parent
    manifest.add(cache, "cache")
    engine.volumes["sparkproof-cache"] = {"Name": "sparkproof-cache", "Labels": fake_engine.OURS}
    assert cli.uninstall(yes=True) == 0
    assert "All that was sparkproof's is gone" in said(capsys)
    assert not cache.exists() and not engine.volumes and (machine.site / "torch").exists()
    assert not manifest.manifest_path().exists()
    with pytest.raises(UserError, match="Without a snapshot"):
        cli.uninstall(include=["caches"])


def test_an_image_in_use_or_with_a_tag_of_others_stays_and_says_why(
    machine: Machine, engine: fake_engine.FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.image("sha256:" + "bb" * 32, "sparkproof:local", "registry/theirs:2", labels=fake_engine.OURS)
    engine.image("sha256:" + "cc" * 32, "sparkproof:serve", labels=fake_engine.OURS)
    engine.container("users", "sparkproof:serve")
    assert cli.uninstall(yes=True) == 1
    text = said(capsys)
    assert "registry/theirs:2" in text and "container is using it" in text and "2 things refused" in text
    assert "users" in engine.containers and engine.images["sha256:" + "bb" * 32]["RepoTags"] == ["registry/theirs:2"]


def test_an_engine_that_stops_answering_halfway_is_told(
    machine: Machine, engine: fake_engine.FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.volumes["sparkproof-cache"] = {"Name": "sparkproof-cache", "Labels": fake_engine.OURS}
    engine.refuse["DELETE /volumes/.*"] = (500, "layer store is broken")
    assert cli.uninstall(yes=True) == 1
    assert "layer store is broken" in said(capsys)
    engine.refuse.clear()
    assert cli.uninstall(yes=True) == 0 and not engine.volumes


def test_a_running_process_a_variable_and_the_build_cache_are_differences(
    machine: Machine,
    engine: fake_engine.FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli.snapshot(environment=[machine.venv])
    engine.build_cache = 3_000_000
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/x/secret")
    monkeypatch.setenv("PATH", "/opt/cuda/bin")
    capsys.readouterr()
    assert verify_rollback() == 1
    text = said(capsys)
    assert "build cache" in text and "TRITON_PTXAS_PATH" in text and "+/opt/cuda/bin" in text and "secret" not in text


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
    assert data["schema"] == "sparkproof-snapshot/2" and not snapshot.default_path().exists()
    cli.snapshot(environment=[machine.venv])
    machine.install("torch")
    capsys.readouterr()
    assert cli.uninstall(json=True) == 0
    data = json.loads(capsys.readouterr().out)
    assert not data["carried_out"] and data["offered"][0]["title"] == "torch 1.0" and not data["steps"]
    assert data["offered"][0]["entries"] > 3 and data["diff"]["schema"] == "sparkproof-diff/1"
    assert verify_rollback(json=True) == 1
    assert json.loads(capsys.readouterr().out)["is_empty"] is False


def test_wrong_input(machine: Machine) -> None:
    with pytest.raises(UserError, match="no environment at"):
        cli.snapshot(environment=[machine.root / "nowhere"])
    for verb in (cli.uninstall, verify_rollback):
        with pytest.raises(UserError, match="There is no snapshot"):
            verb(machine.root / "nowhere.json")
    cli.snapshot(environment=[machine.venv])
    with pytest.raises(UserError, match="does not cover"):
        cli.uninstall(environment=[machine.root / "other"])
    with pytest.raises(UserError, match="contradict"):
        cli.uninstall(yes=True, dry_run=True)
    with pytest.raises(UserError, match="no group 'cahces'"):
        cli.uninstall(include=["cahces"])


def test_what_was_not_read_is_said(machine: Machine) -> None:
    found = machine.snap()
    found.caches[0].not_read = "closed"
    found.profiles.not_read["/x"] = "Permission denied"
    assert cli.not_read(found) == [(found.caches[0].root, "closed"), ("/x", "Permission denied")]


def test_processes_are_this_users_that_run_from_an_environment(tmp_path: Path) -> None:
    import subprocess
    import sys

    from sparkproof.rollback import running

    script = tmp_path / "serve.py"
    script.write_text("import sys, time\nprint('up', flush=True)\ntime.sleep(60)\n")
    before = running.processes([str(tmp_path)])
    # from a parent of its own: what this process starts itself is left out
    starter = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, {str(script)!r}], stdout=-3, stderr=-3).pid)"
    )
    done = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    try:
        after = running.processes([str(tmp_path)])
        came = [k for k in after.found if k not in before.found]
        assert [int(k.split("@")[0]) for k in came] == [pid] and str(script) in after.found[came[0]].why
        assert not running.processes([str(tmp_path / "other")]).found.keys() & set(came)
    finally:
        os.kill(pid, 9)
