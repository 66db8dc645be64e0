"""One run: its settings, its surroundings, and how a single case goes through it."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import Field

from sparkproof import catalog
from sparkproof.errors import UserError
from sparkproof.facts.model import Facts
from sparkproof.match import unmet
from sparkproof.measure import baseline
from sparkproof.measure.exclusive import machine_lock
from sparkproof.measure.memory import default_floor_gib
from sparkproof.results import CaseResult, ReasonClass, Strict, Verdict
from sparkproof.rollback import manifest
from sparkproof.runners.base import Context
from sparkproof.runners.registry import runner
from sparkproof.scenario import Case, Profile


def default_cache_dir() -> Path:
    """Where converted models are kept between runs: `SPARKPROOF_CACHE`, else the user's cache folder."""
    return Path(os.environ.get("SPARKPROOF_CACHE") or platformdirs.user_cache_dir("sparkproof"))


class Settings(Strict):
    """Everything a worker process needs to run cases of this run; travels as JSON."""

    run_dir: Path
    scenarios: Path
    profile: Profile
    selected: list[str] | None = Field(default=None, description="Names to run; None: all of the profile.")
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Kind -> fields set by the command line."
    )
    cache_dir: Path = Field(default_factory=default_cache_dir)
    memory_floor_gib: float = Field(default_factory=default_floor_gib)
    strict: bool = False
    facts: Facts


class RunSession:
    """Runs cases. It neither records nor prints: that is for whoever holds it."""

    def __init__(self, settings: Settings, progress: Callable[[str], None] = lambda text: None) -> None:
        self.settings = settings
        self.catalog = catalog.load(settings.scenarios, settings.overrides)
        self._read = baseline.reader(settings.facts)
        self._before: float | None = None
        self._began = 0.0  # of the case that runs, since it might
        self.context = Context(
            run_dir=settings.run_dir.resolve(),  # children and tools get absolute paths, wherever they run
            facts=settings.facts,
            cache_dir=settings.cache_dir,
            memory_floor_gib=settings.memory_floor_gib,
            progress=progress,
            cases=self.catalog.cases,
            strict=settings.strict,
        )

    def wanted(self, case: Case) -> bool:
        """Whether the run's profile or selection asks for this case."""
        if self.settings.selected is not None:
            return case.name in self.settings.selected
        return case.scenario.profile.level <= self.settings.profile.level

    def run(self, case: Case) -> CaseResult:
        """Match, lock, run, and finish the result; never raises but for Ctrl-C."""
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._began = time.monotonic()
        self._own()
        result = self._run(case)
        if result.verdict is Verdict.PASSED and not result.assertions:
            result.verdict, result.reason = Verdict.BROKEN, "The case asserted nothing."
        if result.verdict is Verdict.SKIPPED and result.reason_class is None:
            result.verdict, result.reason = Verdict.BROKEN, f"Skipped without a reason class: {result.reason}"
        result.started, result.duration_s = started, round(time.monotonic() - self._began, 3)
        result.rerun = rerun_command(case.name, self.settings)
        return result

    def _memory_returned(self) -> baseline.Return | None:
        """Before a timed case, which has the machine alone: wait for what earlier ones took. None where nothing tells."""
        if self._read is None:
            return None
        if self._before is None:
            self._before = self._first_available()
        returned = baseline.wait(self._before, self._read)
        if not returned.back:
            self.context.progress(returned.notice)
        return returned

    def _first_available(self) -> float:
        """What was available when the run began: of all its processes the first one to ask writes it down."""
        assert self._read is not None
        note = self.settings.run_dir / "memory-baseline.json"
        if not note.exists():
            note.write_text(json.dumps(self._read()), encoding="utf-8")
        return float(json.loads(note.read_text(encoding="utf-8")))

    def _own(self) -> None:
        """Put what this run makes outside its reports on the list of ours, so that `uninstall` finds it."""
        if not self.settings.cache_dir.exists():
            with suppress(OSError):  # a list that can't be written must not stop a run
                self.settings.cache_dir.mkdir(parents=True)
                manifest.add(self.settings.cache_dir, "cache")

    def _run(self, case: Case) -> CaseResult:
        facts = self.settings.facts
        lacking = unmet(case.scenario.requires, facts)
        if lacking:
            return CaseResult(
                name=case.name,
                kind=case.kind,
                verdict=Verdict.SKIPPED,
                reason_class=lacking[0],
                reason=lacking[1],
                next_step="Run it on a machine that has what it needs; nothing is wrong with this one.",
                evidence=dict(case.scenario.place),
            )
        heavy = case.kind != "environment"
        try:
            with machine_lock(exclusive=case.scenario.timed) if heavy else nullcontext():
                self._began = time.monotonic()  # waiting for others' cases is no time of this one
                returned = self._memory_returned() if heavy and case.scenario.timed else None
                result = runner(case.kind)(case, self.context)
                if returned is not None and returned.notice:
                    result.notices.append(returned.notice)
                return result
        except UserError as e:
            reason = ReasonClass(e.skip_class) if e.skip_class else None
            return CaseResult(
                name=case.name,
                kind=case.kind,
                verdict=Verdict.SKIPPED if reason else Verdict.BROKEN,
                reason_class=reason,
                reason=e.message,
                next_step=e.fix,
                evidence=dict(case.scenario.place),
            )
        except Exception as e:
            return CaseResult(
                name=case.name,
                kind=case.kind,
                verdict=Verdict.BROKEN,
                reason=f"The harness itself failed: {type(e).__name__}: {e}",
                next_step="This says nothing about the machine. Please report it with the traceback in the record.",
                traceback=traceback.format_exc()[-8000:],
            )


def broken_file(problem: catalog.Problem) -> CaseResult:
    """The result of a scenario file that could not be used."""
    return CaseResult(
        name=f"{Path(problem.file).with_suffix('').as_posix()}:{problem.line}",
        kind="scenario",
        verdict=Verdict.BROKEN,
        reason=str(problem),
        next_step=f"Correct line {problem.line} of {problem.file}; `sparkproof list` checks all scenarios at once.",
    )


def program() -> str:
    """How the reader calls this program from where they are."""
    if shutil.which("sparkproof"):
        return "sparkproof"
    here = Path(sys.executable).with_name("sparkproof")
    if here.exists():
        relative = os.path.relpath(here)
        return relative if not relative.startswith("../..") else str(here)
    return "python -m sparkproof"


def rerun_command(name: str, settings: Settings) -> str:
    """The exact command that runs one case again."""
    parts = [program(), "validate", shlex.quote(name)]
    for fields in settings.overrides.values():
        for key in ("model", "revision", "model_dir", "steps"):
            if key in fields:
                parts.append(f"--{key.replace('_', '-')} {shlex.quote(str(fields[key]))}")
    return " ".join(parts)
