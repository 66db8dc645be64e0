"""A way back that is killed at any point ends well when it is run again: SIGKILL before and after each record of the journal,
and before each single removal. Killed in a process of its own, so that nothing is flushed or cleaned up on the way out.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rollback_machine import Machine
from sparkproof.rollback import journal, manifest, tree, undo
from sparkproof.rollback.steps import ASKED

MOST = 60  # a guard: no plan of these tests has as many points


def killed(work: Callable[[], object], arm: Callable[[Callable[[], None]], None], point: int) -> bool:
    """Run `work` in a child that dies by SIGKILL at its `point`-th call of the trap. False: it ended before that."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def trap() -> None:
            nonlocal seen
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        try:
            arm(trap)
            work()
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def at_journal(trap: Callable[[], None]) -> None:
    """Before each record, and after it."""
    real = journal.Journal._write

    def write(self: journal.Journal, entry: dict[str, object]) -> None:
        trap()
        real(self, entry)
        trap()

    journal.Journal._write = write  # type: ignore[method-assign]


def at_removal(trap: Callable[[], None]) -> None:
    """Before each file, link or folder."""
    real = tree.remove

    def remove(fd: int, path: str, expected: str = "") -> str:
        trap()
        return real(fd, path, expected)

    tree.remove = remove  # type: ignore[assignment]
    assert undo.tree is tree


def build(root: Path) -> tuple[Machine, dict[str, bytes | str], object]:
    """A machine with the user's things, then ours and the playbook's: an upgraded version too, which pip puts back."""
    root.mkdir()
    machine = Machine(root)
    machine.install("mine", script="mine")
    machine.install("numpy", "1.26.4")
    machine.install("pip")
    machine.put(machine.hub / "models--my--own/blobs/aa", "my model")
    python = machine.put(
        machine.venv / "bin/python",
        f"#!/bin/sh\nrm -rf {machine.site}/numpy*\ncp -rp {machine.root}/saved/. {machine.site}/\n",
    )
    python.chmod(0o755)
    machine.env["PATH"] = "/usr/bin:/bin"
    (machine.root / "saved").mkdir()
    for name in ("numpy", "numpy-1.26.4.dist-info"):
        shutil.copytree(machine.site / name, machine.root / "saved" / name, copy_function=shutil.copy2)
    before = machine.before()
    seen = machine.tree()
    machine.uninstall("numpy", "1.26.4")
    machine.install("numpy", "2.5.5")
    machine.install("torch", script="torchrun")
    machine.put(machine.hub / "models--new/a")
    ours = machine.put("checkout/.venv/pyvenv.cfg").parent
    machine.put("checkout/.venv/lib/x.py")
    manifest.add(ours, "venv")
    return machine, seen, before


@pytest.mark.parametrize("arm", [at_journal, pytest.param(at_removal, marks=pytest.mark.slow)])
def test_killed_at_every_point(tmp_path: Path, arm: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for point in range(MOST):
        monkeypatch.setenv("SPARKPROOF_MANIFEST", str(tmp_path / f"manifest-{point}"))
        machine, seen, before = build(tmp_path / str(point))

        def go(machine: Machine = machine, before: object = before) -> undo.Outcome:
            return machine.rollback(before, yes=True, include=ASKED)  # type: ignore[arg-type]

        died = killed(go, arm, point)
        outcome = go()
        assert outcome.exit_code == 0 and not outcome.left, (point, outcome.left)
        assert outcome.diff.is_empty and machine.tree() == seen, point
        assert not (machine.root / "checkout/.venv").exists() and not journal.path_for(machine.path).exists()
        again = go()
        assert not again.removed_entries and not again.restored and not again.plan.steps
        shutil.rmtree(machine.root)
        if not died:
            break
    assert 8 < point < MOST - 1, "as many points as there are steps were tried, and then none was left"


def test_a_file_the_user_changed_outlives_any_kill(tmp_path: Path) -> None:
    for point in range(MOST):
        machine = Machine(tmp_path / str(point))
        before = machine.before()
        machine.install("torch")
        module = machine.site / "torch/__init__.py"
        module.write_text("the user's own work")

        def go(machine: Machine = machine, before: object = before) -> undo.Outcome:
            return machine.rollback(before, yes=True)  # type: ignore[arg-type]

        died = killed(go, at_removal, point)
        outcome = go()
        assert module.read_text() == "the user's own work" and len(outcome.left) == 1, point
        if not died:
            return
    pytest.fail("it never ran to its end")
