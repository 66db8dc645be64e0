"""Rollback: only what is proven new goes, whatever stands in the way."""

import os
from pathlib import Path

import pytest
from rollback_machine import SITE, Machine
from sparkproof.errors import UserError
from sparkproof.rollback import journal, tree, undo
from sparkproof.rollback.steps import ASKED, Step


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    m = Machine(tmp_path)
    m.install("mine", script="mine")
    m.put(m.hub / "models--my--own/blobs/aa", "my model")
    return m


def why(outcome: undo.Outcome) -> str:
    return "; ".join(f"{left.what}: {left.why} {left.fix}" for left in outcome.left)


def test_nothing_to_do(machine: Machine) -> None:
    before = machine.before()
    outcome = machine.rollback(before)
    assert outcome.exit_code == 0 and outcome.diff.is_empty and not outcome.plan.steps


def test_dry_run_is_the_default_and_changes_nothing(machine: Machine) -> None:
    before = machine.before()
    machine.install("torch")
    seen = machine.tree()
    outcome = machine.rollback(before)
    assert not outcome.carried_out and [s.title for s in outcome.plan.steps] == ["torch 1.0"]
    assert outcome.plan.bytes > 0 and machine.tree() == seen and not journal.path_for(machine.path).exists()


def test_everything_new_goes_and_the_tree_is_as_before(machine: Machine) -> None:
    seen, before = machine.tree(), machine.before()
    machine.install("unsloth", requires=("torch", "zoo"), script="unsloth")
    machine.install("torch", requested=False)
    machine.install("zoo", requested=False)
    machine.put(machine.site / "torch/__pycache__/__init__.cpython-312.pyc", "compiled at first use")
    machine.put(machine.site / "torch/generated/deep/kernel.so", "made at run time, in no RECORD")
    machine.put(machine.home / ".triton/cache/AAA/k.cubin")
    machine.put(machine.work / "unsloth_compiled_cache/T.py")
    (machine.hub / "models--x/empty/folder").mkdir(parents=True)
    outcome = machine.rollback(before, yes=True, include=ASKED)
    assert outcome.exit_code == 0, why(outcome)
    assert outcome.diff.is_empty and machine.tree() == seen
    assert outcome.removed_entries > 15 and not journal.path_for(machine.path).exists()
    again = machine.rollback(before, yes=True, include=ASKED)
    assert again.exit_code == 0 and again.removed_entries == 0 and machine.tree() == seen


def test_orphans_of_a_plain_uninstall_are_found_and_removed(machine: Machine) -> None:
    seen, before = machine.tree(), machine.before()
    machine.install("torch", requires=("sympy",))
    machine.install("sympy", requires=("mpmath",), requested=False)
    machine.install("mpmath", requested=False)
    machine.uninstall("torch")
    added = {i.name: i.detail for p in machine.rollback(before).diff.of("python") for i in p.added}
    assert added["sympy 1.0"].startswith("orphaned") and added["mpmath 1.0"].startswith("orphaned")
    assert machine.rollback(before, yes=True).exit_code == 0 and machine.tree() == seen


def test_a_dependency_that_is_still_needed_is_no_orphan(machine: Machine) -> None:
    before = machine.before()
    machine.install("torch", requires=("sympy",))
    machine.install("sympy", requested=False)
    details = [i.detail.split(",")[0] for p in machine.rollback(before).diff.of("python") for i in p.added]
    assert details == ["dependency", "asked for"]


def test_caches_need_their_own_word(machine: Machine) -> None:
    seen, before = machine.tree(), machine.before()
    new = machine.put(machine.hub / "models--new/blobs/bb", "downloaded since")
    outcome = machine.rollback(before, yes=True)
    assert new.exists() and not outcome.diff.is_empty and [s.group for s in outcome.plan.offered] == ["caches"]
    outcome = machine.rollback(before, yes=True, include=ASKED)
    assert outcome.exit_code == 0 and machine.tree() == seen


def test_own_cache_needs_no_word(machine: Machine) -> None:
    before = machine.before()
    new = machine.put(machine.home / ".cache/sparkproof/model.gguf")
    assert machine.rollback(before, yes=True).exit_code == 0 and not new.parent.exists()


def test_links_out_of_a_cache_are_removed_not_followed(machine: Machine) -> None:
    outside = machine.put("outside/folder/thesis.txt", "years of work")
    before = machine.before()
    (machine.hub / "to-folder").symlink_to(outside.parent)
    (machine.hub / "to-file").symlink_to(outside)
    assert machine.rollback(before, yes=True, include=ASKED).exit_code == 0
    assert outside.read_text() == "years of work" and not (machine.hub / "to-folder").is_symlink()


def test_a_cache_that_became_a_link_is_left_alone(machine: Machine) -> None:
    before = machine.before()
    elsewhere = machine.put("disk/hub/precious.bin")
    cache = machine.home / ".cache/huggingface"
    cache.rename(machine.root / "moved")
    cache.symlink_to(machine.root / "disk")
    outcome = machine.rollback(before, yes=True, include=ASKED)
    assert not outcome.diff.is_empty and elsewhere.exists() and "leads to" in why(outcome)


def test_a_cache_that_always_was_a_link_is_worked_in(machine: Machine) -> None:
    kept = machine.put("disk/triton/old.cubin")
    (machine.home / ".triton").symlink_to(machine.root / "disk/triton")
    before = machine.before()
    new = machine.put("disk/triton/new.cubin")
    assert machine.rollback(before, yes=True, include=ASKED).exit_code == 0
    assert kept.exists() and not new.exists() and (machine.home / ".triton").is_symlink()


def test_a_folder_swapped_for_a_link_after_planning_is_refused(machine: Machine) -> None:
    outside = machine.put("outside/config.json")
    before = machine.before()
    machine.put(machine.hub / "models--new/config.json")
    step = next(s for s in machine.rollback(before, include=ASKED).plan.steps if s.kind == "cache")
    (machine.hub / "models--new/config.json").unlink()
    (machine.hub / "models--new").rmdir()
    (machine.hub / "models--new").symlink_to(outside.parent)
    left = undo._remove(step, before, undo.Outcome(machine.rollback(before).plan, machine.rollback(before).diff))
    assert outside.exists() and "link" in left[0].why


@pytest.mark.parametrize("absolute", [False, True])
def test_a_record_that_points_out_of_the_environment(machine: Machine, absolute: bool) -> None:
    victim = machine.put("outside/etc-passwd")
    before = machine.before()
    entry = str(victim) if absolute else os.path.relpath(victim, machine.site)
    machine.install("evil", extra=(f"{entry},,",))
    dry = machine.rollback(before)
    assert "outside" in why(dry)
    machine.rollback(before, yes=True)
    assert victim.exists() and not (machine.site / "evil").exists()


def test_a_record_that_leads_through_a_link_in_the_environment(machine: Machine) -> None:
    victim = machine.put("outside/data.bin")
    before = machine.before()
    machine.install("evil", extra=("evil/link/data.bin,,",))
    (machine.site / "evil/link").symlink_to(victim.parent)
    outcome = machine.rollback(before, yes=True)
    assert victim.exists() and "link" in why(outcome)


def test_a_record_that_claims_what_was_there_before(machine: Machine) -> None:
    script = machine.put(machine.venv / "bin/my-tool", "my own script, in no RECORD")
    before = machine.before()
    machine.install("greedy", extra=("../../../bin/my-tool,,", "mine/__init__.py,,", "../../../pyvenv.cfg,,"))
    dry = machine.rollback(before)
    assert "3 files of greedy 1.0" in why(dry)
    outcome = machine.rollback(before, yes=True)
    assert outcome.exit_code == 0, why(outcome)
    assert script.exists() and (machine.site / "mine/__init__.py").exists() and (machine.venv / "pyvenv.cfg").exists()


def test_a_file_that_changed_after_planning_stays(machine: Machine) -> None:
    before = machine.before()
    new = machine.put(machine.hub / "new.bin", "one")
    step = next(s for s in machine.rollback(before, include=ASKED).plan.steps if s.kind == "cache")
    new.write_text("written again since, longer")
    with tree.opened(step.place) as fd:
        assert tree.remove(fd, "hub/new.bin", step.paths["hub/new.bin"]) == "it changed since the plan was made"
    assert new.exists()


def test_old_cache_files_that_changed_or_went_are_named(machine: Machine) -> None:
    other = machine.put(machine.hub / "other", "x")
    before = machine.before()
    (machine.hub / "models--my--own/blobs/aa").write_text("overwritten since")
    other.unlink()
    outcome = machine.rollback(before, yes=True, include=ASKED)
    assert not outcome.diff.is_empty and "old content is not kept" in why(outcome) and "are gone" in why(outcome)
    assert (machine.hub / "models--my--own/blobs/aa").exists()


def test_touching_an_empty_lock_file_is_no_change(machine: Machine) -> None:
    lock = machine.put(machine.hub / ".locks/a.lock", "")
    before = machine.before()
    os.utime(lock, (1, 1))
    assert machine.rollback(before).exit_code == 0


def test_a_name_that_is_not_utf8(machine: Machine) -> None:
    before = machine.before()
    odd = os.fsencode(machine.hub) + b"/caf\xe9.bin"
    Path(os.fsdecode(odd)).write_bytes(b"x")
    assert machine.rollback(before, yes=True, include=ASKED).exit_code == 0
    assert odd not in [os.fsencode(p) for p in machine.hub.rglob("*")]


def test_an_unreadable_folder_is_unknown_and_untouched(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.before()
    new = machine.put(machine.hub / "new.bin")
    closed = machine.put(machine.hub / "closed/secret").parent
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    outcome = machine.rollback(before, yes=True, include=ASKED)
    assert not outcome.diff.is_empty and new.exists() and "Permission denied" in why(outcome)


def test_another_machine_user_or_environment_is_refused(machine: Machine) -> None:
    before = machine.before()
    for change, words in [({"id": "0" * 16}, "another machine"), ({"uid": 4242}, "another user")]:
        other = before.model_copy(update={"machine": before.machine.model_copy(update=change)})
        with pytest.raises(UserError, match=words):
            machine.rollback(other, yes=True)
    with pytest.raises(UserError, match="does not cover the environment"):
        machine.rollback(before, yes=True, environments=[str(machine.root / "other")])
    (machine.venv / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.13.0\n")
    with pytest.raises(UserError, match="another environment"):
        machine.rollback(before, yes=True)


def test_an_environment_that_now_lies_elsewhere_is_refused(machine: Machine) -> None:
    before = machine.before()
    machine.venv.rename(machine.root / "other")
    machine.venv.symlink_to(machine.root / "other")
    with pytest.raises(UserError, match="leads elsewhere"):
        machine.rollback(before, yes=True)


def test_damaged_metadata_is_no_obstacle(machine: Machine) -> None:
    seen, before = machine.tree(), machine.before()
    info = machine.install("torch")
    (info / "METADATA").unlink()
    assert machine.rollback(before, yes=True).exit_code == 0 and machine.tree() == seen


@pytest.mark.parametrize("after", [1, 4, 8])
def test_interrupted_and_run_again(machine: Machine, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    seen, before = machine.tree(), machine.before()
    machine.install("torch", script="torchrun")
    machine.put(machine.hub / "models--new/a")
    machine.put(machine.hub / "models--new/b")
    real, count = tree.remove, 0

    def remove(fd: int, path: str, expected: str = "") -> str:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return real(fd, path, expected)

    with monkeypatch.context() as patch:
        patch.setattr(tree, "remove", remove)
        with pytest.raises(KeyboardInterrupt):
            machine.rollback(before, yes=True, include=ASKED)
    assert journal.path_for(machine.path).exists() and machine.tree() != seen
    outcome = machine.rollback(before, yes=True, include=ASKED)
    assert outcome.exit_code == 0 and outcome.resumed == 1, why(outcome)
    assert machine.tree() == seen and not journal.path_for(machine.path).exists()


def test_journal_finishes_what_no_metadata_tells_any_more(tmp_path: Path) -> None:
    """Outside a virtual environment, a stray command in bin/ is nobody's: only the journal knows that it is new."""
    machine = Machine(tmp_path, virtual=False)
    old = machine.put(machine.venv / "bin/old-tool")
    before = machine.before()
    machine.install("tool", script="tool")
    step = machine.rollback(before).plan.steps[0]
    with (
        pytest.raises(KeyboardInterrupt),
        journal.opened(journal.path_for(machine.path), before) as log,
        log.step(step),
    ):
        for path in [p for p in step.paths if p != "bin/tool"]:
            (machine.venv / path).unlink()
        tree.prune(os.open(machine.venv, os.O_RDONLY), list(step.paths), {SITE, "bin"})
        raise KeyboardInterrupt
    with journal.path_for(machine.path).open("a") as f:
        f.write('{"snapshot": "torn by a power c')
    assert (machine.venv / "bin/tool").exists() and not machine.rollback(before).plan.steps
    outcome = machine.rollback(before, yes=True)
    assert outcome.resumed == 1 and not (machine.venv / "bin/tool").exists() and old.exists()


def test_a_forged_journal_removes_nothing_that_was_there(machine: Machine) -> None:
    before = machine.before()
    outside = machine.put("outside/x")
    own = machine.site / "mine/__init__.py"
    blob = machine.hub / "models--my--own/blobs/aa"
    steps = [
        Step(kind="distribution", title="a", place=str(machine.venv), paths={f"{SITE}/mine/__init__.py": ""}),
        Step(kind="cache", title="b", place=str(machine.hub.parent), paths={"hub/models--my--own/blobs/aa": ""}),
        Step(kind="cache", title="c", place=str(outside.parent), paths={"x": ""}),
        Step(kind="own", title="d", place=str(outside.parent), paths={"x": ""}),
    ]
    with pytest.raises(RuntimeError), journal.opened(journal.path_for(machine.path), before) as log:
        for step in steps:
            log._write({"id": steps.index(step) + 1, "event": "begin", "step": step.model_dump(mode="json")})
        raise RuntimeError
    outcome = machine.rollback(before, yes=True, include=ASKED)
    assert outcome.resumed == 4 and own.exists() and blob.exists() and outside.exists()


def test_a_journal_of_another_snapshot_is_refused(machine: Machine) -> None:
    before = machine.before()
    step = Step(kind="cache", title="a", place=str(machine.hub))
    with pytest.raises(RuntimeError), journal.opened(journal.path_for(machine.path), before) as log, log.step(step):
        raise RuntimeError
    machine.install("later")
    with pytest.raises(UserError, match="another snapshot"):
        machine.rollback(machine.before(), yes=True)


def test_two_at_once(machine: Machine) -> None:
    before = machine.before()
    with (
        journal.opened(journal.path_for(machine.path), before),
        pytest.raises(UserError, match="Another uninstall"),
    ):
        machine.rollback(before, yes=True)


def test_under_test_the_list_of_what_is_ours_is_never_the_real_one() -> None:
    import platformdirs
    from sparkproof.rollback import manifest

    assert not manifest.manifest_path().is_relative_to(platformdirs.user_state_dir("sparkproof"))
