"""What changed version or went: put back if possible, named if not. And what belongs to others."""

import os
from pathlib import Path

import pytest
from rollback_machine import Machine
from sparkproof.rollback import diff, environment, manifest
from sparkproof.rollback.model import Engine, Snapshot, Thing
from sparkproof.rollback.plan import make
from sparkproof.rollback.steps import ASKED


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def fake_pip(machine: Machine, body: str) -> None:
    python = machine.put(machine.venv / "bin/python", f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    machine.install("pip")


def test_a_changed_version_without_pip_or_uv_is_named(machine: Machine) -> None:
    machine.put(machine.venv / "bin/python", "")
    machine.install("numpy", "1.26.4")
    before = machine.before()
    machine.uninstall("numpy", "1.26.4")
    machine.install("numpy", "2.5.5")
    outcome = machine.rollback(before, yes=True)
    assert not outcome.diff.is_empty and (machine.site / "numpy-2.5.5.dist-info").exists()
    assert [left.what for left in outcome.left] == ["numpy 1.26.4 (now 2.5.5)"]
    assert "neither pip" in outcome.left[0].why


def test_a_version_is_put_back_by_the_environments_pip(machine: Machine) -> None:
    machine.install("numpy", "1.26.4")
    saved = machine.root / "saved"
    machine.env["PATH"] = "/usr/bin:/bin"
    site = machine.site
    fake_pip(
        machine,
        f'test "$*" = "-m pip --disable-pip-version-check install --no-input -q --no-deps --force-reinstall '
        f'--no-cache-dir numpy==1.26.4" || exit 9\nrm -r {site}/numpy*\ncp -rp {saved}/. {site}/',
    )
    before = machine.before()
    saved.mkdir()
    for name in ("numpy", "numpy-1.26.4.dist-info"):
        (site / name).rename(saved / name)
    machine.install("numpy", "2.5.5")
    dry = machine.rollback(before)
    assert [s.kind for s in dry.plan.steps] == ["restore"]
    outcome = machine.rollback(before, yes=True)
    assert outcome.restored == ["numpy 1.26.4 (now 2.5.5)"]
    assert outcome.exit_code == 0, outcome.left


def test_a_failing_restore_says_why_and_the_rest_goes_on(machine: Machine) -> None:
    machine.install("numpy", "1.26.4")
    machine.env["PATH"] = "/usr/bin:/bin"
    fake_pip(machine, "echo 'ERROR: No matching distribution found for numpy==1.26.4' >&2; exit 1")
    before = machine.before()
    machine.uninstall("numpy", "1.26.4")
    machine.install("torch")
    outcome = machine.rollback(before, yes=True)
    assert outcome.exit_code == 1 and not (machine.site / "torch").exists()
    assert "No matching distribution found" in outcome.left[0].why and len(outcome.left) == 1


def test_the_same_version_with_other_files_is_a_change(machine: Machine) -> None:
    info = machine.install("torch", "2.14.1")
    before = machine.before()
    record = info / "RECORD"
    record.write_text(record.read_text().replace("sha256=", "sha256=x", 1))
    changed = [i.detail for p in machine.rollback(before).diff.of("python") for i in p.changed]
    assert changed == ["same version, other files"]


def test_what_came_from_a_url_is_named_without_its_password(machine: Machine) -> None:
    url = '{"url": "https://user:hunter2@example.org/repo.git", "vcs_info": {}}'
    machine.install("local", direct_url=url)
    before = machine.before()
    machine.uninstall("local")
    text = str(machine.rollback(before).left)
    assert "https://example.org/repo.git" in text and "hunter2" not in text


def test_packages_of_apt_and_conda_stay(machine: Machine) -> None:
    before = machine.before()
    machine.install("numpy", installer="debian")
    machine.install("scipy", installer="conda")
    outcome = machine.rollback(before, yes=True)
    assert not outcome.diff.is_empty and (machine.site / "numpy").exists() and (machine.site / "scipy").exists()
    assert {left.why for left in outcome.left} == {"it belongs to apt", "it belongs to conda"}


def test_a_file_that_the_user_changed_stays_even_at_the_second_run(machine: Machine) -> None:
    before = machine.before()
    machine.install("torch")
    module, record = machine.site / "torch/__init__.py", machine.site / "torch-1.0.dist-info/RECORD"
    later = record.stat().st_mtime + 60
    module.write_text(module.read_text().replace("stand-in", "my work!"))  # as long as it was
    os.utime(module, (later, later))
    for _ in range(2):
        outcome = machine.rollback(before, yes=True)
        assert "my work!" in module.read_text() and not record.exists()
        assert [(left.what, left.why) for left in outcome.left] == [
            (str(module), "it was changed since torch 1.0 was installed")
        ]
        assert outcome.exit_code == 0 and not outcome.diff.is_empty
    module.unlink()
    assert machine.rollback(before, yes=True).diff.is_empty
    assert not (machine.root / "snapshot.json.kept").exists() and not module.parent.exists()


def test_a_file_that_was_only_touched_goes(machine: Machine) -> None:
    before = machine.before()
    machine.install("torch")
    later = (machine.site / "torch-1.0.dist-info/RECORD").stat().st_mtime + 60
    os.utime(machine.site / "torch/__init__.py", (later, later))
    assert machine.rollback(before, yes=True).diff.is_empty


def test_one_without_record_is_named(machine: Machine) -> None:
    before = machine.before()
    info = machine.install("legacy")
    (info / "RECORD").unlink()
    outcome = machine.rollback(before)
    assert any("no RECORD" in left.why and "pip uninstall legacy" in left.fix for left in outcome.left)


def test_lost_metadata_does_not_make_old_files_new(machine: Machine) -> None:
    info = machine.install("mine")
    before = machine.before()
    for path in sorted(info.iterdir()):
        path.unlink()
    info.rmdir()
    machine.rollback(before, yes=True, include=ASKED)
    assert (machine.site / "mine/__init__.py").exists()


def with_engines(snapshot: Snapshot, engine: Engine) -> Snapshot:
    return snapshot.model_copy(update={"areas": [*snapshot.areas, "containers"], "engines": [engine]})


def test_container_things_are_named_with_the_command(machine: Machine) -> None:
    base = machine.before()
    before = with_engines(base, Engine(name="docker", installed=True))
    now = Engine(
        name="docker",
        installed=True,
        images={"sha256:" + "ab" * 32: Thing(label="nvcr.io/nvidia/pytorch:25.11-py3", bytes=20 * 2**30)},
        containers={"cd" * 32: Thing(label="train (pytorch)")},
        volumes={"hf": Thing(label="hf")},
        networks={"ef" * 32: Thing(label="net")},
    )
    plan, difference = make(before, with_engines(base, now), env=machine.env)
    assert not plan.steps and not difference.is_empty
    assert [left.fix for left in plan.left] == [
        "docker rmi abababababab",
        "docker rm " + "cd" * 32,
        "docker volume rm hf",
        "docker network rm " + "ef" * 32,
    ]


def test_an_engine_that_does_not_answer_is_unknown(machine: Machine) -> None:
    base = machine.before()
    silent = Engine(name="docker", installed=True, not_read="permission denied")
    for pair in [(silent, silent), (Engine(name="docker", installed=True), silent)]:
        difference = diff.diff(*(with_engines(base, e) for e in pair))
        assert [p.state for p in difference.of("containers")] == ["unknown"] and not difference.is_empty


@pytest.fixture
def our_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state/manifest.jsonl"
    monkeypatch.setenv("SPARKPROOF_MANIFEST", str(path))
    return path


def test_own_things_go_when_asked(machine: Machine, our_list: Path) -> None:
    before = machine.before()
    reports = machine.put("checkout/reports/run/record.jsonl").parent.parent
    single = machine.put("checkout/latest.txt")
    beside = machine.put("checkout/README.md")
    manifest.add(reports, "reports")
    manifest.add(reports, "reports")
    manifest.add(single, "file")
    assert len(manifest.entries()) == 2
    assert machine.rollback(before, yes=True).exit_code == 0 and reports.exists() and not single.exists()
    single = machine.put("checkout/latest.txt")
    manifest.add(single, "file")
    outcome = machine.rollback(before, yes=True, include=ASKED)
    assert outcome.exit_code == 0, outcome.left
    assert not reports.exists() and not single.exists() and beside.exists()


def test_what_lies_where_ours_was_is_not_ours(machine: Machine, our_list: Path) -> None:
    before = machine.before()
    ours = machine.put("checkout/reports/record.jsonl").parent
    manifest.add(ours, "reports")
    ours.rename(machine.root / "kept-elsewhere")
    theirs = machine.put("checkout/reports/thesis.txt")
    other = machine.root / "linked"
    other.symlink_to(theirs.parent)
    machine.rollback(before, yes=True, include=ASKED)
    assert theirs.exists() and manifest.ours() == []
    manifest.add(theirs, "file")
    with our_list.open("a") as f:
        f.write('{"path": "torn')
    assert len(manifest.entries()) == 1


def test_a_file_of_ours_that_its_user_changed_stays(machine: Machine, our_list: Path) -> None:
    before = machine.before()
    ours = machine.put("checkout/settings.toml", "ours")
    manifest.add(ours, "file")
    ours.write_text("the user's own words")
    outcome = machine.rollback(before, yes=True)
    assert ours.exists() and "changed since sparkproof wrote it" in outcome.left[0].why


def test_an_environment_of_ours_goes_whole_and_last_and_is_no_user_environment(
    machine: Machine, our_list: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = machine.put("checkout/.venv/pyvenv.cfg").parent
    machine.put("checkout/.venv/lib/python3.12/site-packages/x.py")
    machine.put("checkout/.venv/sparkproof-setup.json", "{}")
    cache = machine.put("elsewhere/model.gguf").parent
    manifest.add(ours, "venv")
    manifest.add(cache, "cache")
    assert str(ours) not in environment.default_roots({"VIRTUAL_ENV": str(ours)}, str(machine.home))
    outcome = machine.rollback(machine.before(), yes=True)
    assert not ours.exists() and not cache.exists() and not our_list.exists(), outcome.left
    assert [s.title.split()[1] for s in outcome.plan.steps] == ["cache", "environment"]
    assert list(outcome.plan.steps[-1].paths)[-2:] == ["pyvenv.cfg", "sparkproof-setup.json"]


def test_reports_need_their_own_word(machine: Machine, our_list: Path) -> None:
    before = machine.before()
    reports = machine.put("checkout/reports/run/record.jsonl").parent.parent
    manifest.add(reports, "reports")
    outcome = machine.rollback(before, yes=True)
    assert reports.exists() and [s.group for s in outcome.plan.offered] == ["reports"]
    assert machine.rollback(before, yes=True, include=("reports",)).exit_code == 0 and not reports.exists()


def test_adding_what_is_not_there_is_an_error(our_list: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        manifest.add(tmp_path / "missing", "cache")


def test_an_index_that_gives_other_files_is_told(machine: Machine) -> None:
    machine.install("numpy", "1.26.4")
    machine.env["PATH"] = "/usr/bin:/bin"
    info = machine.site / "numpy-1.26.4.dist-info"
    fake_pip(machine, f"mv {machine.site}/numpy-2.5.5.dist-info {info}; sed -i s/2.5.5/1.26.4/ {info}/METADATA")
    before = machine.before()
    machine.uninstall("numpy", "1.26.4")
    machine.install("numpy", "2.5.5")
    outcome = machine.rollback(before, yes=True)
    assert outcome.exit_code == 1 and "the index gave other files" in outcome.left[0].why
