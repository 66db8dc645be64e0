"""Memory on a shared pool: control groups' limits, the watchdog under real pressure, memory that comes back late."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import report_sample as sample
from sparkproof import session as sessions
from sparkproof.cli import app
from sparkproof.errors import UserError
from sparkproof.judge import selftest_memory
from sparkproof.measure import baseline, memory
from sparkproof.scenario import Case, ComparisonScenario, Profile
from sparkproof.session import RunSession
from typer.testing import CliRunner

MIB = 2**20


def test_the_watchdog_under_real_pressure_ends_the_case_and_the_run_goes_on() -> None:
    found = CliRunner().invoke(app, ["selftest", "memory", "--json"])
    if isinstance(found.exception, UserError):
        assert found.exception.skip_class in ("platform", "memory")
        pytest.skip(found.exception.message)
    assert found.exit_code == 0, (found.output, found.exception)
    seen = json.loads(found.stdout)
    assert seen["greedy"]["status"] == "memory" and seen["after"]["status"] == "ok" and seen["kernel_kills"] == 0
    assert seen["available_gib"] < seen["limit_gib"], "inside the group its limit is what is available"
    assert 0 < seen["greedy"]["min_available_gib"] < seen["floor_gib"]
    assert not list(Path("/sys/fs/cgroup").glob("**/sparkproof-pressure-*")), "the group is removed"


def test_a_watchdog_that_misses_is_not_called_well(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"status": "memory", "duration_s": 2.0, "min_available_gib": 0.2}
    for greedy, after, kills, said in (
        ({**good, "status": "died"}, {"status": "ok"}, 0, "ended as 'died', and not by the watchdog"),
        (good, {"status": "memory"}, 0, "the run did not go on"),
        (good, {"status": "ok"}, 1, "The kernel killed 1 times"),
    ):
        assert said in selftest_memory._sentence(False, greedy, after, kills)


def test_where_no_group_can_be_made_it_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(selftest_memory, "_places", lambda: [(tmp_path / "file", 2, "memory.max")])
    monkeypatch.setattr(memory, "available_gib", lambda: 8.0)
    with pytest.raises(UserError, match=r"not tried under real pressure: .*Not a directory") as caught:
        selftest_memory.run()
    assert caught.value.skip_class == "platform"
    monkeypatch.setattr(memory, "available_gib", lambda: 0.5)
    with pytest.raises(UserError, match=r"0\.5 are available") as caught:
        selftest_memory.run()
    assert caught.value.skip_class == "memory"


def group(folder: Path, version: int, limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    top, now, key = names.get(version, ("memory.max", "memory.current", "inactive_file"))
    (folder / top).write_text(f"{limit}\n")
    (folder / now).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{key} {cache}\nother 5\n")


@pytest.mark.parametrize(
    ("version", "line", "base"),
    [(1, "4:memory:/a/b", "memory"), (1, "9:cpu,memory:/a/b", "memory"), (2, "0::/a/b", ".")],
)
def test_the_limits_of_all_groups_above_are_found(tmp_path: Path, version: int, line: str, base: str) -> None:
    root = tmp_path / "cgroup"
    group(root / base / "a" / "b", version, str(400 * MIB), 300 * MIB, 50 * MIB)
    group(root / base / "a", version, "max" if version == 2 else str(2**63 - 4096), 300 * MIB, 0)
    group(root / base, version, str(1000 * MIB), 980 * MIB, 10 * MIB)
    (tmp_path / "me").write_text(f"1:cpu:/x\n{line}\n")
    found = memory.find_limits(tmp_path / "me", root)
    assert [x.limit for x in found] == [400 * MIB, 1000 * MIB]
    assert [x.headroom() for x in found] == [150 * MIB, 30 * MIB], "the least of all counts"
    (tmp_path / "elsewhere").write_text(f"{line.rsplit(':', 1)[0]}:/host/path/of/a/container\n")
    assert [x.limit for x in memory.find_limits(tmp_path / "elsewhere", root)] == [1000 * MIB]
    assert memory.find_limits(tmp_path / "nowhere", root) == []


def test_available_is_the_least_of_host_and_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * 2**30, total=16 * 2**30))
    monkeypatch.setattr(memory, "limits", lambda: ())
    assert (memory.available_gib(), memory.total_gib()) == (8.0, 16.0)
    group(tmp_path / "g", 2, str(2**30), 2**29, 0)
    monkeypatch.setattr(memory, "limits", lambda: (memory.Limit(tmp_path / "g", 2, 2**30),))
    assert (memory.available_gib(), memory.total_gib()) == (0.5, 1.0)
    (tmp_path / "g" / "memory.current").unlink()
    assert memory.available_gib() == 8.0, "a group that can't be read hides no host"


def test_memory_that_comes_back_late_is_waited_for() -> None:
    values = iter((60.0, 80.0, 99.0, 108.5))
    slept: list[float] = []
    found = baseline.wait(110.0, lambda: next(values), 90, slept.append)
    assert found.back and found.now == 108.5 and len(slept) == 3
    assert found.notice == "Memory was waited for, 2 s, until it had come back (row 43)."
    assert baseline.wait(110.0, lambda: 108.1, 90, slept.append).notice == ""
    assert len(slept) == 3, "what is there is not waited for"


def test_memory_that_does_not_come_back_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "holders", lambda: "ollama 4711 (20.3 GiB)")
    found = baseline.wait(110.0, lambda: 71.0, 5.0, lambda s: None)
    assert not found.back and found.waited_s >= 5
    assert found.notice == (
        "Memory had not come back before this case: 71.0 of 110.0 GiB were available after 5 s; most is held by "
        "ollama 4711 (20.3 GiB) (row 43)."
    )


def test_only_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert baseline.reader(sample.laptop()) is None
    assert baseline.reader(sample.spark()) is baseline.available_gib

    def unknown(uuid: str | None) -> object:
        raise RuntimeError("NOT_SUPPORTED")

    card = sample.spark()
    card.gpus[0].integrated = False
    monkeypatch.setattr(baseline, "_free_of_card", unknown)
    assert baseline.reader(card) is None
    monkeypatch.setattr(baseline, "_free_of_card", lambda uuid: lambda: 42.0)
    read = baseline.reader(card)
    assert read is not None and read() == 42.0


def session_and_timed_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[RunSession, Case]:
    """On a Spark, with a runner that passes at once."""
    body = {"kind": "comparison", "summary": "a timed case of a test", "shape": "tiny"}
    timed = Case(name="comparison/x", file="x.yaml", scenario=ComparisonScenario.model_validate(body))
    (tmp_path / "scenarios").mkdir()
    settings = sessions.Settings(
        run_dir=tmp_path, scenarios=tmp_path / "scenarios", profile=Profile.SMOKE, cache_dir=tmp_path / "cache",
        facts=sample.spark(),
    )  # fmt: skip
    monkeypatch.setattr(sessions, "runner", lambda kind: lambda case, context: sample.case(case.name, "comparison"))
    return RunSession(settings), timed


def test_a_case_takes_no_longer_for_waiting_until_it_may_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def late(exclusive: bool) -> Iterator[None]:
        time.sleep(0.5)
        yield

    session, timed = session_and_timed_case(monkeypatch, tmp_path)
    monkeypatch.setattr(sessions, "machine_lock", late)
    assert session.run(timed).duration_s < 0.4


def test_a_case_after_memory_that_is_gone_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = iter((110.0, 110.0, 40.0))
    monkeypatch.setattr(baseline, "available_gib", lambda: next(free))
    monkeypatch.setattr(baseline, "WAIT_S", 0.0)
    monkeypatch.setattr(baseline.wait, "__defaults__", (0.0, lambda s: None))
    session, timed = session_and_timed_case(monkeypatch, tmp_path)
    assert session.run(timed).notices == []
    assert "40.0 of 110.0 GiB were available" in session.run(timed).notices[0]
