"""A case's own process: how each way of ending is told apart, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from sparkproof.measure.memory import default_floor_gib
from sparkproof.runners import process
from sparkproof.runners.base import Context
from sparkproof.runners.child import under_test
from sparkproof.scenario import SCENARIO_ADAPTER, Case

CASE = Case(
    name="x/y[a=b]",
    file="x.yaml",
    scenario=SCENARIO_ADAPTER.validate_python({"kind": "kernel", "op": "x", "summary": "a case for tests"}),
)


# What the child process runs.
def well(payload: dict) -> dict:
    print("some output")
    return {"twice": payload["n"] * 2}


def slow(payload: dict) -> dict:
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
    Path(payload["pids"]).write_text(f"{os.getpid()} {pid}")
    time.sleep(60)
    return {}


def greedy(payload: dict) -> dict:
    block = bytearray(300 << 20)
    block[::4096] = b"x" * len(block[::4096])
    time.sleep(60)
    return {}


def crash(payload: dict) -> dict:
    os.kill(os.getpid(), 11)
    return {}


def engine_fault(payload: dict) -> dict:
    with under_test("forward pass"):
        raise ValueError("kernel said no")


def harness_fault(payload: dict) -> dict:
    raise KeyError("oops")


def talk(payload: dict) -> dict:
    from sparkproof.runners.child import progress

    for i in range(3):
        progress(f"step {i}")
        time.sleep(0.25)
    return {}


@pytest.fixture
def spawn(tmp_path: Path):
    def go(
        function: str, payload: dict | None = None, timeout_s: float = 30, floor: float = 0.01, progress=lambda t: None
    ):
        context = Context(
            run_dir=tmp_path,
            facts=None,
            cache_dir=tmp_path,
            memory_floor_gib=floor,
            progress=progress,  # type: ignore[arg-type]
        )
        env = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
        return context.spawn(
            f"{Path(__file__).stem}:{function}", payload or {}, case=CASE, phase=function, timeout_s=timeout_s, env=env
        )

    return go


def test_a_result_comes_back_with_output_and_memory(spawn) -> None:
    outcome = spawn("well", {"n": 21})
    assert (outcome.status, outcome.result) == ("ok", {"twice": 42})
    assert "some output" in outcome.output_tail
    assert outcome.peak_rss_gib > 0 and outcome.min_available_gib > 0


def test_a_timeout_ends_the_whole_process_group(spawn, tmp_path: Path) -> None:
    outcome = spawn("slow", {"pids": str(tmp_path / "pids")}, timeout_s=3)
    assert outcome.status == "timeout" and outcome.blames_device
    pids = [int(x) for x in (tmp_path / "pids").read_text().split()]
    time.sleep(0.3)
    alive = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
    assert alive == []


def test_the_watchdog_ends_a_case_at_the_floor_and_not_the_host(spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Available memory is what it was before, less what the case holds: real pressure, small enough for any machine."""
    before = 10.0

    def shrinking() -> float:
        me = psutil.Process()
        return before - sum(p.memory_info().rss for p in me.children(recursive=True) if p.is_running()) / 2**30

    monkeypatch.setattr(process, "available_gib", shrinking)
    start = time.monotonic()
    outcome = spawn("greedy", floor=before - 0.25)
    assert outcome.status == "memory"
    assert time.monotonic() - start < 20
    assert outcome.min_available_gib < before - 0.25
    assert "memory watchdog" in outcome.sentence("training")
    assert spawn("well", {"n": 1}).status == "ok", "the next case runs"


def test_a_killed_run_leaves_no_case_behind(tmp_path: Path) -> None:
    code = (
        "import os, pathlib; from sparkproof.runners.process import run_process; import sys; "
        f"run_process([sys.executable, '-m', 'sparkproof.runners.child', '{Path(__file__).stem}:slow'], "
        f"{{'pids': r'{tmp_path}/pids'}}, work_dir=pathlib.Path(r'{tmp_path}'), phase='x', timeout_s=60, floor_gib=0.01, "
        "env=dict(os.environ))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 30
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.2)
    case = int((tmp_path / "pids").read_text().split()[0])
    parent.kill()
    parent.wait()
    time.sleep(0.5)
    assert not psutil.pid_exists(case) or psutil.Process(case).status() == psutil.STATUS_ZOMBIE
    with contextlib.suppress(psutil.Error):
        psutil.Process(int((tmp_path / "pids").read_text().split()[1])).kill()


def test_the_watchdog_polls_faster_than_twice_a_second() -> None:
    assert process.POLL_S < 0.5


def test_faults_of_the_engine_and_of_the_harness_are_told_apart(spawn) -> None:
    engine = spawn("engine_fault")
    assert engine.status == "error" and engine.blames_device
    assert "ValueError in forward pass: kernel said no" in engine.sentence("training")
    harness = spawn("harness_fault")
    assert harness.status == "error" and not harness.blames_device
    assert "KeyError" in harness.traceback


def test_a_crash_is_named_by_its_signal(spawn) -> None:
    outcome = spawn("crash")
    assert outcome.status == "died" and outcome.blames_device
    assert "SIGSEGV" in outcome.sentence("training")


def test_progress_arrives_while_it_runs(spawn) -> None:
    seen: list[str] = []
    spawn("talk", progress=seen.append)
    assert "step 0" in seen


@pytest.mark.parametrize(("total", "floor"), [(128, 16), (119.7, 119.7 / 8), (24, 3), (4, 1)])
def test_the_default_floor(total: float, floor: float) -> None:
    assert default_floor_gib(total) == pytest.approx(floor)
