"""What a person sees while a run goes on, and at its end.

On a terminal one live block says what runs, for how long, how much is done and about how much is left; elsewhere the
same news come as plain lines that a CI log can be searched for. A failure is shown whole at once, and again at the end;
the last line is the sentence that matters. Nothing printed here is recorded, and nothing here can end a run: when
nobody reads any more (a closed pipe), the run goes on in silence.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from sparkproof.report.closing import closing, failure_lines
from sparkproof.report.redact import Redactor
from sparkproof.report.runrecord import RunRecord
from sparkproof.report.verdict import plural
from sparkproof.report.words import clean, direction, duration, label, measured, one_line, shorten, why_skipped
from sparkproof.results import CaseResult, Verdict

TAGS = {
    Verdict.PASSED: ("[  OK  ]", "green"),
    Verdict.FAILED: ("[ FAIL ]", "bold red"),
    Verdict.BROKEN: ("[BROKEN]", "bold magenta"),
    Verdict.RETEST: ("[RETEST]", "yellow"),
    Verdict.SKIPPED: ("[ SKIP ]", "dim"),
}
PLAIN_WIDTH = 120
QUIET_S = 15.0  # off a terminal, progress is told at most this often
METRICS = 4  # `P:` lines of one case


class LiveReporter:
    """Shows one run. Safe to call from several threads."""

    def __init__(self, console: RunConsole | None = None) -> None:
        self.console = console or RunConsole()
        self.total = 0
        self.done: Counter[Verdict] = Counter()
        self.running: dict[str, float] = {}
        self.news = ""
        self._redact = Redactor()
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._muted = False
        self._started = self._told = time.monotonic()
        self._promised = ""  # how long the profile is meant to take, to be owned up to at the end
        self._within_s = float("inf")
        self._spent = 0.0  # seconds of cases that ran, skipped ones left out

    def start(
        self,
        total: int,
        facts_sentence: str,
        profile: str = "",
        summary: str = "",
        run_dir: Path | None = None,
        time_box_minutes: float | None = None,
    ) -> None:
        """Say what is about to happen."""
        self.total = total
        self._started = self._told = time.monotonic()
        if time_box_minutes:
            self._within_s = 60 * time_box_minutes
            self._promised = f"the {time_box_minutes:g} min that profile {profile} is meant to take"
        box = f", within {time_box_minutes:g} min" if time_box_minutes else ""
        what = f"profile {profile}: " if profile else ""
        self._say(Text.assemble((self._safe(facts_sentence), "bold")))
        self._say(Text(f"{what}{plural(total, 'case')}{box}"))
        if summary:
            self._say(Text(self._safe(summary), "dim"))
        if run_dir is not None:
            self._say(Text(f"record: {run_dir}", "dim"))
        self._say(Text(""))
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(_Block(self), console=self.console, refresh_per_second=4, transient=True)
            with self._quietly():
                self._live.start()

    def case_started(self, name: str) -> None:
        """A case begins."""
        with self._lock:
            self.running[name] = time.monotonic()
            self.news = ""
            if self._live is None:
                self._say(Text(f"[ RUN  ] {self._safe(name)}"))

    def progress(self, text: str, name: str = "") -> None:
        """News from inside a case; on a terminal in the live block, elsewhere now and then."""
        with self._lock:
            self.news = self._safe(f"{name}: {text}" if name else text)
            if self._live is None and time.monotonic() - self._told > QUIET_S:
                self._told = time.monotonic()
                self._say(Text(f"[  ..  ] {self.news}"))

    def case_finished(self, result: CaseResult) -> None:
        """A case ended: one line, its metrics, and everything about a failure."""
        with self._lock:
            self.running.pop(result.name, None)
            self.news = ""
            self._told = time.monotonic()
            self.done[result.verdict] += 1
            tag, style = TAGS[result.verdict]
            if result.verdict is Verdict.SKIPPED:
                self._say(Text(f"{tag} {self._safe(result.name)}: {self._safe(why_skipped(result))}", style))
                return
            self._spent += result.duration_s
            name = self._safe(result.name)
            self._say(Text.assemble((tag, style), " ", name, (f" ({duration(result.duration_s)})", "dim")))
            for m in [m for m in result.measurements if m.higher_is_better is not None][:METRICS]:
                better = f", {direction(m)}" if direction(m) else ""
                self._say(
                    Text(f"         P: {self._safe(label(m.name, m.unit))}: {self._safe(measured(m))}{better}", "dim")
                )
            if result.verdict in (Verdict.FAILED, Verdict.BROKEN, Verdict.RETEST):
                for head, text in failure_lines(result):
                    self._block(head, text)

    def finish(self, run_record: RunRecord) -> None:
        """The end: a table, the failures again, where the report is, and the sentence that matters."""
        self._stop()
        took = time.monotonic() - self._started
        if took > self._within_s:
            self._say(Text(f"It took {duration(took)}, more than {self._promised}.", "dim"))
        for part in closing(run_record, self.console.width, self._safe):
            self._say(part)

    def _block(self, head: str, text: str) -> None:
        lines = self._redact.text(clean(text)).strip("\n").splitlines() or [""]
        if not text.startswith("\n"):
            self._say(Text.assemble(f"         {head}: ", lines[0]))
            return
        self._say(Text(f"         {head}:"))
        for line in lines:
            self._say(Text(f"         | {line}", "dim"))

    def _safe(self, text: str) -> str:
        return self._redact.text(one_line(text))

    def _say(self, what: RenderableType) -> None:
        with self._lock, self._quietly():
            self.console.print(what, soft_wrap=isinstance(what, Text), highlight=False, markup=False)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """A reader that has gone must not end the run."""
        if self._muted:
            with suppress(OSError, ValueError):
                yield
            return
        try:
            yield
        except (OSError, ValueError):  # a closed pipe, a closed file
            self._muted = True

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with self._quietly():
                live.stop()

    def left(self) -> str:
        """About how long it will still take, once there is something to reckon from."""
        ran = sum(n for v, n in self.done.items() if v is not Verdict.SKIPPED)
        remaining = self.total - self.done.total()
        if ran < 3 or remaining <= 0:
            return ""
        current = sum(time.monotonic() - t for t in self.running.values())
        return f"about {duration(max(1.0, self._spent / ran * remaining - current))} left"


class _Block:
    """The live block: a line for each running case and one for the whole; reads the clock whenever it is drawn."""

    def __init__(self, reporter: LiveReporter) -> None:
        self.reporter = reporter

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        r = self.reporter
        width = options.max_width
        now = time.monotonic()
        for name, begun in list(r.running.items())[:4]:
            tail = f"  {duration(now - begun)}"
            yield Text.assemble(
                (f"> {shorten(name, max(16, width - len(tail) - 3))}", "bold"), tail, overflow="ellipsis"
            )
        if r.news:
            yield Text(f"  {r.news}"[: width - 1], "cyan", no_wrap=True, overflow="ellipsis")
        bad = sum(r.done[v] for v in (Verdict.FAILED, Verdict.BROKEN))
        parts = [
            f"{r.done.total()} of {r.total} done",
            f"{bad} failed" if bad else "",
            f"{duration(now - r._started)} so far",
        ]
        parts.append(r.left())
        yield Text(", ".join(p for p in parts if p)[: width - 1], "dim", no_wrap=True, overflow="ellipsis")


class RunConsole(Console):
    """A console that can't end a run: rich's own exits the program when the reader of a pipe has gone."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, **settings)
        if not self.is_terminal and "width" not in settings:
            self.width = PLAIN_WIDTH
        reconfigure = getattr(self.file, "reconfigure", None)
        if reconfigure is not None:  # a terminal without Unicode gets question marks, not an exception
            reconfigure(errors="replace")

    def on_broken_pipe(self) -> None:
        """Go on in silence; what Python flushes at its end goes nowhere."""
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
