"""Does the learning gate judge? Plants faults into a tiny training run, and says which of its assertions caught each.

Everything is real but the size: the phases of a training case (`runners.train_child`), the runner that puts them together and
the gate, over a Llama of two layers on the CPU. Phases run in this process, so that what is planted reaches them; the whole
trial is a process of its own (`in_process`), so that nothing planted reaches anyone else.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sparkproof.errors import UserError
from sparkproof.results import Assertion, CaseResult, Strict, Verdict

SCHEMA: Literal["sparkproof/selftest-train/1"] = "sparkproof/selftest-train/1"
ENGINES = ("hf", "sparktune")  # those that run on a CPU
ON_A_CPU = {
    "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONSAFEPATH": "1",
}  # fmt: skip
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
    schema = TrainSelftest.model_json_schema(mode="serialization", by_alias=True)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "selftest-train-1.json"}
    return json.dumps({**head, **schema}, indent=2, ensure_ascii=False) + "\n"


def in_process(engine: str, cache_dir: Path, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """`run` in a process of its own, on the CPU. Errors: UserError for another engine or a package that lacks."""
    if engine not in ENGINES:
        raise UserError(f"The engine '{engine}' can't be tried here.", f"On a CPU there are: {', '.join(ENGINES)}.")
    command = [sys.executable, "-W", "ignore", "-m", "sparkproof.judge.selftest_train", engine, str(cache_dir)]
    with subprocess.Popen(
        command, env=os.environ | ON_A_CPU, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace",
    ) as child:  # fmt: skip
        errors: list[str] = []
        assert child.stdout is not None and child.stderr is not None
        for line in child.stderr:
            mark, _, text = line.rstrip().partition("trying: ")
            if text and not mark:
                progress(text)
            else:
                errors.append(line)
        out = child.stdout.read()
    if child.returncode != 0:
        raise RuntimeError("the learning gate could not be tried:\n" + "".join(errors)[-4000:])
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    if "error" in document:
        raise UserError(**document["error"])
    return document


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
            missed = [a for a in result.assertions if not a.passed]
            named = [a for a in missed if a.name.startswith(fault.caught_by)]
            trials.append(
                TrainTrial(
                    id=fault.id, description=fault.description, caught=bool(named) and result.verdict is Verdict.FAILED,
                    expected=fault.caught_by, by=named[0].name if named else "", also=[a.name for a in missed if a not in named],
                    message=_message(named[0]) if named else result.reason, verdict=result.verdict,
                    seconds=round(time.perf_counter() - began, 2),
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


def _message(a: Assertion) -> str:
    seen = f"{a.value}{' ' + a.unit if a.unit else ''}"
    return f"{seen}, allowed {a.bound}. {a.detail}".strip()


def _trial(engine: str, cache_dir: Path, folder: Path, name: str, planted: Any) -> CaseResult:
    from sparkproof.facts.model import Facts
    from sparkproof.runners import train, train_child
    from sparkproof.runners.base import Context
    from sparkproof.runners.process import Outcome
    from sparkproof.scenario import Case

    class InProcess(Context):
        """Phases as calls; what one raises is an outcome, as it is across processes."""

        def spawn(self, entry: str, payload: dict[str, Any], **more: Any) -> Outcome:
            try:
                result = getattr(train_child, entry.partition(":")[2])(json.loads(json.dumps(payload)))
            except Exception as error:
                return Outcome(status="error", error_type=type(error).__name__, error=str(error), stage=more["phase"])
            return Outcome(status="ok", result=json.loads(json.dumps(result)))

    context = InProcess(folder, Facts.model_construct(), cache_dir, 0.0)
    case = Case.model_validate({"name": name, "file": "selftest", "scenario": {**SCENARIO, "engine": engine}})
    if engine != "hf":  # its gradients are made before anything is planted
        train.Training(case, context, case.scenario, time.monotonic() + 600).reference()  # type: ignore[arg-type]
    with planted:
        return train.run(case, context)


def main(arguments: Sequence[str]) -> int:
    """Print the document, or `error`, what the user must cure, as the last line."""
    try:
        document = run(
            arguments[0], Path(arguments[1]), arguments[2:], lambda text: print(f"trying: {text}", file=sys.stderr)
        )
        print(document.model_dump_json(by_alias=True))
    except UserError as e:
        print(json.dumps({"error": {"message": e.message, "fix": e.fix, "skip_class": e.skip_class}}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
