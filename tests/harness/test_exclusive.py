"""One run at a time, and the machine to itself for what is timed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from sparkproof.errors import UserError
from sparkproof.measure import exclusive
from sparkproof.measure.exclusive import machine_lock, only_run
from sparkproof.rollback import manifest

HOLD = """
import sys, time
from sparkproof.measure.exclusive import machine_lock, only_run
with {lock}:
    print("held", flush=True)
    time.sleep({seconds})
"""


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKPROOF_LOCK_DIR", str(tmp_path))


def hold(lock: str, seconds: float) -> subprocess.Popen[str]:
    code = HOLD.format(lock=lock, seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_with_the_first_ones_name() -> None:
    other = hold("only_run('sparkproof validate')", 60)
    try:
        with pytest.raises(UserError) as e, only_run("me"):
            pass
        assert f"process {other.pid}" in e.value.message and "sparkproof validate" in e.value.message
        assert "--wait" in e.value.fix
    finally:
        other.kill()
        other.wait()
    with only_run("me"):
        pass  # a killed run leaves no lock behind


def test_wait_waits() -> None:
    other = hold("only_run('first')", 1.0)
    start = time.monotonic()
    with only_run("second", wait=True):
        assert time.monotonic() - start > 0.3
    other.wait()


def test_timed_cases_are_alone_and_correctness_cases_share() -> None:
    other = hold("machine_lock(exclusive=False)", 1.5)
    start = time.monotonic()
    with machine_lock(exclusive=False):
        assert time.monotonic() - start < 1
    with machine_lock(exclusive=True):
        assert other.poll() is not None or time.monotonic() - start > 1
    other.wait()


def test_the_folder_of_locks_is_on_the_list_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARKPROOF_LOCK_DIR", str(tmp_path / "locks"))
    for _ in range(2):
        exclusive.lock_dir()
    assert [(e.path, e.kind) for e in manifest.ours()] == [(str((tmp_path / "locks").resolve()), "locks")]
