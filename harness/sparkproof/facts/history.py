"""What went wrong before: the driver's lines in the kernel log, and boots that no shutdown came before."""

from __future__ import annotations

import datetime
import itertools
import re

from sparkproof.facts.host import Host
from sparkproof.facts.installed import History

TIMEOUT_S = 5
DAYS = 30
LINES = "NV_ERR_NO_MEMORY|NVRM: Xid"
OUT_OF_MEMORY = "NV_ERR_NO_MEMORY"
XID = re.compile(r"NVRM: Xid \([^)]*\): (\d+)")
SHOWN = 5
NOT_ALLOWED = ("not seeing messages from other users", "Operation not permitted", "Permission denied")


def read_history(host: Host, today: datetime.date | None = None) -> History:
    """Both parts; what this user may not see, or what no tool tells, stays None."""
    found = History()
    log = kernel_log(host)
    if log is not None:
        found.memory_errors = sum(OUT_OF_MEMORY in line for line in log)
        numbers = [m.group(1) for line in log if (m := XID.search(line))]
        found.xids = [f"Xid {n}" for n in numbers[-SHOWN:]]
    last = host.which("last")
    if last:
        ran = host.run([last, "-x", "--time-format=iso", "reboot", "shutdown"], TIMEOUT_S)
        if not ran.error and ran.out.strip():
            dates = crashes(ran.out, today or datetime.datetime.now(datetime.UTC).date())
            found.crashes, found.crash_dates = len(dates), dates[:SHOWN]
    return found


def kernel_log(host: Host) -> list[str] | None:
    """The driver's lines of this boot and the one before by journalctl, else of this boot by dmesg."""
    journalctl, dmesg = host.which("journalctl"), host.which("dmesg")
    lines: list[str] | None = None
    for boot in ("-1", "0") if journalctl else ():
        ran = host.run([str(journalctl), "-k", "--no-pager", "-q", "-b", boot, "-g", LINES, "-n", "200"], TIMEOUT_S)
        # no match is exit code 1 without a word; no such boot is one with a word
        if not any(words in ran.err for words in NOT_ALLOWED) and (ran.code == 0 or (ran.code == 1 and not ran.err)):
            lines = (lines or []) + ran.out.splitlines()
    if lines is None and dmesg:
        ran = host.run([dmesg], TIMEOUT_S)
        if not ran.error:
            lines = [line for line in ran.out.splitlines() if re.search(LINES, line)]
    return lines


def crashes(text: str, today: datetime.date) -> list[str]:
    """Dates of boots in the last days that follow another boot without a shutdown between; `last` prints newest first.

    The oldest boot in the list may have anything before it, and is left out.
    """
    events = []
    for line in text.splitlines():
        kind = line.split(maxsplit=1)[0] if line.strip() else ""
        date = re.search(r"(\d{4}-\d\d-\d\d)T", line)
        if kind in ("reboot", "shutdown") and date:
            events.append((kind, date.group(1)))
    first = today - datetime.timedelta(days=DAYS)
    return [
        date
        for (kind, date), (before, _) in itertools.pairwise(events)
        if kind == before == "reboot" and datetime.date.fromisoformat(date) >= first
    ]
