"""`junit.xml` in the dialect that GitLab and Jenkins read.

- failed is a `<failure>`; broken and retest are `<error>`s, since neither says that the device is at fault, and neither
  may turn a pipeline green; so is a planned case without a result. `type` tells them apart.
- skipped has the reason's class in its message, which is what both show.
- `classname` and `name` are unique together and stable; `time` is the duration of the case and nothing else: metrics
  are properties, with unit and direction in the name.
- Assertions, output and `[[ATTACHMENT|path]]` lines stand in the case's own `<system-out>`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from junitparser import Error, Failure, JUnitXml, Properties, Property, Skipped, TestCase, TestSuite

from sparkproof.report.runrecord import Planned, RunRecord
from sparkproof.report.words import clean, direction, held, number, one_line, why_skipped, with_unit
from sparkproof.results import CaseResult, Measurement, Verdict


def render(record: RunRecord) -> str:
    """`junit.xml` as text."""
    document = JUnitXml("sparkproof")
    files = {p.name: p.file for p in record.header.planned}
    taken: Counter[tuple[str, str]] = Counter()
    kinds: dict[str, list[CaseResult | Planned]] = {}
    for result in record.results:
        kinds.setdefault(result.kind, []).append(result)
    for planned in record.missing:
        kinds.setdefault(planned.kind, []).append(planned)
    for kind, items in kinds.items():
        suite = TestSuite(f"sparkproof.{_xml(kind)}")
        suite.timestamp = record.header.started.removesuffix("+00:00")
        for item in items:
            case = _planned(item) if isinstance(item, Planned) else _case(item, record.run_dir)
            folder, name = identity(item.name, taken)
            case.classname, case.name = f"sparkproof.{_xml(folder)}", _xml(name)
            if files.get(item.name):
                case._elem.set("file", _xml(files[item.name]))
            suite.add_testcase(case)
        for key, value in (
            ("device", record.facts.device_sentence()),
            ("place", record.facts.runs_in.sentence()),
            ("profile", record.profile.value),
            ("verdict", record.sentence),
            ("run", record.run_id),
            ("revision", record.header.revision),
        ):
            if value:
                suite.add_property(key, _xml(value))
        document.add_testsuite(suite)
    document.update_statistics()
    text = document.tostring()
    return (text.decode("utf-8") if isinstance(text, bytes) else text).rstrip() + "\n"


def identity(name: str, taken: Counter[tuple[str, str]]) -> tuple[str, str]:
    """`train/llama/8b[engine=hf]` -> ('train.llama', '8b[engine=hf]'); unique among `taken`."""
    path, bracket, matrix = name.partition("[")
    folder, _, last = path.rpartition("/")
    key = ((folder or "scenarios").replace(".", "_").replace("/", "."), last + bracket + matrix)
    taken[key] += 1
    return key if taken[key] == 1 else (key[0], f"{key[1]} #{taken[key]}")


def _case(result: CaseResult, run_dir: Path) -> TestCase:
    case = TestCase("", "", result.duration_s if math.isfinite(result.duration_s) else 0.0)
    _add_properties(case, _properties(result))
    message = one_line(result.reason) or result.verdict.value
    body = "\n".join(_body(result))
    ending: Any = None
    match result.verdict:
        case Verdict.SKIPPED:
            ending = Skipped(_xml(why_skipped(result)), result.reason_class.value if result.reason_class else "skipped")
        case Verdict.FAILED:
            ending = Failure(_xml(message), "failed")
        case Verdict.BROKEN | Verdict.RETEST:
            ending = Error(_xml(message), result.verdict.value)
    if ending is not None:
        if result.verdict is not Verdict.SKIPPED:
            ending.text = _xml(body)
        case.result = ending
    output = "\n".join(_output(result, run_dir))
    if output:
        case.system_out = _xml(output)
    return case


def _planned(planned: Planned) -> TestCase:
    case = TestCase("", "", 0.0)
    case.result = Error("No result: the run ended before this case did.", "missing")
    return case


def _body(result: CaseResult) -> Iterable[str]:
    """What a person needs who sees only this failure."""
    yield one_line(result.reason)
    if result.next_step:
        yield f"next step: {one_line(result.next_step)}"
    if result.rerun:
        yield f"run again: {one_line(result.rerun)}"
    for a in result.assertions:
        if not a.passed:
            yield f"did not hold: {one_line(a.name)}: {held(a)} {one_line(a.detail)}".rstrip()
    if result.traceback:
        yield clean(result.traceback)


def _output(result: CaseResult, run_dir: Path) -> Iterable[str]:
    for notice in result.notices:
        yield f"note: {one_line(notice)}"
    for a in result.assertions:
        yield f"{'held' if a.passed else 'did not hold'}: {one_line(a.name)}{': ' if held(a) else ''}{held(a)}"
    if result.output_tail:
        yield "last output:"
        yield clean(result.output_tail)
    for path in artifact_paths(result, run_dir).values():
        yield f"[[ATTACHMENT|{path}]]"


def artifact_paths(result: CaseResult, run_dir: Path) -> dict[str, Path]:
    """Files that a case left inside the run's folder and that are there: name -> path as a CI job sees it."""
    found = {}
    root = run_dir.resolve()
    for name, relative in result.artifacts.items():
        path = run_dir / relative
        if path.is_file() and path.resolve().is_relative_to(root) and "]" not in relative:
            here = Path.cwd()
            found[name] = path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path.resolve()
    return found


def _properties(result: CaseResult) -> Iterable[tuple[str, str]]:
    yield "verdict", result.verdict.value
    if result.reason_class:
        yield "reason_class", result.reason_class.value
    for key in ("mode", "started", "rerun"):
        if getattr(result, key):
            yield key, getattr(result, key)
    for m in result.measurements:
        yield _metric_name(m), repr(m.value) if math.isfinite(m.value) else number(m.value)
        if m.reference is not None:
            yield f"{_metric_name(m)}: {m.reference_name or 'reference'}", with_unit(m.reference, "")


def _metric_name(m: Measurement) -> str:
    return one_line(f"{m.name} ({', '.join(s for s in (m.unit, direction(m)) if s)})")


def _add_properties(case: TestCase, pairs: Iterable[tuple[str, str]]) -> None:
    properties = Properties()
    for key, value in pairs:
        properties.add_property(Property(_xml(key), _xml(str(value))))
    case.append(properties)


def _xml(text: str) -> str:
    """XML 1.0 forbids most control characters, escaped or not."""
    return clean(text)
