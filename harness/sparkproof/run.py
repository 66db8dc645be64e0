"""`sparkproof validate` from request to exit code: facts, selection, one pytest session, record, views, verdict."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparkproof import catalog, plugin
from sparkproof.controller import Controller, default_profile
from sparkproof.errors import UserError
from sparkproof.facts.collect import collect, load
from sparkproof.facts.model import Facts
from sparkproof.facts.place import RunsIn
from sparkproof.match import unmet
from sparkproof.measure.exclusive import only_run
from sparkproof.measure.memory import default_floor_gib
from sparkproof.profiles import load_profile
from sparkproof.report import record as records
from sparkproof.report.views import write_all
from sparkproof.rollback import manifest
from sparkproof.scenario import Case, EngineName, Profile, TrainScenario
from sparkproof.session import RunSession, Settings

# Plugins that a run loads besides its own: names of modules or entry points, for those who embed it.
EXTRA_PLUGINS: list[str] = []


@dataclass
class Request:
    """What the command line asked for."""

    names: list[str] = field(default_factory=list)
    profile: Profile | None = None
    kinds: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    engine: str = ""
    model: str = ""
    revision: str = ""
    model_dir: Path | None = None
    steps: int = 0
    resume: str = ""
    reports: Path = Path("reports")
    scenarios: Path | None = None
    workers: int | None = None
    memory_floor_gib: float | None = None
    strict: bool = False
    facts: Path | None = None
    wait: bool = False
    runs_in: RunsIn | None = None  # decided by whoever asked; None: as this process's surroundings say
    opening: str = ""  # said once the request is known to be right, so that a wrong word's error comes first

    def overrides(self) -> dict[str, dict[str, Any]]:
        """Fields of training scenarios that the command line sets."""
        fields: dict[str, Any] = {}
        if self.model:
            fields["model"] = self.model
            fields["revision"] = self.revision or ("main" if "/" in self.model else "")
        if self.model_dir is not None:
            fields["model_dir"] = str(self.model_dir.expanduser().resolve())
        if self.steps:
            fields["steps"] = self.steps
        return {"train": fields} if fields else {}


def select(request: Request, root: Path, profile: Profile) -> tuple[catalog.Catalog, list[Case]]:
    """The cases that a request means. Errors: UserError for unknown names, kinds and engines, or when nothing is left."""
    for kind in request.kinds:
        if kind not in catalog.KIND_ORDER:
            raise UserError(f"Unknown kind '{kind}'.", catalog.nearest(kind, catalog.KIND_ORDER))
    engines = list(EngineName.__args__)  # type: ignore[attr-defined]
    if request.engine and request.engine not in engines:
        raise UserError(f"Unknown engine '{request.engine}'.", catalog.nearest(request.engine, engines))
    found = catalog.load(root, request.overrides())
    known_tags = sorted({t for c in found.cases.values() for t in c.scenario.tags})
    for tag in request.tags:
        if tag not in known_tags:
            raise UserError(f"No scenario has the tag '{tag}'.", catalog.nearest(tag, known_tags))
    cases = found.select(profile=profile, patterns=request.names, kinds=request.kinds, tags=request.tags)
    if request.engine:
        cases = [c for c in cases if getattr(c.scenario, "engine", None) == request.engine]
    if request.model_dir is not None:
        _one_model_for_one(request.model_dir, cases)
    if not cases and not found.problems:
        raise UserError("Nothing is selected.", "`sparkproof list` shows every case and its profile.")
    return found, cases


def _one_model_for_one(model_dir: Path, cases: list[Case]) -> None:
    """A folder that is one model can stand in for one. Errors: UserError for more, or for no folder."""
    from sparkproof.engines.pretrained import is_hub_id, stand_in

    wanted = sorted(
        {c.scenario.model for c in cases if isinstance(c.scenario, TrainScenario) and is_hub_id(c.scenario.model)}
    )
    stand_in("owner/name", str(model_dir))
    if len(wanted) > 1 and (model_dir / "config.json").is_file():
        raise UserError(
            f"{model_dir} is one model, and the cases selected train {len(wanted)}: {', '.join(wanted)}.",
            "Name one scenario, or give the folder above it, which holds each under its own name.",
        )


def dry_run(request: Request) -> int:
    """Say what would run and what would be skipped and why; run nothing."""
    facts = load(request.facts) if request.facts else collect(trials=False)
    root = catalog.scenarios_root(request.scenarios)
    profile = request.profile or default_profile(facts)
    found, cases = select(request, root, profile)
    console = Console()
    if request.opening:
        console.print(escape(request.opening), highlight=False, soft_wrap=True)
    console.print(f"{escape(facts.device_sentence())}; profile {profile.value}")
    table = Table("case", "would", "why", box=None, pad_edge=False)
    skipped = 0
    for case in cases:
        lacking = unmet(case.scenario.requires, facts)
        skipped += bool(lacking)
        why = f"{lacking[0].value}: {lacking[1]}" if lacking else ""
        table.add_row(escape(case.name), "be skipped" if lacking else "run", escape(why))
    console.print(table)
    for p in found.problems:
        console.print(f"[red]wrong:[/red] {escape(str(p))}")
    console.print(
        f"{len(cases) - skipped} would run, {skipped} would be skipped, {len(found.problems)} files are wrong."
    )
    return 2 if found.problems else 0


def validate(request: Request) -> int:
    """Run it. Returns the exit code: 0, 1, 2, 3, or 130 after Ctrl-C."""
    if request.facts:
        raise UserError("--facts goes with --dry-run.", "A real run reads this machine's own facts.")
    signal.signal(signal.SIGTERM, terminate)
    with only_run("sparkproof validate", wait=request.wait):
        _preflight_model(request)
        console = Console(stderr=True)
        trials = bool(request.resume) or _judges_machine(request)
        with console.status("reading this machine ...") if console.is_terminal else nullcontext():
            facts = collect(trials=trials)
        if request.runs_in is not None:
            facts.runs_in = request.runs_in
        controller = resume(request, facts) if request.resume else start(request, facts)
        if request.opening:
            console.print(escape(request.opening), highlight=False, soft_wrap=True)
        return execute(controller, default_workers(facts) if request.workers is None else request.workers)


def _judges_machine(request: Request) -> bool:
    """Whether environment cases are among those selected: only they need what is tried for Facts, which takes time."""
    _, cases = select(request, catalog.scenarios_root(request.scenarios), request.profile or Profile.SOAK)
    return any(c.kind == "environment" for c in cases)


def default_workers(facts: Facts) -> int:
    """Processes for the cases: four on a GPU machine with 8 cores or more, else two where there are two cores.

    Most of a kernel case is compiling or interpreting in one thread; on an H100 with 16 cores four keep `quick` inside its
    ten minutes, on 2 cores without a GPU two take `smoke` from 11 minutes to 9. A timed case has the machine to itself.
    """
    cores = facts.cpu.cores or 1
    on_gpu = facts.gpu is not None and bool(facts.gpu.usable_by_torch)
    return 4 if on_gpu and cores >= 8 else min(2, cores)


def _preflight_model(request: Request) -> None:
    """A model named on the command line is fetched first, so that a wrong name costs seconds and not a run."""
    if request.model:
        from sparkproof.engines.pretrained import resolve
        from sparkproof.session import default_cache_dir

        resolve(request.model, request.overrides()["train"]["revision"], default_cache_dir())


def start(request: Request, facts: Facts) -> Controller:
    """A new run."""
    root = catalog.scenarios_root(request.scenarios)
    profile = request.profile or default_profile(facts)
    found, cases = select(request, root, profile)
    new_reports = not request.reports.exists()
    whole = not (request.names or request.kinds or request.tags or request.engine)
    settings = Settings(
        run_dir=records.new_run_dir(request.reports),
        scenarios=root,
        profile=profile,
        selected=None if whole else [c.name for c in cases],
        overrides=request.overrides(),
        memory_floor_gib=request.memory_floor_gib or default_floor_gib(facts.memory.total_gib),
        strict=request.strict,
        facts=facts,
    )
    _own(request.reports if new_reports else None)
    controller = Controller.live(RunSession(settings), load_profile(root, profile))
    controller.announce(cases, found.problems)
    return controller


def _own(reports: Path | None) -> None:
    """List what is ours on this machine: a reports folder made just now, and the environment that `make` made."""
    with suppress(OSError):
        if reports is not None:
            manifest.add(reports, "reports")
    manifest.add_own_environment()


def resume(request: Request, facts: Facts) -> Controller:
    """Go on with an earlier run: only cases without a result, or whose scenario changed, run."""
    run_dir = records.find_run(request.resume, request.reports)
    recorder, before = records.Recorder.resume(run_dir, facts)
    root = catalog.scenarios_root(request.scenarios)
    found = catalog.load(root, request.overrides())
    missing = [n for n in before.to_run({c.name: catalog.digest(c) for c in found.cases.values()}) if n in found.cases]
    settings = Settings(
        run_dir=run_dir,
        scenarios=root,
        profile=before.profile,
        selected=missing,
        overrides=request.overrides(),
        memory_floor_gib=request.memory_floor_gib or default_floor_gib(facts.memory.total_gib),
        strict=request.strict or before.strict,
        facts=facts,
    )
    controller = Controller.live(RunSession(settings), load_profile(root, before.profile), recorder, before)
    controller.announce([found.cases[n] for n in missing], found.problems)
    return controller


def execute(controller: Controller, workers: int) -> int:
    """One pytest session over the scenarios, silent but for our own reporter; always ends with a closed record."""
    if not controller.expected:
        return controller.finish()
    root = controller.session.settings.scenarios.resolve()
    arguments = [
        str(root),
        "-c", str(_empty_ini(controller)),
        f"--rootdir={root.parent}",
        "-p", "no:cacheprovider",
        "--capture=no",
        "--continue-on-collection-errors",
        "-p", "no:terminal",  # the run has a reporter of its own, and two would interleave
        "-p", "sparkproof.plugin",
        *(argument for plugin in EXTRA_PLUGINS for argument in ("-p", plugin)),
    ]  # fmt: skip
    # Other plugins of this Python (benchmark, cov, ...) would print into a run, or change it.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if workers > 1:
        arguments += ["-p", "xdist", "-n", str(workers), "--dist", "loadgroup"]
    guest = Guest(controller)
    code = int(pytest.main(arguments, plugins=[guest]))
    if controller.exit_code is None:  # pytest ended before its sessionfinish: what was measured is closed all the same
        controller.interrupted = controller.interrupted or code == pytest.ExitCode.INTERRUPTED
        controller.finish()
    if controller.fatal is not None:
        raise controller.fatal
    if guest.internal_error:
        print(f"error: pytest failed inside: {guest.internal_error}", file=sys.stderr)
        return 2
    assert controller.exit_code is not None
    return controller.exit_code


class Guest:
    """A plugin of this one pytest session: brings the controller, and keeps what pytest would have printed."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.internal_error = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Adopt the run before anything is collected."""
        plugin.adopt(config, self.controller)

    def pytest_internalerror(self, excrepr: Any) -> None:
        """Keep what pytest would have printed."""
        self.internal_error = str(excrepr).strip().splitlines()[-1]


def _empty_ini(controller: Controller) -> Path:
    """A configuration of our own, so that no pytest.ini or pyproject.toml nearby changes how a run behaves."""
    path = controller.session.settings.run_dir / "pytest.ini"
    path.write_text("[pytest]\n", encoding="utf-8")
    return path


def terminate(number: int, frame: FrameType | None) -> None:
    """A polite kill ends a run as Ctrl-C does: with a record, views and exit code 130."""
    raise KeyboardInterrupt


def report(which: str, reports: Path, json_out: bool) -> int:
    """Rebuild the views of a run; say where they are and what the run found."""
    run_dir = records.find_run(which, reports)
    record = records.load(run_dir)
    paths = write_all(record, run_dir)
    if json_out:
        print(paths["report.json"].read_text(encoding="utf-8"))
    else:
        for path in paths.values():
            print(path)
        print(record.sentence)
    return 0
