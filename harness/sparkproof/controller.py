"""The one process of a run that records, reports and decides the exit code."""

from __future__ import annotations

from pathlib import Path

from sparkproof import catalog
from sparkproof.errors import UserError
from sparkproof.facts.collect import collect
from sparkproof.facts.model import Facts
from sparkproof.profiles import ProfileSpec, load_profile
from sparkproof.report import record as records
from sparkproof.report.terminal import LiveReporter
from sparkproof.report.views import write_all
from sparkproof.results import CaseResult, Verdict
from sparkproof.scenario import Case, Profile
from sparkproof.session import RunSession, Settings, rerun_command


def default_profile(facts: Facts) -> Profile:
    """quick where torch can use a GPU, smoke elsewhere."""
    return Profile.QUICK if facts.gpu is not None and facts.gpu.usable_by_torch else Profile.SMOKE


class Controller:
    """Holds a run's session, recorder and reporter."""

    def __init__(
        self,
        session: RunSession,
        spec: ProfileSpec,
        reporter: LiveReporter | None,
        recorder: records.Recorder | None = None,
        before: records.RunRecord | None = None,
    ) -> None:
        self.session = session
        self.spec = spec
        self.reporter = reporter
        self.recorder = recorder
        self.before = before
        self.planned: list[str] = []
        self.expected = 0
        self.interrupted = False
        self.fatal: UserError | None = None
        self.exit_code: int | None = None
        self.closing = ""

    @classmethod
    def open(
        cls, reports: Path, scenarios: Path, profile: Profile | None, strict: bool, trials: bool = True
    ) -> Controller:
        """A new run for a plain pytest call: pytest's own terminal output, our record and views.

        `trials=False` where no environment case is asked for: it leaves out what only those judge.
        """
        facts = collect(trials=trials)
        chosen = profile or default_profile(facts)
        settings = Settings(
            run_dir=records.new_run_dir(reports), scenarios=scenarios, profile=chosen, strict=strict, facts=facts
        )
        return cls(RunSession(settings), load_profile(scenarios, chosen), None)

    @classmethod
    def live(
        cls,
        session: RunSession,
        spec: ProfileSpec,
        recorder: records.Recorder | None = None,
        before: records.RunRecord | None = None,
    ) -> Controller:
        """A run with the live reporter; `recorder` and `before` when it resumes an earlier one."""
        return cls(session, spec, LiveReporter(), recorder, before)

    def announce(self, cases: list[Case], problems: list[catalog.Problem]) -> None:
        """Say what is about to happen."""
        self.expected = len(cases) + len(problems)
        if self.reporter:
            settings = self.session.settings
            self.reporter.start(
                total=self.expected,
                facts_sentence=settings.facts.device_sentence(),
                profile=settings.profile.value,
                summary=self.spec.summary,
                run_dir=settings.run_dir,
                time_box_minutes=self.spec.time_box_minutes,
            )
            self.session.context.progress = self.reporter.progress

    def plan(self, names: list[str]) -> None:
        """Open the record with what is planned; a resumed one goes on."""
        self.planned = names
        settings = self.session.settings
        if self.recorder is None:
            every = self.session.catalog.cases
            cases = [every[n] for n in names if n in every]
            required = {c.name for c in every.values() if c.scenario.profile.level <= settings.profile.level}
            self.recorder = records.Recorder.create(
                settings.run_dir,
                profile=settings.profile,
                planned=[
                    records.Planned(name=c.name, kind=c.kind, file=c.file, digest=catalog.digest(c)) for c in cases
                ],
                facts=settings.facts,
                strict=settings.strict,
                mode="profile" if required == {c.name for c in cases} and not settings.overrides else "selection",
            )

    def started(self, name: str) -> None:
        """A case begins."""
        if self.reporter:
            self.reporter.case_started(name)

    def ended(self, result: CaseResult) -> None:
        """Record first, then show. Errors: UserError when the record can't be written."""
        assert self.recorder is not None
        case = self.session.catalog.cases.get(result.name)
        self.recorder.append(result, catalog.digest(case) if case else "")
        if self.reporter:
            self.reporter.case_finished(result)

    def lost(self, name: str, text: str) -> None:
        """A case whose process died under pytest-xdist: no result came back."""
        case = self.session.catalog.cases.get(name)
        self.ended(
            CaseResult(
                name=name,
                kind=case.kind if case else "scenario",
                verdict=Verdict.BROKEN,
                reason="The worker process that ran this case died before it could report.",
                next_step="Run it alone to see why.",
                output_tail=text[-4000:],
                rerun=rerun_command(name, self.session.settings),
            )
        )

    def finish(self) -> int:
        """Close the record, write every view, show the end; safe to call again."""
        if self.exit_code is not None:
            return self.exit_code
        settings = self.session.settings
        if self.recorder is None:
            self.plan([])
        assert self.recorder is not None
        try:
            self.recorder.end(interrupted=self.interrupted)
        except UserError as e:
            self.fatal = self.fatal or e
        record = records.load(settings.run_dir)
        self.exit_code = 130 if self.interrupted else record.exit_code
        try:
            write_all(record, settings.run_dir)
            records.point_latest(settings.run_dir)
        except UserError as e:
            self.fatal = self.fatal or e
        self.closing = f"{record.sentence}\nReport: {settings.run_dir / 'report.html'}"
        if self.reporter:
            self.reporter.finish(record)
        return self.exit_code
