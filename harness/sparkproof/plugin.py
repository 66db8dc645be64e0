"""Scenarios as pytest items: `pytest scenarios/` with -k, -m, -n and --junitxml, and the engine under `sparkproof validate`.

The controller alone records and reports; with pytest-xdist its workers only run cases and send each result back inside
pytest's own report. A verdict that pytest has no word for (broken, retest) is a failure there, and the session's exit
code follows `results.exit_code`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

from sparkproof import catalog
from sparkproof.checks.catalogue import TOPICS
from sparkproof.controller import Controller
from sparkproof.errors import UserError
from sparkproof.results import CaseResult, Verdict
from sparkproof.scenario import KINDS, Case, Profile
from sparkproof.session import RunSession, Settings, broken_file

CONTROLLER: pytest.StashKey[Controller] = pytest.StashKey()
SESSION: pytest.StashKey[RunSession] = pytest.StashKey()
ATTRIBUTE = "sparkproof_result"


class CaseFailed(Exception):
    """Carries a result that is neither passed nor skipped through pytest."""

    def __init__(self, result: CaseResult) -> None:
        super().__init__(result.reason)
        self.result = result


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for those who call pytest themselves; `sparkproof validate` sets the same things."""
    group = parser.getgroup("sparkproof", "sparkproof scenarios")
    group.addoption(
        "--profile",
        choices=[p.value for p in Profile],
        help="scenarios of this profile (default: smoke, or quick with a GPU)",
    )
    group.addoption("--reports", default="reports", help="folder for the run's reports (default: reports)")
    group.addoption("--strict-verdict", action="store_true", help="a skipped case fails the run")


def _has_scenarios(config: pytest.Config) -> bool:
    return any("scenarios" in Path(str(a).split("::")[0]).resolve().parts for a in config.args)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks that scenarios use; in an xdist worker, take over the controller's settings."""
    config.addinivalue_line("markers", "xdist_group: cases that run one after another in one worker")
    for mark in (*KINDS, *Profile):
        config.addinivalue_line("markers", f"{mark}: scenarios of this kind or profile")
    given = getattr(config, "workerinput", {}).get("sparkproof")
    if given:
        config.stash[SESSION] = RunSession(Settings.model_validate_json(given))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """In the controller of a plain `pytest scenarios/` call, open a run; `validate` has opened its own."""
    config = session.config
    if SESSION in config.stash or not _has_scenarios(config) or config.option.collectonly:
        return
    first = Path(str(config.args[0]).split("::")[0]).resolve()
    root = next(p for p in (first, *first.parents) if p.name == "scenarios")
    try:
        controller = Controller.open(
            reports=Path(config.getoption("--reports")),
            scenarios=root,
            profile=Profile(config.getoption("--profile")) if config.getoption("--profile") else None,
            strict=config.getoption("--strict-verdict"),
            trials=_judges_machine(config, root),
        )
    except UserError as e:
        raise pytest.UsageError(str(e)) from None
    adopt(config, controller)


def _judges_machine(config: pytest.Config, root: Path) -> bool:
    """Whether environment cases may be among those asked for, by the paths and the words of -k: only they need trials."""
    environment = root / "environment"
    paths = [Path(str(a).split("::")[0]).resolve() for a in config.args]
    near = any(p.is_relative_to(environment) or environment.is_relative_to(p) for p in paths)
    words = set(re.findall(r"\w+", config.option.keyword or ""))
    return near and (not words or bool(words & {*TOPICS, "environment", "not"}))


def adopt(config: pytest.Config, controller: Controller) -> None:
    """Make `controller` the one that records this pytest session."""
    config.stash[CONTROLLER] = controller
    config.stash[SESSION] = controller.session


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Hand the settings to an xdist worker."""
    if CONTROLLER in node.config.stash:
        node.workerinput["sparkproof"] = node.config.stash[CONTROLLER].session.settings.model_dump_json()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """YAML files under a folder named scenarios, or under the run's own root, hold scenarios."""
    if file_path.suffix not in (".yaml", ".yml"):
        return None
    session = parent.config.stash.get(SESSION, None)
    roots = [session.settings.scenarios.resolve()] if session else []
    roots += [p for p in file_path.parents if p.name == "scenarios"]
    root = next((r for r in roots if file_path.is_relative_to(r)), None)
    if root is None or catalog.NOT_SCENARIOS in file_path.relative_to(root).parts:
        return None
    return ScenarioFile.from_parent(parent, path=file_path, root=root)


class ScenarioFile(pytest.File):
    """One YAML file: an item for each case of its matrix, or one for each thing wrong with it."""

    def __init__(self, *, root: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root

    def collect(self) -> Iterable[pytest.Item]:
        """Yield the file's items."""
        session = self.config.stash.get(SESSION, None)
        overrides = session.settings.overrides if session else None
        cases, problems = catalog.load_file(self.path, self.root, overrides)
        for case in cases:
            yield ScenarioItem.from_parent(self, name=case.name, case=case)
        for problem in problems:
            yield ScenarioItem.from_parent(self, name=f"line {problem.line}: {problem.key}", problem=problem)


class ScenarioItem(pytest.Item):
    """One case, or one problem of a scenario file."""

    def __init__(self, *, case: Case | None = None, problem: catalog.Problem | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case = case
        self.problem = problem
        self.result: CaseResult | None = None
        if case is not None:
            for mark in (case.kind, case.scenario.profile.value, *case.scenario.tags):
                self.config.addinivalue_line("markers", f"{mark}: scenarios with this tag")
                self.add_marker(getattr(pytest.mark, mark))
            # with `--dist loadgroup` an export runs in the worker that trains its source, after it
            source = getattr(case.scenario, "source", case.name if case.kind == "train" else "")
            if source:
                self.add_marker(pytest.mark.xdist_group(source))

    def runtest(self) -> None:
        """Run the case and turn its verdict into pytest's."""
        if self.problem is not None:
            self.result = broken_file(self.problem)
        else:
            assert self.case is not None
            self.result = self.config.stash[SESSION].run(self.case)
        for m in self.result.measurements:
            self.user_properties.append((f"{m.name} ({m.unit})", m.value))
        if self.result.verdict is Verdict.SKIPPED:
            reason = self.result.reason_class
            pytest.skip(f"{reason.value if reason else ''}: {self.result.reason}")
        if self.result.verdict is not Verdict.PASSED:
            raise CaseFailed(self.result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """A failure for people: what, why, what next, how to run it again."""
        if not isinstance(excinfo.value, CaseFailed):
            return str(super().repr_failure(excinfo, style))
        r = excinfo.value.result
        lines = [f"{r.verdict.value}: {r.reason}"]
        lines += [f"next step: {r.next_step}"] if r.next_step else []
        lines += [f"last output:\n{r.output_tail}"] if r.output_tail else []
        lines += [f"run again: {r.rerun}"] if r.rerun else []
        return "\n".join(lines)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Where pytest says it is."""
        return self.path, (self.problem.line - 1 if self.problem else 0), self.name


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what the profile or the selection asks for, in the order of dependence: environment ... train, export."""
    session = config.stash.get(SESSION, None)
    ours = [i for i in items if isinstance(i, ScenarioItem)]
    if not ours:
        return
    if session:
        dropped = [i for i in ours if i.case is not None and not session.wanted(i.case)]
        if session.settings.selected is not None:
            chosen = {session.catalog.cases[n].file for n in session.settings.selected if n in session.catalog.cases}
            whole = chosen == {c.file for c in session.catalog.cases.values()}
            dropped += [i for i in ours if i.problem is not None and not whole and i.problem.file not in chosen]
        config.hook.pytest_deselected(items=dropped)
        gone = set(map(id, dropped))
        items[:] = [i for i in items if id(i) not in gone]
    place = {id(i): n for n, i in enumerate(items)}

    def order(item: pytest.Item) -> tuple[int, int]:
        kind = item.case.kind if isinstance(item, ScenarioItem) and item.case else ""
        return (catalog.KIND_ORDER.index(kind) if kind in catalog.KIND_ORDER else -1, place[id(item)])

    items.sort(key=order)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell the record what is planned (under xdist the workers' first collection does)."""
    controller = session.config.stash.get(CONTROLLER, None)
    names = [i.name for i in session.items if isinstance(i, ScenarioItem)]
    if controller and names and not session.config.option.collectonly:
        controller.plan(names)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """The same, from the first worker that has collected."""
    controller = node.config.stash.get(CONTROLLER, None)
    if controller and not controller.planned:
        controller.plan([case_name(i) for i in ids if "::" in i and ".y" in i.split("::")[0]])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the result into the report, which is what crosses from an xdist worker to the controller."""
    report = yield
    if call.when == "call" and isinstance(item, ScenarioItem) and item.result is not None:
        setattr(report, ATTRIBUTE, item.result.model_dump_json())
        if item.result.output_tail:
            report.sections.append(("Captured output", item.result.output_tail))
    return report


def case_name(nodeid: str) -> str:
    """The case in a node id: what stands behind ::, without the group that `--dist loadgroup` appends."""
    name = nodeid.split("::", 1)[-1]
    base, at, group = name.rpartition("@")
    return base if at and "/" in group else name


class ControllerHooks:
    """Hooks that only the controller needs; registered when there is one."""

    def __init__(self, controller: Controller, session: pytest.Session) -> None:
        self.controller = controller
        self.session = session

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A case begins."""
        self.controller.started(case_name(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A case ended: record it before anything else happens."""
        body = getattr(report, ATTRIBUTE, None)
        name = case_name(report.nodeid)
        try:
            if body:
                self.controller.ended(CaseResult.model_validate(json.loads(body)))
            elif report.outcome == "failed" and ".y" in report.nodeid.split("::")[0]:
                self.controller.lost(name, str(report.longrepr))
        except UserError as e:
            self.controller.fatal = e
            self.session.shouldstop = str(e)

    def pytest_keyboard_interrupt(self) -> None:
        """Ctrl-C: what was measured stays."""
        self.controller.interrupted = True


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Register the controller's hooks just before the first case; running the loop is left to pytest or xdist."""
    controller = session.config.stash.get(CONTROLLER, None)
    if controller:
        session.config.pluginmanager.register(ControllerHooks(controller, session), "sparkproof-controller")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Close the record, write the views, and set the exit code by the verdicts."""
    controller = session.config.stash.get(CONTROLLER, None)
    if controller and controller.planned:
        session.exitstatus = controller.finish()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """For plain pytest calls: the sentence that matters, and where the report is."""
    controller = config.stash.get(CONTROLLER, None)
    if controller and controller.closing:
        terminalreporter.write_line(controller.closing)
