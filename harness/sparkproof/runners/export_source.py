"""Whose adapter an export case takes: a train case's, trained now if need be, or a tiny model's, taught one answer here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from sparkproof.catalog import nearest
from sparkproof.errors import UserError
from sparkproof.runners.base import Context
from sparkproof.runners.export_formats import FORMATS, fits
from sparkproof.runners.export_teach import ANSWER, PROMPT
from sparkproof.runners.train import ensure_trained
from sparkproof.scenario import Case, ExportScenario, TrainScenario

Phase = Callable[[str, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """A fine-tuned model: its base, its adapter, and what only it knows."""

    model: str
    revision: str
    model_dir: str
    adapter: Path
    canary_prompt: str
    canary_answer: str


def check(case: Case, context: Context) -> None:
    """Errors: UserError when consumer and format don't match, or the source is none."""
    s = case.scenario
    assert isinstance(s, ExportScenario)
    if not fits(s.format, s.consumer):
        consumers = FORMATS[s.format].consumers
        raise UserError(
            f"{s.consumer} does not read {s.format}.", f"Write `consumer: {' or '.join(consumers)}` in {case.file}."
        )
    if not s.source.startswith("tiny:"):
        train_case(case, context)


def train_case(case: Case, context: Context) -> Case:
    """The train case that `source` names. Errors: UserError when there is none."""
    assert isinstance(case.scenario, ExportScenario)
    name = case.scenario.source
    source = context.cases.get(name)
    if source is None or source.kind != "train":
        known = [n for n, c in context.cases.items() if c.kind == "train"]
        raise UserError(f"{case.file} exports '{name}', which is no train case.", nearest(name, known))
    return source


def get(case: Case, context: Context, phase: Phase) -> Source:
    """The source, made once a run. Errors: UserError for a train case that did not pass; what `phase` raises."""
    scenario = case.scenario
    assert isinstance(scenario, ExportScenario)
    if not scenario.source.startswith("tiny:"):
        source = train_case(case, context)
        assert isinstance(source.scenario, TrainScenario)
        t = source.scenario
        adapter = ensure_trained(source, context)
        return Source(t.model, t.revision, t.model_dir, adapter, t.gate.canary_prompt, t.gate.canary_answer)
    key = hashlib.sha256(json.dumps([scenario.source, PROMPT, ANSWER]).encode()).hexdigest()[:16]
    folder = context.run_dir / "cases" / f"export-source-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "taught.json").is_file():  # written last
            payload = {"model": scenario.source, "cache_dir": str(context.cache_dir), "out": str(folder)}
            phase("teach", payload)
    return Source(scenario.source, "", "", folder, PROMPT, ANSWER)
