"""`validate` from end to end over fake cases: record, views, exit codes, resume, interruption, every kind of bad luck."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

FAKE = Path(__file__).with_name("fake_harness.py")
VIEWS = ["record.jsonl", "report.json", "junit.xml", "summary.md", "report.html"]


@dataclass
class Runner:
    """Calls the command line in a folder of its own."""

    folder: Path

    def scenario(self, name: str, op: str = "pass", **fields: object) -> None:
        path = self.folder / "scenarios" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {"kind": "kernel", "summary": "a fake case for the tests", "op": op, **fields}
        path.write_text(yaml.safe_dump(body, sort_keys=False))

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(FAKE), *arguments]

    def environment(self, **extra: str) -> dict[str, str]:
        return {
            **os.environ,
            "SPARKPROOF_LOCK_DIR": str(self.folder / "locks"),
            "SPARKPROOF_CACHE": str(self.folder / "cache"),
            "SPARKPROOF_MANIFEST": str(self.folder / "manifest.jsonl"),
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join([str(FAKE.parent), os.environ.get("PYTHONPATH", "")]),
            **extra,
        }

    def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**env),
            capture_output=True,
            text=True,
            timeout=120,
        )

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # in the background a shell's programs ignore it
        )

    def runs(self) -> list[Path]:
        return sorted(p for p in (self.folder / "reports").iterdir() if p.is_dir() and not p.is_symlink())

    def record(self, run: Path | None = None) -> list[dict]:
        text = ((run or self.runs()[-1]) / "record.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def verdicts(self, run: Path | None = None) -> dict[str, str]:
        lines = [x for x in self.record(run) if x["type"] == "case"]
        return {x["result"]["name"]: x["result"]["verdict"] for x in lines}

    def wait_for(self, text: str, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = list((self.folder / "reports").glob("*/record.jsonl")) if (self.folder / "reports").exists() else []
            if any(text in p.read_text() for p in found):
                return
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            time.sleep(0.05)
        raise AssertionError(f"{text!r} never reached the record")


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def no_traceback(result: subprocess.CompletedProcess[str]) -> None:
    assert "Traceback" not in result.stdout + result.stderr, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("ops", "arguments", "code"),
    [
        (["pass", "pass2"], [], 0),
        (["pass", "skip"], [], 0),
        (["pass", "skip"], ["--strict"], 1),
        (["pass", "fail", "break"], [], 1),
        (["pass", "break"], [], 2),
        (["empty"], [], 2),
        (["pass", "retest"], [], 3),
    ],
)
def test_exit_codes_and_views(run: Runner, ops: list[str], arguments: list[str], code: int) -> None:
    for op in ops:
        run.scenario(f"k/{op}", op)
    result = run("validate", *arguments)
    assert result.returncode == code, result.stdout + result.stderr
    assert sorted(run.verdicts()) == sorted(f"k/{op}" for op in ops)
    latest = run.folder / "reports" / "latest"
    assert latest.resolve() == run.runs()[-1]
    for view in VIEWS:
        assert (latest / view).stat().st_size > 100, view
    assert "VALIDATED" not in result.stdout.replace("NOT VALIDATED", "")
    no_traceback(result)


def test_a_failure_shows_evidence_next_step_output_and_a_rerun_command_that_works(run: Runner) -> None:
    run.scenario("k/fail", "fail")
    run.scenario("k/pass", "pass")
    result = run("validate")
    for text in ("k/fail", "dx error ratio", "7.5", "Look at dx.", "the last line", "validate k/fail"):
        assert text in result.stdout, text
    again = run("validate", "k/fail")
    assert again.returncode == 1 and list(run.verdicts()) == ["k/fail"]


def test_a_broken_scenario_does_not_stop_the_others(run: Runner) -> None:
    run.scenario("k/good", "pass")
    run.scenario("k/wrong", "pass", dtpye="bf16")
    result = run("validate")
    assert result.returncode == 2
    assert run.verdicts()["k/good"] == "passed"
    assert "wrong.yaml:4: dtpye: unknown key. Did you mean 'dtype'?" in result.stdout
    listed = run("list")
    assert listed.returncode == 2 and "k/good" in listed.stdout and "Did you mean 'dtype'?" in listed.stdout
    no_traceback(result)


def test_kill_dash_nine_leaves_a_valid_record_and_resume_runs_the_rest(run: Runner, tmp_path: Path) -> None:
    run.scenario("k/a", "pass")
    run.scenario("k/b", "sleep")
    run.scenario("k/c", "pass")
    log = str(tmp_path / "log")
    process = run.start("validate", FAKE_LOG=log)
    run.wait_for('"k/a"', process)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert run.verdicts() == {"k/a": "passed"}, "every line that was written is whole"
    rebuilt = run("report", "latest" if (tmp_path / "reports/latest").exists() else run.runs()[-1].name)
    assert rebuilt.returncode == 0 and "k/b" in (run.runs()[-1] / "summary.md").read_text()
    Path(log).write_text("")
    result = run("validate", "--resume", run.runs()[-1].name, FAKE_SLEEP="0.1", FAKE_LOG=log)
    assert result.returncode == 0, result.stdout + result.stderr
    assert Path(log).read_text().split() == ["k/b", "k/c"], "k/a is not run again"
    assert run.verdicts() == {"k/a": "passed", "k/b": "passed", "k/c": "passed"}
    assert len(run.runs()) == 1


def test_resume_cuts_a_torn_line_and_repeats_a_changed_case(run: Runner) -> None:
    run.scenario("k/a", "pass")
    run.scenario("k/b", "pass")
    assert run("validate").returncode == 0
    record = run.runs()[-1] / "record.jsonl"
    with record.open("a") as f:
        f.write('{"type": "case", "result": {"na')
    run.scenario("k/b", "fail")
    result = run("validate", "--resume", "latest")
    assert result.returncode == 1, result.stdout + result.stderr
    assert run.verdicts()["k/b"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_partial_report_and_exit_130(run: Runner, number: int) -> None:
    run.scenario("k/a", "pass")
    run.scenario("k/b", "sleep")
    process = run.start("validate")
    run.wait_for('"k/a"', process)
    time.sleep(0.3)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert run.verdicts() == {"k/a": "passed"}
    for view in VIEWS:
        assert (run.runs()[-1] / view).exists(), view
    assert "interrupted" in output.lower() and "--resume" in output


def test_with_several_workers_everything_is_recorded_and_ctrl_c_still_reports(run: Runner) -> None:
    for n in range(4):
        run.scenario(f"k/a{n}", "pass")
    run.scenario("k/f", "fail")
    result = run("validate", "-n", "2")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "k/f" in result.stdout, result.stdout + result.stderr
    assert len(run.verdicts()) == 5 and "[  OK  ] k/a3" in result.stdout
    assert "bringing up nodes" not in result.stdout
    run.scenario("k/z", "sleep")
    shutil.rmtree(run.folder / "reports")
    process = run.start("validate", "-n", "2")
    run.wait_for('"k/f"', process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in output, output
    assert "k/z" not in run.verdicts() and (run.runs()[-1] / "report.html").exists()


def test_two_runs_at_once(run: Runner) -> None:
    run.scenario("k/a", "pass")
    run.scenario("k/b", "sleep")
    first = run.start("validate", FAKE_SLEEP="8")
    run.wait_for('"k/a"', first)
    second = run("validate")
    assert second.returncode == 2
    assert f"process {first.pid}" in second.stderr and "--wait" in second.stderr
    no_traceback(second)
    first.communicate(timeout=60)
    assert first.returncode == 0 and len(run.runs()) == 1


def test_what_runs_the_cases_does_not_import_torch() -> None:
    """Two seconds before each answer, and memory beside every case."""
    code = "import sys, sparkproof.run, sparkproof.cli.validate, sparkproof.report.views; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["validate", "--engine", "unslot"], "Did you mean 'unsloth'?"),
        (["validate", "--kind", "kernels"], "Did you mean 'kernel'?"),
        (["validate", "k/as"], "Did you mean 'k/a'?"),
        (["validate", "--tag", "x"], "No scenario has the tag 'x'"),
        (["validate", "--scenarios", "nowhere"], "No folder nowhere"),
        (["validate", "--resume", "nothing"], "no run 'nothing'"),
        (["validate", "--model", "./no-such-folder"], "no-such-folder"),
        (["describe", "k/as"], "Did you mean 'k/a'?"),
        (["report", "nothing"], "no run 'nothing'"),
    ],
)
def test_wrong_words_get_one_sentence_and_a_fix(run: Runner, arguments: list[str], says: str) -> None:
    run.scenario("k/a", "pass")
    result = run(*arguments)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2, result.stderr
    no_traceback(result)
    assert "Traceback" in run("--debug", *arguments).stderr


def test_a_read_only_reports_folder(run: Runner) -> None:
    run.scenario("k/a", "pass")
    if os.geteuid() == 0:  # root writes through permissions; /proc takes no folders from anyone
        result = run("validate", "--reports", "/proc/sparkproof-reports")
    else:
        folder = run.folder / "locked"
        folder.mkdir(mode=0o555)
        result = run("validate", "--reports", str(folder / "reports"))
    assert result.returncode == 2
    assert "error: " in result.stderr and "--reports" in result.stderr
    no_traceback(result)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="not-installed: unshare makes the small file system")
def test_a_full_disk_stops_the_run_and_keeps_what_was_measured(run: Runner) -> None:
    run.scenario("k/a", "pass")
    run.scenario("k/b", "fill")
    run.scenario("k/c", "pass")
    small = run.folder / "small"
    small.mkdir()
    keep = run.folder / "kept.jsonl"
    inner = " ".join(run.command("validate", "--reports", str(small)))
    script = f"mount -t tmpfs -o size=600k none {small} && {{ {inner}; code=$?; cp {small}/*/record.jsonl {keep}; exit $code; }}"
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(small)], capture_output=True)
    if probe.returncode:
        pytest.skip("platform: this kernel lets no user namespace mount a tmpfs")
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=run.folder,
        env=run.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert "space" in result.stderr.lower()
    no_traceback(result)
    lines = [json.loads(x) for x in keep.read_text().splitlines()]
    assert {x["result"]["name"] for x in lines if x["type"] == "case"} >= {"k/a"}


def test_secrets_never_reach_a_report_or_the_terminal(run: Runner) -> None:
    run.scenario("k/s", "secret")
    secret = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"
    result = run("validate", HF_TOKEN=secret)
    assert result.returncode == 1
    assert secret not in result.stdout + result.stderr
    for path in run.runs()[-1].rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_dry_run_runs_nothing_and_says_what_would_be_skipped(run: Runner, tmp_path: Path) -> None:
    run.scenario("k/a", "pass")
    run.scenario("k/gpu", "pass", requires={"gpu": True})
    log = tmp_path / "log"
    result = run("validate", "--dry-run", FAKE_LOG=str(log))
    assert result.returncode == 0
    assert "1 would run, 1 would be skipped" in result.stdout and "no-gpu" in result.stdout
    assert not log.exists() and not (tmp_path / "reports").exists()


def test_describe_explains_each_field(run: Runner) -> None:
    run.scenario("k/a", "pass", matrix={"dtype": ["fp32", "bf16"]})
    result = run("describe", "k/a")
    assert result.returncode == 0
    assert "fp32 | bf16" in result.stdout and "Wall-clock limit" in result.stdout
    assert "sparkproof validate 'k/a[dtype=bf16]'" in result.stdout


# --- pytest as the front end -------------------------------------------------------------------------------------------


def pytest_run(run: Runner, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(FAKE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "fake_harness", "-p", "no:cacheprovider", *arguments]
    env = run.environment(PYTHONPATH=path)
    return subprocess.run(command, cwd=run.folder, env=env, capture_output=True, text=True, timeout=120)


def test_plain_pytest_collects_selects_and_writes_junit(run: Runner) -> None:
    run.scenario("k/a", "pass", tags=["norm"], matrix={"dtype": ["fp32", "bf16"]})
    run.scenario("k/f", "fail")
    run.scenario("k/s", "skip")
    every = pytest_run(run, "scenarios/", "--junitxml", "out.xml")
    assert every.returncode == 1, every.stdout + every.stderr
    assert "2 passed" in every.stdout and "1 failed" in every.stdout and "1 skipped" in every.stdout
    assert "dx error ratio" in every.stdout and "run again: " in every.stdout
    assert "no-network" in (run.folder / "out.xml").read_text()
    assert (run.folder / "reports/latest/report.html").exists()
    assert "2 passed" in pytest_run(run, "scenarios/", "-k", "k/a").stdout
    assert "1 passed" in pytest_run(run, "scenarios/", "-m", "norm", "-k", "bf16").stdout
    assert pytest_run(run, "scenarios/", "-m", "kernel", "-k", "k/a").returncode == 0


def test_xdist_workers_run_and_the_controller_records(run: Runner) -> None:
    for n in range(6):
        run.scenario(f"k/a{n}", "pass")
    run.scenario("k/f", "fail")
    result = pytest_run(run, "scenarios/", "-n", "2")
    assert result.returncode == 1, result.stdout + result.stderr
    assert len(run.verdicts()) == 7 and run.verdicts()["k/f"] == "failed"
    header = run.record()[0]
    assert {p["name"] for p in header["planned"]} == set(run.verdicts())
