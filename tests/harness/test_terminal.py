"""The live reporter: plain lines off a terminal, a live block on one, everything about a failure, the sentence last."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report_sample import EVIL, case, evil_result, good_results, laptop, metric, mixed_results, record_of, train
from sparkproof.report import terminal
from sparkproof.report.terminal import LiveReporter, RunConsole
from sparkproof.results import ReasonClass, Verdict


def plain(width: int = 120) -> tuple[LiveReporter, io.StringIO]:
    out = io.StringIO()
    return LiveReporter(RunConsole(file=out, width=width)), out


def test_plain_lines(tmp_path: Path) -> None:
    reporter, out = plain()
    reporter.start(3, "no NVIDIA GPU, x86_64, 2 cores", "smoke", "Runs anywhere.", tmp_path, 10)
    reporter.case_started("k/a")
    reporter.case_finished(case("k/a", duration_s=1.2, measurements=[metric("tokens_per_s", 123.4, "tokens/s")]))
    skip = case("k/b", verdict=Verdict.SKIPPED, reason_class=ReasonClass.GPU, reason="There is no GPU.")
    reporter.case_finished(skip)
    reporter.case_finished(case("k/c", verdict=Verdict.RETEST, reason="Clocks moved."))
    lines = out.getvalue().splitlines()
    assert lines[0] == "no NVIDIA GPU, x86_64, 2 cores" and lines[1] == "profile smoke: 3 cases, within 10 min"
    for line in (
        "[ RUN  ] k/a",
        "[  OK  ] k/a (1.2 s)",
        "         P: speed: 123.4 tokens/s, higher is better",
        "[ SKIP ] k/b: no-gpu: There is no GPU.",
        "[RETEST] k/c (1.2 s)",
    ):
        assert line in lines, (line, lines)
    assert "\x1b" not in out.getvalue()


def test_a_failure_is_shown_whole_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARKPROOF_DEBUG", raising=False)
    reporter, out = plain()
    failed = mixed_results()[1]
    failed.traceback = "Traceback (most recent call last): x"
    reporter.case_finished(failed)
    text = out.getvalue()
    for part in (
        "[ FAIL ] environment/memory",
        "why: swap is on: 15 GiB",
        "evidence: no swap: 15 GiB, allowed none; /swap.img is on.",
        "         | line 39 of the log",
        "next step: Run `sudo swapoff -a` before training.",
        "run again: sparkproof validate 'environment/memory'",
    ):
        assert part in text, part
    assert "line 20 of the log" not in text, "the last lines only"
    assert "Traceback" not in text, "that is for --debug"


def test_the_end_has_table_failures_report_and_the_sentence_last(tmp_path: Path) -> None:
    reporter, out = plain()
    record = record_of(tmp_path / "run", mixed_results())
    reporter.start(26, "x")
    reporter.finish(record)
    text = out.getvalue()
    lines = text.rstrip("\n").split("\n")
    assert lines[-1] == record.sentence and lines[-2].startswith("Can this machine fine-tune? Not shown: ")
    assert lines[-3] == f"Report: {tmp_path / 'run' / 'report.html'}"
    row = next(line.split() for line in lines if line.startswith("Kernels"))
    assert row[:6] == ["Kernels", "10", ".", "1", ".", "1"]
    totals = next(line.split() for line in lines if line.startswith("all"))
    assert totals[1:6] == ["21", "1", "1", "1", "1"]
    again = text[text.index("What went wrong:") :]
    assert (
        again.index("environment/memory") < again.index("kernels/rms_norm[dtype=fp16]") < again.index("kernels/swiglu")
    )
    assert "run again: sparkproof validate 'environment/memory'" in again
    assert "train/smollm2/135m_qlora_single_device[engine=sparktune]" in text and "3,461 tokens/s" in text


def test_a_run_that_took_longer_than_its_profile_means_to_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for minutes, told in ((9, False), (15, True)):
        reporter, out = plain()
        now = time.monotonic()
        reporter.start(1, "x", "quick", "", None, 10)
        monkeypatch.setattr("sparkproof.report.terminal.time.monotonic", lambda t=now + 60 * minutes: t)
        reporter.finish(record_of(tmp_path / str(minutes), good_results()))
        monkeypatch.undo()
        said = "It took 15 min 00 s, more than the 10 min that profile quick is meant to take." in out.getvalue()
        assert said is told, out.getvalue()


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    reporter, out = plain()
    reporter.finish(record_of(tmp_path, [case("k/a")], laptop(), planned_only=("k/b",), interrupted=True))
    assert f"Interrupted. Go on with: sparkproof validate --resume {tmp_path}" in out.getvalue()


@pytest.mark.parametrize("width", [24, 40, 60, 100])
def test_narrow_terminals_keep_names_recognisable(tmp_path: Path, width: int) -> None:
    reporter, out = plain(width)
    result = train("sparktune")
    reporter.case_finished(result)
    reporter.finish(record_of(tmp_path, good_results()))
    assert f"[  OK  ] {result.name}" in out.getvalue(), "lines wrap in the terminal, they are not cut"
    assert out.getvalue().count("=sparktune]") >= 2 or width < 40
    table = [x for x in out.getvalue().splitlines() if x.startswith(("Kernels", "Training", "all "))]
    assert table and max(map(len, table)) <= max(width, 32)


def test_hostile_text_does_nothing_to_a_terminal_and_secrets_stay_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-token-value")
    reporter, out = plain()
    result = evil_result()
    result.output_tail = f"[bold]not markup[/bold] {EVIL} planted-token-value"
    reporter.start(1, "device planted-token-value")
    reporter.case_started(result.name)
    reporter.case_finished(result)
    reporter.progress("x planted-token-value")
    reporter.finish(record_of(tmp_path, [result, case("k/x", verdict=Verdict.FAILED, reason="planted-token-value")]))
    text = out.getvalue()
    assert "[bold]not markup[/bold]" in text and "planted-token-value" not in text and "[redacted HF_TOKEN]" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_progress_off_a_terminal_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    reporter, out = plain()
    reporter.start(1, "x")
    reporter.case_started("k/a")
    for step in range(100):
        now[0] += 1
        reporter.progress(f"step {step}")
    told = [x for x in out.getvalue().splitlines() if x.startswith("[  ..  ]")]
    assert 5 <= len(told) <= 7 and told[-1] == "[  ..  ] step 95"


def test_what_is_left_is_reckoned_from_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    reporter, _ = plain()
    reporter.start(10, "x")
    assert reporter.left() == ""
    for i in range(3):
        reporter.case_finished(case(f"k/{i}", duration_s=10.0))
    reporter.case_finished(
        case("k/s", verdict=Verdict.SKIPPED, reason="x", reason_class=ReasonClass.GPU, duration_s=0.0)
    )
    assert reporter.left() == "about 1 min 00 s left", "six cases of ten seconds"
    reporter.case_started("k/4")
    now[0] = 5.0
    assert reporter.left() == "about 55 s left"


def test_a_reader_that_has_gone_does_not_end_the_run(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    reporter = LiveReporter(RunConsole(file=Gone(), width=80))
    reporter.start(1, "x")
    reporter.case_started("k/a")
    reporter.case_finished(mixed_results()[1])
    reporter.finish(record_of(tmp_path, mixed_results()))


def test_a_pipe_that_closes_for_real(tmp_path: Path) -> None:
    done = tmp_path / "done"
    script = f"""
import sys, pathlib
sys.path.insert(0, {str(Path(__file__).parent)!r})
from report_sample import case
from sparkproof.report.terminal import LiveReporter
r = LiveReporter()
r.start(4000, "x")
for i in range(4000):
    r.case_finished(case(f"k/{{i}}"))
pathlib.Path({str(done)!r}).write_text("to the end")
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 0 and done.read_text() == "to the end" and error == b"", error


def test_an_ascii_terminal_gets_question_marks_and_no_error(tmp_path: Path) -> None:
    raw = io.BytesIO()
    reporter = LiveReporter(RunConsole(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True), width=80))
    reporter.case_finished(case("k/ü", verdict=Verdict.FAILED, reason="≥ 3"))
    reporter.finish(record_of(tmp_path, [case("k/ü", measurements=[metric("µ", 1.0, "µs")])]))
    assert b"k/? " in raw.getvalue() and b"VALIDATED" in raw.getvalue()


LIVE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from report_sample import case, train
from sparkproof.report.terminal import LiveReporter, RunConsole
r = LiveReporter()
r.start(5, "NVIDIA GB10", "quick", "", None, 10)
for i in range(3):
    r.case_finished(case(f"k/{i}", duration_s=20.0))
r.case_started(train("sparktune").name)
r.progress("step 12/40 loss 2.31")
time.sleep(0.6)
r.case_finished(train("sparktune"))
r._stop()
"""


def on_a_pty(columns: int, **env: str) -> str:
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "30", **env}
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE, str(Path(__file__).parent)], stdout=side, stderr=side, env=environment
    )
    os.close(side)
    out, limit = b"", time.monotonic() + 60
    while time.monotonic() < limit:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        out += part
    os.close(main)
    assert process.wait(timeout=30) == 0, out.decode(errors="replace")
    return out.decode(errors="replace")


def test_a_terminal_gets_a_live_block() -> None:
    out = on_a_pty(100)
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "> train/smollm2/135m_qlora_single_device[engine=sparktune]" in bare
    assert "step 12/40 loss 2.31" in bare and "3 of 5 done" in bare and re.search(r"about \d+ s left", bare)
    assert "[  OK  ] train/smollm2/135m_qlora_single_device[engine=sparktune] (1 min 11 s)" in bare
    assert "\x1b[32m" in out, "colours"
    assert "[ RUN  ]" not in bare


def test_no_color_and_a_narrow_terminal() -> None:
    out = on_a_pty(40, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", out), "no colours"
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    live = [x for x in re.split(r"[\r\n]+", bare) if x.startswith("> ")]
    assert live and all(len(x) <= 40 and "..." in x and "sparktune]" in x for x in live)


def test_a_dumb_terminal_gets_plain_lines() -> None:
    assert "[ RUN  ] train/" in on_a_pty(100, TERM="dumb")
