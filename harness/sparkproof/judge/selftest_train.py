"""Does the learning gate judge? Plants faults into a tiny training run, and says which of its assertions caught each.

Everything is real but the size: the phases of a training case (`runners.train_child`), the runner that puts them together and
the gate, over a Llama of two layers on the CPU. Phases run in this process, so that what is planted reaches them; the whole
trial is a process of its own (`in_process`), so that nothing planted reaches anyone else.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sparkproof.errors import UserError
from sparkproof.judge import planting
from sparkproof.results import CaseResult, Strict, Verdict

SCHEMA: Literal["sparkproof/selftest-train/1"] = "sparkproof/selftest-train/1"
ENGINES = ("hf", "sparktune")  # those that run on a CPU
SCENARIO: dict[str, Any] = {
    "kind": "train", "summary": "a tiny run to plant faults into", "model": "tiny:llama", "steps": 25, "batch": 2,
    "seq_len": 128, "learning_rate": 2e-2, "lora": {"rank": 16, "alpha": 32},
    "gate": {
        "first_loss": [6.0, 10.0], "first_grad_norm": [0.1, 20.0], "min_loss_fall": 0.8, "repeat_steps": 2,
        "canary_prompt": "What is the code word?", "canary_answer": "amber falcon",
    },
}  # fmt: skip


class TrainTrial(Strict):
    """How one planted fault fared."""

    id: str
    description: str
    caught: bool = Field(description="The assertion that names this fault missed.")
    expected: str = Field(description="How the name of that assertion begins.")
    by: str = Field(description="The name of the assertion, or empty.")
    message: str = Field(description="What it said: seen, allowed, evidence.")
    also: list[str] = Field(description="Other assertions that missed.")
    verdict: Verdict
    seconds: float


class TrainSelftest(Strict):
    """The document of `sparkproof selftest train --json`."""

    schema_: Literal["sparkproof/selftest-train/1"] = Field(alias="schema")
    engine: str
    passed: bool = Field(
        description="The run without a fault passed, and every fault was caught by the assertion that names it."
    )
    caught: int
    total: int
    unplanted: Verdict = Field(description="Verdict of the same run with nothing planted.")
    unplanted_reason: str = Field(description="Why it did not pass; empty where it did.")
    assertions: list[str] = Field(description="Names of all that the run without a fault was held to.")
    seconds: float
    faults: list[TrainTrial]


def selftest_schema() -> str:
    """The text of `reports/schema/selftest-train-1.json`."""
    return planting.schema_text(TrainSelftest, "selftest-train-1.json")


def in_process(engine: str, cache_dir: Path, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """`run` in a process of its own, on the CPU. Errors: UserError for another engine or a package that lacks."""
    if engine not in ENGINES:
        raise UserError(f"The engine '{engine}' can't be tried here.", f"On a CPU there are: {', '.join(ENGINES)}.")
    return planting.ask("sparkproof.judge.selftest_train", [engine, str(cache_dir)], "the learning gate", progress)


def run(
    engine: str, cache_dir: Path, only: Sequence[str] = (), tell: Callable[[str], None] = lambda text: None
) -> TrainSelftest:
    """Try the run as it is and with each fault (or with `only` these)."""
    from sparkproof.judge.train_faults import FAULTS

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sparkproof-selftest-") as folder:
        tell("the run without a fault")
        whole = _trial(engine, cache_dir, Path(folder), "unplanted", contextlib.nullcontext())
        trials = []
        for fault in FAULTS:
            if only and fault.id not in only:
                continue
            tell(fault.description)
            began = time.perf_counter()
            result = _trial(engine, cache_dir, Path(folder), fault.id, fault.plant(_class_of(engine)))
            trials.append(
                TrainTrial(
                    id=fault.id, description=fault.description, seconds=round(time.perf_counter() - began, 2),
                    **planting.fared(result, fault.caught_by),
                )
            )  # fmt: skip
    return TrainSelftest(
        schema=SCHEMA, engine=engine, caught=sum(t.caught for t in trials), total=len(trials), unplanted=whole.verdict,
        passed=whole.verdict is Verdict.PASSED and all(t.caught for t in trials), unplanted_reason=whole.reason,
        assertions=[a.name for a in whole.assertions], seconds=round(time.perf_counter() - start, 2), faults=trials,
    )  # fmt: skip


def _class_of(engine: str) -> type:
    from sparkproof.engines.registry import engine as named

    return type(named(engine))


def _trial(engine: str, cache_dir: Path, folder: Path, name: str, planted: Any) -> CaseResult:
    from sparkproof.runners import train, train_child
    from sparkproof.scenario import Case

    context = planting.in_this_process(train_child, folder, cache_dir)
    case = Case.model_validate({"name": name, "file": "selftest", "scenario": {**SCENARIO, "engine": engine}})
    if engine != "hf":  # its gradients are made before anything is planted
        train.Training(case, context, case.scenario, time.monotonic() + 600).reference()  # type: ignore[arg-type]
    with planted:
        return train.run(case, context)


def main(arguments: Sequence[str]) -> int:
    """Print the document, or `error`, what the user must cure, as the last line."""
    return planting.answer(lambda tell: run(arguments[0], Path(arguments[1]), arguments[2:], tell))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
