"""Planted faults: each is put into a copy of the op's file, and the judge must find it.

A mutant counts as killed only by a failed check. One whose text no longer occurs exactly once, that does not load, or
that fails by a mistake in the planting (a name that does not exist) is an error of the table, never a kill; and the
untouched file, loaded the same way, must pass first, or kills would mean nothing.

Each mutant is tried in a fork: interpreted kernels write through bare pointers, so one that goes past a tensor's end spoils the
process, and the next mutant would fail, or all of it crash, for that. A mutant whose own process crashes is found.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from sparktune.ops.spec import Mutant, OpSpec

from sparkproof.judge.correctness import judge
from sparkproof.judge.peers import Bounds
from sparkproof.judge.record import Check, Judgement

TABLE = "\nMUTANTS = "
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
PLANTING_ERRORS = ("NameError", "AttributeError", "SyntaxError", "UnboundLocalError", "CompilationError")


class MutantError(Exception):
    """A table of mutants that proves nothing, with the sentence that says why."""


@dataclass(frozen=True)
class Trial:
    """How one mutant fared."""

    id: str
    description: str
    killed: bool
    by: str  # the check that found it, or why none did
    seconds: float
    passes: list[str] = field(default_factory=list)  # the peers whose published bounds it stays within


def source_of(spec: OpSpec, file: str = "") -> str:
    """The text of the op's file, or of another file of the ops."""
    module = importlib.import_module(f"sparktune.ops.{file or spec.name}")
    return Path(str(module.__file__)).read_text(encoding="utf-8")


def apply(source: str, mutant: Mutant, op: str) -> str:
    """`source` with the mutant in. Errors: MutantError unless its text occurs exactly once above the table."""
    head, mark, table = source.partition(TABLE)
    count = head.count(mutant.old)
    if count != 1:
        raise MutantError(
            f"{op}: mutant {mutant.id} edits text that occurs {count} times, not once: {mutant.old!r}. "
            "Bring the table up to date with the kernel."
        )
    if mutant.new == mutant.old:
        raise MutantError(f"{op}: mutant {mutant.id} changes nothing")
    return head.replace(mutant.old, mutant.new) + mark + table


@contextlib.contextmanager
def loaded(source: str, op: str, label: str, helper: str = "", helper_source: str = "") -> Iterator[OpSpec]:
    """The spec of a module made from `source`: a real file, since Triton reads a kernel's text back from disk.

    `helper`: a file that the op imports, to be made from `helper_source` for this module alone.
    """
    suffix = label.replace("-", "_")
    with tempfile.TemporaryDirectory(prefix="sparkproof-mutant-") as folder, contextlib.ExitStack() as undo:
        if helper:
            original, name = f"from sparktune.ops.{helper} import", f"sparktune_mutant_{helper}_for_{op}_{suffix}"
            if original not in source:
                raise MutantError(f"{op}: mutant {label} is planted in {helper}.py, which {op}.py does not import from")
            _module(name, helper_source, Path(folder), op, label, undo)
            source = source.replace(original, f"from {name} import")
        yield _module(f"sparktune_mutant_{op}_{suffix}", source, Path(folder), op, label, undo).OP


def _module(name: str, source: str, folder: Path, op: str, label: str, undo: contextlib.ExitStack) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    info = importlib.util.spec_from_file_location(name, path)
    assert info is not None and info.loader is not None
    module: ModuleType = importlib.util.module_from_spec(info)
    sys.modules[name] = module
    undo.callback(sys.modules.pop, name, None)
    try:
        info.loader.exec_module(module)
    except Exception as e:
        raise MutantError(f"{op}: mutant {label} does not load: {type(e).__name__}: {e}") from e
    return module


def try_mutants(
    spec: OpSpec, *, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32), source: str = "",
    bounds: Bounds | None = None,
) -> list[Trial]:  # fmt: skip
    """Judge every mutant of `spec`, each until its first failed check. Errors: MutantError, see above.

    `bounds` takes up the peers' tests of the op; every mutant is then held to these too.
    """
    source = source or source_of(spec)
    # A stale table is found before any work.
    mutated = [(m, apply(source_of(spec, m.file) if m.file else source, m, spec.name)) for m in spec.mutants]
    with loaded(source, spec.name, "control") as control:
        failures = judge(spec, tested=control, dtypes=dtypes, stop_at_first=True).failures
        if bounds is not None and not failures:
            bounds.admit(control)
    if failures:
        raise MutantError(f"{spec.name} fails unmutated, so kills would mean nothing: {failures[0].sentence()}")
    return [
        apart(m, spec.name, lambda m=m, text=text: _try(spec, m, source, text, dtypes, bounds))  # type: ignore[misc]
        for m, text in mutated
    ]


def apart(mutant: Mutant, op: str, work: Callable[[], Trial]) -> Trial:
    """What `work` returns or raises as MutantError, in a fork; a kill where that crashes.

    A fork may run backward passes after its parent has, since there is no GPU: autograd starts no threads then. Errors:
    MutantError, its own or that its process ended without a result.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        try:
            theirs.send(work())
        except MutantError as e:
            theirs.send(e)

    start, process = time.perf_counter(), context.Process(target=run)
    process.start()
    theirs.close()
    found: Trial | MutantError | None = None
    with contextlib.suppress(EOFError):
        found = ours.recv()
    process.join()
    if isinstance(found, Trial):
        return found
    if found is not None:
        raise found
    code = process.exitcode or 0
    if -code not in CRASHES:  # the machine's doing, such as a kill for want of memory, proves nothing
        raise MutantError(f"{op}: trying mutant {mutant.id} ended with exit code {code} and no result")
    by = f"its process died: {signal.Signals(-code).name}"
    return Trial(mutant.id, mutant.description, True, by, time.perf_counter() - start)


def _try(
    spec: OpSpec, mutant: Mutant, source: str, text: str, dtypes: Sequence[torch.dtype], bounds: Bounds | None
) -> Trial:
    start = time.perf_counter()
    parts = (source, spec.name, mutant.id, mutant.file, text) if mutant.file else (text, spec.name, mutant.id)
    with loaded(*parts) as tested:
        judgement = judge(spec, tested=tested, dtypes=dtypes, stop_at_first=True)
        seconds = time.perf_counter() - start
        check = judgement.failures[0] if judgement.failures else None
        if check is not None:
            _refuse_planting_error(spec, mutant, judgement, check)
        passes = bounds.let_pass(tested) if bounds is not None else []
    by = "every check held" if check is None else check.sentence()
    return Trial(mutant.id, mutant.description, check is not None, by, seconds, passes)


def _refuse_planting_error(spec: OpSpec, mutant: Mutant, judgement: Judgement, check: Check) -> None:
    seen = f"{type(judgement.error).__name__}: {judgement.error}" if judgement.error else ""
    if any(name in seen for name in PLANTING_ERRORS):
        raise MutantError(f"{spec.name}: mutant {mutant.id} is a mistake in the planting, not a fault: {check.detail}")
