"""Runner of kind `rollback`: install a fine-tuning stack into a throwaway environment, use it, take it off, and see
what is left.

The environment, its HOME, its temporary folder and its working folder all lie inside the case's own folder. Before
the snapshot the "user" has things of their own there: a package, an older version of a dependency, files in caches.
They must survive.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from sparkproof.results import Assertion, CaseResult, Measurement
from sparkproof.rollback import snapshot, standin, undo
from sparkproof.rollback.diff import diff
from sparkproof.rollback.model import Snapshot
from sparkproof.rollback.parts import Diff, size
from sparkproof.rollback.steps import ASKED
from sparkproof.runners.base import Context
from sparkproof.runners.process import Outcome
from sparkproof.runners.rollback_sandbox import OLDER, OLDER_VERSION, Sandbox, StepFailed, prepare
from sparkproof.scenario import Case, RollbackScenario

PLAYBOOK = ("unsloth", "torch", "torchvision")  # what the playbook's clean-up names
REAL = ("unsloth==2026.10.7", "torch", "torchvision")


def run(case: Case, context: Context) -> CaseResult:
    """Run one rollback case. Errors: UserError (a skip) where Python cannot make environments."""
    scenario = case.scenario
    assert isinstance(scenario, RollbackScenario)
    result = CaseResult(name=case.name, kind=case.kind, verdict="broken", mode="host")  # type: ignore[arg-type]
    root = context.case_dir(case) / "machine"
    shutil.rmtree(root, ignore_errors=True)
    box = Sandbox(root, scenario.timeout_s)
    try:
        _run(case, scenario, context, box, result)
    except StepFailed as e:
        first, _, rest = str(e).partition("\n")
        result.assertions.append(Assertion(name="every step of the procedure ends well", passed=False, detail=first))
        result.output_tail = rest
        result.next_step = "Read the output of the step; with packages: real, a lost network looks like this."
    finally:
        context.progress("removing the throwaway environment")
        shutil.rmtree(root, ignore_errors=True)
    result.verdict, result.reason = CaseResult.decide(result.assertions)
    return result


def _run(case: Case, scenario: RollbackScenario, context: Context, box: Sandbox, result: CaseResult) -> None:
    offline = scenario.packages == "stand-in"
    context.progress("making a throwaway environment")
    survivors = prepare(box, offline)
    before = box.snapshot(offline)
    before_path = box.root / "snapshot.json"
    snapshot.save(before, before_path)

    context.progress(f"installing {', '.join(PLAYBOOK)} ({scenario.packages})")
    wanted = PLAYBOOK if offline else REAL
    box.pip("install", "--no-input", "-q", *wanted, offline=offline)
    used = use(case, context, box, offline)
    result.notices += [standin.summary()] if offline else [f"Real packages: {', '.join(REAL)}."]
    result.notices.append(
        f"Caches: {', '.join(used['ran']) or 'none'} by running it; laid out by hand: {', '.join(used['laid_out'])}. "
        f"{used['why']}".strip()
    )
    installed = diff(before, box.snapshot(offline))

    if scenario.procedure == "playbook":
        context.progress(f"pip uninstall -y {' '.join(PLAYBOOK)}")
        box.pip("uninstall", "-y", *PLAYBOOK, offline=offline)
    else:
        context.progress("sparkproof uninstall")
        _sparkproof(box, before, before_path, offline, context, result)
    after = box.snapshot(offline)
    left = diff(before, after)
    result.assertions += [_installed(installed)]
    result.assertions += judge(scenario, left)
    result.assertions += [_survived(survivors)] if scenario.procedure == "sparkproof" else []
    result.measurements += measure(installed, left, offline)
    result.evidence["left"] = left.text()
    result.evidence["leftovers"] = leftovers(left)
    if scenario.expect == "clean" and not left.is_empty:
        result.next_step = (
            "Look at what is left, and why, under `left` in the evidence."
            if scenario.procedure == "sparkproof"
            else "sparkproof snapshot before installing; sparkproof uninstall --include packages --include caches after."
        )


def use(case: Case, context: Context, box: Sandbox, offline: bool) -> dict[str, Any]:
    """Leave behind what use leaves behind, and a link out of a cache that nothing may follow."""
    context.progress("filling the caches as use does")
    outcome: Outcome = context.spawn(
        "sparkproof.runners.rollback_use:write",
        {"cwd": str(box.work), "triton": importlib.util.find_spec("triton") is not None},
        case=case,
        phase="use",
        timeout_s=120,
        env={"HOME": str(box.home), "TMPDIR": str(box.root / "tmp"), "USER": "user", "TRITON_HOME": str(box.home),
             "TRITON_CACHE_DIR": str(box.home / ".triton/cache"), "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    if outcome.status == "error" and not outcome.stage:
        raise RuntimeError(f"{outcome.sentence('filling the caches')}\n{outcome.traceback}")
    if outcome.status != "ok":
        raise StepFailed(f"{outcome.sentence('filling the caches')}\n{outcome.output_tail}")
    (box.home / ".cache/huggingface/hub/elsewhere").symlink_to(box.root / "outside")
    used = dict(outcome.result)
    if not offline:
        code = "import torch; print(torch.nn.Linear(8, 8)(torch.ones(2, 8)).sum().item())"
        box.run([str(box.venv / "bin" / "python"), "-c", code], box.env(offline))
        used["ran"] = [*used["ran"], "torch (imported, one layer)"]
    return used


def _sparkproof(
    box: Sandbox, before: Snapshot, path: Path, offline: bool, context: Context, result: CaseResult
) -> None:
    """Our way back: a dry run that must change nothing, the real one, and a second real one that must find nothing to
    do.
    """
    options: dict[str, Any] = {"include": ASKED, "ours": False, "env": box.env(offline)}
    then = box.snapshot(offline)
    dry = undo.uninstall(before, path, **options)
    untouched = diff(then, box.snapshot(offline))
    result.assertions.append(
        Assertion(
            name="a dry run changes nothing",
            passed=untouched.is_empty and bool(dry.plan.steps),
            value=len(dry.plan.steps),
            unit="steps planned",
            bound="> 0 planned, 0 differences",
            detail="" if untouched.is_empty else untouched.text(),
        )
    )
    done = undo.uninstall(before, path, yes=True, **options, progress=context.progress)
    result.evidence["uninstall"] = {
        "removed_entries": done.removed_entries,
        "removed_bytes": done.removed_bytes,
        "restored": done.restored,
        "left": [left.model_dump(mode="json") for left in done.left],
    }
    again = undo.uninstall(before, path, yes=True, **options)
    result.assertions += [
        Assertion(
            name="uninstall says that nothing is left",
            passed=done.exit_code == 0 and done.diff.is_empty and not done.left,
            value=len(done.left),
            unit="things",
            bound="0",
            detail="; ".join(f"{left.what}: {left.why}" for left in done.left[:3]),
        ),
        Assertion(
            name="the older version of a dependency is back",
            passed=any(r.startswith(f"{OLDER} {OLDER_VERSION}") for r in done.restored),
            value=", ".join(done.restored),
            bound=f"{OLDER} {OLDER_VERSION}",
        ),
        Assertion(
            name="a second uninstall finds nothing to do",
            passed=again.exit_code == 0 and not again.plan.steps,
            value=len(again.plan.steps),
            bound="0 steps",
        ),
    ]


def leftovers(left: Diff) -> dict[str, Any]:
    """The diff in numbers, for the record: counts, bytes and names by area."""
    orphaned = [i for p in left.of("python") for i in p.added if i.detail.startswith("orphaned")]
    caches = {
        p.place: {"files": len(p.added), "bytes": sum(i.bytes for i in p.added)} for p in left.of("caches") if p.added
    }
    return {
        "orphaned": [i.name for i in orphaned],
        "distributions": [i.name for p in left.of("python") for i in p.added],
        "changed": [f"{i.name} ({i.detail})" for p in left.of("python") for i in p.changed],
        "caches": caches,
    }


def judge(scenario: RollbackScenario, left: Diff) -> list[Assertion]:
    """Hold the diff against what the scenario expects."""
    differs = [p for p in left.parts if p.state != "equal"]
    if scenario.expect == "clean":
        detail = "" if left.is_empty else left.text()[:1500]
        return [
            Assertion(
                name="the diff against the snapshot is empty",
                passed=left.is_empty,
                value=len(differs),
                unit="parts that differ or are unknown",
                bound="0",
                detail=detail,
            )
        ]
    seen = leftovers(left)
    total = sum(c["bytes"] for c in seen["caches"].values())
    gone = {i.name.split()[0] for p in left.of("python") for i in p.added}.isdisjoint(PLAYBOOK)
    return [
        Assertion(name="what was named is uninstalled", passed=gone, bound=", ".join(PLAYBOOK)),
        Assertion(
            name="orphaned dependencies are left",
            passed=bool(seen["orphaned"]),
            value=len(seen["orphaned"]),
            unit="distributions",
            bound="> 0",
            detail=", ".join(seen["orphaned"][:8]),
        ),
        Assertion(
            name="caches are left",
            passed=total > 0,
            value=total,
            unit="B",
            bound="> 0",
            detail="; ".join(
                f"{Path(p).name}: {c['files']} files, {size(c['bytes'])}" for p, c in seen["caches"].items()
            ),
        ),
    ]


def _installed(installed: Diff) -> Assertion:
    """Without this a rollback of nothing would pass."""
    names = {i.name.split()[0] for p in installed.of("python") for i in p.added}
    grown = [p for p in installed.of("caches") if p.added]
    return Assertion(
        name="there was something to take off",
        passed=set(PLAYBOOK) <= names and len(grown) >= 4,
        value=len(names),
        unit="distributions",
        bound=f"{', '.join(PLAYBOOK)} among them, and at least 4 caches grown",
        detail=f"{len(grown)} caches grew",
    )


def _survived(files: dict[Path, bytes]) -> Assertion:
    lost = [str(p) for p, content in files.items() if not p.is_file() or p.read_bytes() != content]
    return Assertion(
        name="the user's own files and package survived",
        passed=not lost,
        value=len(files) - len(lost),
        unit="files",
        bound=f"all {len(files)}",
        detail=", ".join(lost),
    )


def measure(installed: Diff, left: Diff, offline: bool) -> list[Measurement]:
    """Counts and bytes, installed and left."""
    came, stayed = leftovers(installed), leftovers(left)
    rows = [
        ("distributions installed", len(came["distributions"]), "distributions", None),
        ("distributions left", len(stayed["distributions"]), "distributions", False),
        ("orphaned dependencies left", len(stayed["orphaned"]), "distributions", False),
        ("bytes left", left.added_bytes, "B", False),
    ]
    if offline:
        names = [i.name.split()[0] for p in left.of("python") for i in p.added]
        rows.append(("size of the real wheels of what is left", standin.real_bytes(names), "B", False))
    mode = {"packages": "stand-in" if offline else "real"}
    return [Measurement(name=n, value=v, unit=u, higher_is_better=b, conditions=mode) for n, v, u, b in rows]
