"""Runner of `comparison` cases: a process an engine, each loaded once, taking turns in blocks of steps.

Blocks of all engines alternate, so that what drifts while it runs (clock, heat, a neighbour) drifts for all of them; each round
begins with another engine. Only the engine whose turn it is uses the device. What the processes saw is judged by
`sparkproof.judge.comparison`.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparkproof.errors import UserError
from sparkproof.judge.comparison import Side, judge
from sparkproof.results import CaseResult, ReasonClass
from sparkproof.runners.base import Context
from sparkproof.runners.one_model import source_of
from sparkproof.runners.process import Outcome
from sparkproof.runners.train import ENVIRONMENT
from sparkproof.scenario import Case, ComparisonScenario

CHILD = "sparkproof.runners.comparison_child"
POLL_S = 0.01
MOST = 4  # times `rounds`: six rounds took 13 of 205 s, and left an interval of 0.94 to 1.58 on a host with neighbours


@dataclass
class Racer:
    """One engine's process, in a thread that waits for its end."""

    name: str
    turns: Path
    outcome: Outcome | None = None
    error: BaseException | None = None
    taken: int = 0
    thread: threading.Thread = field(init=False)

    @property
    def ended(self) -> bool:
        """Whether its process has gone."""
        return self.outcome is not None or self.error is not None

    def say(self, text: str) -> None:
        """Write into its FIFO, which the parent keeps open for reading too, so that this never waits."""
        os.write(self.pipe, f"{text}\n".encode())

    def open(self) -> None:
        """Make the FIFO."""
        path = self.turns / f"{self.name}.fifo"
        os.mkfifo(path)
        self.pipe = os.open(path, os.O_RDWR)

    def close(self) -> None:
        """End its turns, wait for its process, and close."""
        self.say("end")
        self.thread.join()
        os.close(self.pipe)


def run(case: Case, context: Context) -> CaseResult:
    """Run every engine that is here, block by block, and judge. Errors: UserError for what is missing to all of them."""
    assert isinstance(case.scenario, ComparisonScenario)
    race = Race(case, context, case.scenario)
    try:
        return race.run()
    finally:
        shutil.rmtree(race.checkpoint, ignore_errors=True)
        shutil.rmtree(race.turns, ignore_errors=True)


@dataclass
class Race:
    """One comparison in its folder."""

    case: Case
    context: Context
    scenario: ComparisonScenario

    def __post_init__(self) -> None:
        self.folder = self.context.case_dir(self.case)
        self.checkpoint, self.turns = self.folder / "checkpoint", self.folder / "turns"
        self.deadline = time.monotonic() + self.scenario.timeout_s
        self.source = source_of(self.scenario, self.context.cases)

    def run(self) -> CaseResult:
        """Prepare, canaries, engines in turn, canaries, judgement."""
        for folder in (self.checkpoint, self.turns):
            shutil.rmtree(folder, ignore_errors=True)
        self.turns.mkdir(parents=True)
        if self.scenario.shape:
            self._phase("prepare", "sparkproof.runners.one_model:prepare")
        on_gpu = self.context.facts.gpu is not None and bool(self.context.facts.gpu.usable_by_torch)
        canaries = {"before": self._phase("canaries", f"{CHILD}:canaries") if on_gpu else {}}
        sides = self._sides()
        canaries["after"] = self._phase("canaries", f"{CHILD}:canaries") if on_gpu else {}
        return judge(self.case, self.source, sides, canaries, self.context.facts)

    def _phase(self, name: str, entry: str) -> dict[str, Any]:
        """A process of the harness's own; what goes wrong in it is no finding about an engine."""
        outcome = self._spawn(entry, name, {})
        if outcome.status != "ok":
            raise RuntimeError(outcome.sentence(f"the process '{name}'"))
        return outcome.result

    def _spawn(self, entry: str, phase: str, more: dict[str, str]) -> Outcome:
        payload = {
            "scenario": self.scenario.model_dump(mode="json"),
            "source": self.source.model_dump(mode="json") if self.source else None,
            "cache_dir": str(self.context.cache_dir),
            "turns": str(self.turns),
            "folder": str(self.checkpoint),
            **more,
        }
        left = max(1.0, self.deadline - time.monotonic())
        return self.context.spawn(entry, payload, case=self.case, phase=phase, timeout_s=left, env=ENVIRONMENT)

    def _sides(self) -> list[Side]:
        racers = [Racer(name, self.turns) for name in self.scenario.engines]
        started: list[Racer] = []
        try:
            for racer in racers:  # one after the other: loading is no race, and each one's memory is its own
                racer.open()
                racer.thread = threading.Thread(target=self._follow, args=(racer,), daemon=True)
                racer.thread.start()
                started.append(racer)
                self._await(racer, 0)
            until = time.monotonic() + self.scenario.more_rounds_s
            for number in range(1, MOST * self.scenario.rounds + 1):
                if number > self.scenario.rounds and time.monotonic() > until:
                    break
                turn = (number - 1) % len(racers)
                for racer in racers[turn:] + racers[:turn]:
                    if not racer.ended:
                        racer.say(str(number))
                        self._await(racer, number)
        finally:
            for racer in started:
                racer.close()
        return [self._side(racer) for racer in racers]

    def _follow(self, racer: Racer) -> None:
        try:
            racer.outcome = self._spawn(f"{CHILD}:engine", racer.name, {"engine": racer.name})
        except BaseException as error:
            racer.error = error

    def _await(self, racer: Racer, number: int) -> None:
        """Until it has answered this turn, or its process has ended, which its timeout and the watchdog see to."""
        answer = self.turns / f"{racer.name}-{number}.json"
        while not answer.exists() and not racer.ended:
            time.sleep(POLL_S)
        racer.taken = number if answer.exists() else racer.taken

    def _side(self, racer: Racer) -> Side:
        if racer.error is not None:
            raise racer.error
        assert racer.outcome is not None
        o = racer.outcome
        if o.status == "ok" and "user_error" in o.result:
            e = o.result["user_error"]
            reason = ReasonClass(e["skip_class"]) if e["skip_class"] else None
            if racer.name == "hf" or reason not in (ReasonClass.ENGINE, ReasonClass.GPU):
                raise UserError(e["message"], e["fix"], skip_class=e["skip_class"])
            return Side(racer.name, missing=e["message"])
        if o.status != "ok":
            if not o.blames_device:
                raise RuntimeError(o.sentence(f"the process of {racer.name}"))
            return Side(racer.name, failed=o.sentence(racer.name), log=o.output_tail)
        return Side(racer.name, seen=json.loads(json.dumps(o.result)), machine_gib=o.machine_gib)
