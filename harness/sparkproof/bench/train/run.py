"""The parent: one process after the other, engines taking turns in rounds, until all is measured or time is up."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparkproof.bench.document import EngineInfo
from sparkproof.bench.train import compare, engines
from sparkproof.bench.train.document import Document, EngineSteps, Floor, ModelSteps, Round
from sparkproof.bench.train.setting import NAMES, WORDS, Setting, Task, child_environment
from sparkproof.measure.memory import default_floor_gib
from sparkproof.runners.process import Outcome, run_process

TIMEOUT_S = (
    1800.0  # of one process: a whole model of billions of parameters compiles, warms up and steps well within it
)
COMMAND = [sys.executable, "-W", "ignore", "-m", "sparkproof.bench.train.worker"]
PACKAGE = {"hf": "transformers", "liger": "liger-kernel", "unsloth": "unsloth"}
Progress = Callable[[str], None]


class TimeUp(Exception):
    """No process may start any more."""


@dataclass
class Bench:
    """A run: what is measured, and how long processes may start."""

    settings: Sequence[Setting]
    names: Sequence[str] = NAMES
    sites: Mapping[str, list[str]] = field(default_factory=dict)
    rounds: int = 3
    budget: float = float("inf")
    progress: Progress = lambda line: None
    clock: Callable[[], float] = time.monotonic
    started: float = 0.0
    models: list[ModelSteps] = field(default_factory=list)
    prepared: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Document:
        """Measure; whatever ends it, what was measured is in the document."""
        self.started = self.clock()
        self.models = [
            ModelSteps(
                setting=s, optimizer=s.optimizer, useful_tflop=s.useful_tflop(),
                engines=[EngineSteps(name=n, status="not reached") for n in self.names],
            )
            for s in self.settings
        ]  # fmt: skip
        partial, interrupted = "", False
        with tempfile.TemporaryDirectory(prefix="sparkproof-bench-train-", ignore_cleanup_errors=True) as work:
            try:
                for m in self.models:
                    self._model(m, Path(work) / m.setting.model)
            except TimeUp:
                partial = f"the budget of {self.budget:.0f} s was used up"
            except KeyboardInterrupt:
                partial, interrupted = "it was interrupted", True
        return self._document(partial, interrupted)

    def _document(self, partial: str, interrupted: bool) -> Document:
        for m in self.models:
            for e in m.engines:
                if e.status == "not reached" and not e.rounds:
                    e.reason = e.reason or partial or "nothing could be measured"
            compare.finish(m)
        canary = compare.canary(self.models)
        cuda = all(s.device == "cuda" for s in self.settings)
        return Document(
            device=self.prepared.get("device", "unknown"), device_type="cuda" if cuda else "cpu",
            multiprocessors=self.prepared.get("multiprocessors", 0), memory_gib=self.prepared.get("memory_gib", 0.0),
            software=self.prepared.get("versions", {}), engines=[self._info(n) for n in self.names],
            sites=dict(self.sites), rounds=self.rounds, models=self.models, canary=canary,
            trusted=canary is not None and abs(canary.drift) <= canary.band, partial=partial, interrupted=interrupted,
            notes=self.notes, seconds=round(self.clock() - self.started, 1),
        )  # fmt: skip

    def _info(self, name: str) -> EngineInfo:
        found = [e for m in self.models for e in m.engines if e.name == name]
        versions = next((e.rounds[0].versions for e in found if e.rounds), {})
        missing = next((e.reason for e in found if e.status == "missing"), "")
        return EngineInfo(
            name=name, words=WORDS[name], version=versions.get(PACKAGE.get(name, ""), ""), missing=missing
        )

    def _model(self, m: ModelSteps, folder: Path) -> None:
        s = m.setting
        folder.mkdir()
        try:
            self.progress(f"{s.model}: writing a checkpoint of {s.layers} layers")
            outcome = self._process(Task(stage="prepare", setting=s, checkpoint=str(folder / "checkpoint")), folder)
            if outcome.status != "ok":
                m.error = f"the checkpoint could not be written: {said(outcome)}"
                return
            m.checkpoint_bytes = outcome.result["bytes"]
            self.prepared = self.prepared or outcome.result
            if s.device == "cuda":
                self._floor(m, folder)
            for number in range(1, self.rounds + 1):
                turn = (number - 1) % len(m.engines)
                for e in m.engines[turn:] + m.engines[:turn]:  # each goes first in its turn
                    if e.status in ("not reached", "timed"):
                        self._round(m, e, number, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _floor(self, m: ModelSteps, folder: Path) -> None:
        self.progress(f"{m.setting.model}: measuring its products and attention alone")
        outcome = self._process(
            Task(stage="calibrate", setting=m.setting, checkpoint=str(folder / "checkpoint")), folder
        )
        if outcome.status == "ok":
            m.floor = Floor.model_validate(outcome.result)
        else:
            self.notes.append(f"{m.setting.model}: no speed of light: {said(outcome)}")

    def _round(self, m: ModelSteps, e: EngineSteps, number: int, folder: Path) -> None:
        s = m.setting
        e.reason = engines.refusal(e.name, s.device)
        if e.reason:
            e.status = "missing"
            return
        self.progress(f"{s.model}, round {number} of {self.rounds}: {e.name}")
        task = Task(stage="engine", engine=e.name, setting=s, checkpoint=str(folder / "checkpoint"))
        outcome = self._process(task, folder)
        if outcome.status == "ok" and "missing" in outcome.result:
            e.status, e.reason = "missing", outcome.result["missing"]
        elif outcome.status == "ok":
            e.status = "timed"
            e.rounds.append(Round(number=number, **outcome.result))
        else:
            e.status, e.reason, e.failed_round, e.log = "failed", said(outcome), number, outcome.output_tail
        if e.status == "timed":
            ms = sorted(e.rounds[-1].step_ms)[s.steps // 2]
            self.progress(f"  {ms:.1f} ms a step, {1e3 * s.tokens / ms:,.0f} tokens/s")
        else:
            self.progress(f"  {e.status}: {e.reason}")

    def _process(self, task: Task, folder: Path) -> Outcome:
        """One fresh process. Errors: TimeUp once the budget is used up."""
        if self.clock() - self.started >= self.budget:
            raise TimeUp
        return run_process(
            COMMAND, task.model_dump(), work_dir=folder, phase=task.engine or task.stage, timeout_s=TIMEOUT_S,
            floor_gib=default_floor_gib(), env={**os.environ, **child_environment(self.sites.get(task.engine, []))},
        )  # fmt: skip


def said(o: Outcome) -> str:
    """How a process ended, on one line."""
    if o.status == "error":
        lines = o.error.strip().splitlines() or [""]
        return f"{o.error_type}: {lines[0][:300]}".rstrip(": ")
    return o.sentence("its process")
