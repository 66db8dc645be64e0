"""One case, one process: a timeout, a memory watchdog, and an account of how it ended.

Running out of memory on a machine whose GPU shares the host's pool freezes the host with no OOM kill (rows 38 and 43 of
docs/failures.md), and free memory was seen to fall from 34.0 to 12.7 GiB in about 1.5 s. So the watchdog reads
/proc/meminfo ten times a second and kills the case's process group, not the host, at the floor.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparkproof.measure.memory import available_gib, tree_rss_gib

POLL_S = 0.1
TAIL_LINES = 25


@dataclass
class Outcome:
    """How a spawned process ended."""

    status: Literal["ok", "error", "timeout", "memory", "died"]
    result: dict[str, Any] = field(default_factory=dict)
    error_type: str = ""
    error: str = ""
    stage: str = ""  # non-empty: raised by what is under test
    traceback: str = ""
    returncode: int | None = None
    output_tail: str = ""
    log: str = ""
    duration_s: float = 0.0
    peak_rss_gib: float = 0.0
    min_available_gib: float = 0.0
    start_available_gib: float = 0.0

    @property
    def machine_gib(self) -> float:
        """How much less memory the machine had available at the worst moment than when the process began, in GiB."""
        return max(0.0, self.start_available_gib - self.min_available_gib)

    @property
    def blames_device(self) -> bool:
        """Whether this end is a finding about what is tested rather than a fault of the harness."""
        return self.status in ("timeout", "memory", "died") or bool(self.stage)

    def sentence(self, phase: str) -> str:
        """What happened, for a person."""
        match self.status:
            case "ok":
                return f"{phase} ended well"
            case "timeout":
                return f"{phase} did not end within its {self.duration_s:.0f} s and was ended"
            case "memory":
                return (
                    f"{phase} was ended by the memory watchdog: {self.min_available_gib:.1f} GiB were left "
                    f"(the process held {self.peak_rss_gib:.1f} GiB)"
                )
            case "died":
                return f"{phase} died: {_signal_name(self.returncode)}"
        where = f" in {self.stage}" if self.stage else ""
        return f"{phase} raised {self.error_type}{where}: {self.error.strip()[:500]}"


def _signal_name(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-returncode).name}"
    return f"exit code {returncode} without a result"


def run_process(
    command: list[str],
    payload: dict[str, Any],
    *,
    work_dir: Path,
    phase: str,
    timeout_s: float,
    floor_gib: float,
    env: dict[str, str],
    progress: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run `command PAYLOAD RESULT` in a new session; poll it ten times a second; never leave a child behind."""
    payload_path = work_dir / f"{phase}.payload.json"
    result_path = work_dir / f"{phase}.result.json"
    progress_path = work_dir / f"{phase}.progress"
    log_path = work_dir / f"{phase}.log"
    result_path.unlink(missing_ok=True)
    payload_path.write_text(json.dumps(payload), encoding="utf-8")
    progress_path.write_text("", encoding="utf-8")
    env = {
        **env,
        "SPARKPROOF_PROGRESS": str(progress_path),
        "SPARKPROOF_PARENT": str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
    }
    start = time.monotonic()
    status = ""
    at_start = available_gib()
    peak_rss, lowest, seen = 0.0, at_start, 0
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [*command, str(payload_path), str(result_path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                free = available_gib()
                lowest = min(lowest, free)
                peak_rss = max(peak_rss, tree_rss_gib(process.pid))
                if free < floor_gib:
                    status = "memory"
                elif time.monotonic() - start > timeout_s:
                    status = "timeout"
                if status:
                    break
                seen = _forward(progress_path, seen, progress)
        finally:
            kill_group(process)
    tail = _tail(log_path)
    outcome = Outcome(
        status="died",
        returncode=process.returncode,
        output_tail=tail,
        log=str(log_path),
        duration_s=time.monotonic() - start,
        peak_rss_gib=peak_rss,
        min_available_gib=lowest,
        start_available_gib=at_start,
    )
    if status:
        outcome.status = status  # type: ignore[assignment]
    elif result_path.exists():
        document = json.loads(result_path.read_text(encoding="utf-8"))
        if "result" in document:
            outcome.status, outcome.result = "ok", document["result"]
        else:
            e = document["error"]
            outcome.status = "error"
            outcome.error_type, outcome.error = e["type"], e["message"]
            outcome.stage, outcome.traceback = e["stage"], e["traceback"]
    return outcome


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started, then reap it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)


def _forward(path: Path, seen: int, progress: Callable[[str], None]) -> int:
    """Pass on whole new lines of the progress file; return the new offset."""
    with contextlib.suppress(OSError), open(path, "rb") as f:
        f.seek(seen)
        data = f.read()
        end = data.rfind(b"\n") + 1
        if end:
            progress(data[:end].decode(errors="replace").splitlines()[-1])
        return seen + end
    return seen


def _tail(path: Path, lines: int = TAIL_LINES) -> str:
    try:
        with open(path, "rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - 16384))
            return "\n".join(f.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
