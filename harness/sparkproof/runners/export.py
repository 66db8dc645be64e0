"""Runner of `export` cases: write, load with the real consumer, compare with the reference, each in a fresh process.

    (train)     the adapter of the case named in `source`, trained now if this run has not done so
    write       adapter, merged folder or GGUF, out of the 16-bit base and the adapter
    reference   base16+adapter or base4+adapter in transformers and PEFT; once a run for all cases of one adapter
    consume     transformers, PEFT or llama.cpp loads what was written and answers the same questions

`sparkproof.runners.export_judge` judges what they return. Merged folders and GGUF files are large and made again in
seconds, so a case that passed removes them; after a failure they stay for whoever looks.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from sparkproof.catalog import nearest
from sparkproof.errors import UserError
from sparkproof.results import Assertion, CaseResult, ReasonClass, Verdict
from sparkproof.runners import export_account, export_judge
from sparkproof.runners.base import Context
from sparkproof.runners.process import Outcome
from sparkproof.runners.train import ensure_trained
from sparkproof.scenario import Case, ExportScenario, TrainScenario

CHILD = "sparkproof.runners.export_child"
CONSUMERS = {"adapter": "peft", "merged_16bit": "transformers", "gguf_f16": "llama.cpp", "gguf_q8_0": "llama.cpp"}
PACKAGES = {"peft": ("peft",), "transformers": ("transformers",), "llama.cpp": ("gguf", "xllamacpp")}
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRITON_INTERPRET": "0"}
OFFLINE = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1"}  # what is compared lies on this disk


class PhaseFailed(Exception):
    """A phase gave no result."""

    def __init__(self, phase: str, outcome: Outcome) -> None:
        super().__init__(outcome.sentence(phase))
        self.phase = phase
        self.outcome = outcome


@dataclass
class Export:
    """One case: its adapter, its folder, and the time left."""

    case: Case
    context: Context
    scenario: ExportScenario
    source: TrainScenario
    adapter: Path
    deadline: float

    @property
    def folder(self) -> Path:
        """The case's own files."""
        return self.context.case_dir(self.case)

    @property
    def out(self) -> Path:
        """What is exported."""
        gguf = self.scenario.format.startswith("gguf_")
        return self.folder / (f"{self.scenario.format}.gguf" if gguf else self.scenario.format)

    def phase(self, name: str, payload: dict[str, Any], env: dict[str, str] = OFFLINE) -> dict[str, Any]:
        """Run one phase; raise PhaseFailed, or the UserError that it met."""
        outcome = self.context.spawn(
            f"{CHILD}:{name}",
            payload,
            case=self.case,
            phase=name,
            timeout_s=max(1.0, self.deadline - time.monotonic()),
            env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(half_the_cores()), **env},
        )
        if outcome.status != "ok":
            raise PhaseFailed(name, outcome)
        if "user_error" in outcome.result:
            e = outcome.result["user_error"]
            raise UserError(e["message"], e["fix"], skip_class=e["skip_class"])
        return outcome.result

    def reference(self, base: str) -> tuple[np.ndarray, dict[str, Any], Path]:
        """The reference's distributions, its questions and answers, and where they lie; made once a run."""
        gate = self.source.gate
        payload = {
            "base": base,
            "adapter": str(self.adapter),
            "reference": self.scenario.reference,
            "prompts": self.scenario.prompts,
            "canary_prompt": gate.canary_prompt,
            "canary_answer": gate.canary_answer,
        }
        with (self.adapter / "adapter_model.safetensors").open("rb") as f:
            weights = hashlib.file_digest(f, "sha256").hexdigest()
        key = hashlib.sha256(json.dumps([payload, weights]).encode()).hexdigest()[:16]
        stem = self.context.run_dir / "cases" / f"export-reference-{key}"
        questions, rows = stem.with_suffix(".json"), stem.with_suffix(".npy")
        with FileLock(f"{stem}.lock"):
            if not questions.is_file():  # written last
                self.phase("reference", {**payload, "questions": str(questions), "probabilities": str(rows)})
        return np.load(rows), json.loads(questions.read_text(encoding="utf-8")), questions


def run(case: Case, context: Context) -> CaseResult:
    """Export, consume and judge. Errors: UserError for a wrong source, or one that did not pass (skipped)."""
    assert isinstance(case.scenario, ExportScenario)
    lacking = missing_packages(case.scenario)
    if lacking:
        return CaseResult(
            name=case.name,
            kind=case.kind,
            verdict=Verdict.SKIPPED,
            reason_class=ReasonClass.SOFTWARE,
            reason=f"The consumer {case.scenario.consumer} needs {', '.join(lacking)}, which is not installed.",
            next_step=f"pip install {' '.join(lacking)}",
        )
    source = find_source(case, context)
    assert isinstance(source.scenario, TrainScenario)
    adapter = ensure_trained(source, context)
    deadline = time.monotonic() + case.scenario.timeout_s
    export = Export(case, context, case.scenario, source.scenario, adapter, deadline)
    try:
        return _export_and_judge(export)
    except PhaseFailed as failure:
        return _failed(case, failure)


def half_the_cores() -> int:
    """Threads for torch: as fast as all of them for texts this short, and no crawl when another case runs beside it."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def missing_packages(scenario: ExportScenario) -> list[str]:
    """Packages that writing or reading this export needs and that are not installed."""
    needed = [*PACKAGES[scenario.consumer], *(("gguf",) if scenario.format.startswith("gguf_") else ())]
    return [name for name in dict.fromkeys(needed) if importlib.util.find_spec(name) is None]


def find_source(case: Case, context: Context) -> Case:
    """The train case that `source` names. Errors: UserError when there is none or consumer and format don't match."""
    scenario = case.scenario
    assert isinstance(scenario, ExportScenario)
    if CONSUMERS[scenario.format] != scenario.consumer:
        raise UserError(
            f"{scenario.consumer} does not read {scenario.format}.",
            f"Write `consumer: {CONSUMERS[scenario.format]}` in {case.file}.",
        )
    source = context.cases.get(scenario.source)
    if source is None or source.kind != "train":
        known = [name for name, c in context.cases.items() if c.kind == "train"]
        raise UserError(
            f"{case.file} exports '{scenario.source}', which is no train case.", nearest(scenario.source, known)
        )
    return source


def _export_and_judge(e: Export) -> CaseResult:
    scenario = e.scenario
    if e.out.is_dir():  # of an earlier try in this run
        shutil.rmtree(e.out)
    e.out.unlink(missing_ok=True)
    written = e.phase(
        "write",
        {
            "model": e.source.model,
            "revision": e.source.revision,
            "model_dir": e.source.model_dir,
            "cache_dir": str(e.context.cache_dir),
            "adapter": str(e.adapter),
            "format": scenario.format,
            "out": str(e.out),
        },
        ENVIRONMENT,
    )
    base = written["base"]["path"]
    reference, questions, questions_file = e.reference(base)
    rows = e.folder / "consumed.npy"
    seen = e.phase(
        "consume",
        {
            "consumer": scenario.consumer,
            "path": str(e.out),
            "base": base,
            "questions": str(questions_file),
            "probabilities": str(rows),
        },
    )
    exported = np.load(rows)
    rows.unlink()
    seen |= {
        "expected_parameters": written["expected"]["parameters"],
        "expected_type": written["expected"]["type"],
        "canary_answer": e.source.gate.canary_answer,
    }
    assertions = export_judge.judge(scenario, reference, exported, questions, seen)
    verdict, reason = CaseResult.decide(assertions)
    if verdict is Verdict.PASSED and scenario.format != "adapter":
        shutil.rmtree(e.out) if e.out.is_dir() else e.out.unlink()
    return CaseResult(
        name=e.case.name,
        kind="export",
        verdict=verdict,
        reason=reason,
        next_step=export_account.next_step(assertions),
        assertions=assertions,
        measurements=export_account.measurements(scenario, reference, exported, written, seen, questions),
        notices=[export_account.reference_sentence(scenario.reference)],
        evidence=export_account.evidence(scenario, reference, exported, questions, written, seen),
        mode="gpu" if questions["device"] == "cuda" and scenario.consumer != "llama.cpp" else "host",
        artifacts={"export": str(e.out.relative_to(e.context.run_dir))} if e.out.exists() else {},
    )


def _failed(case: Case, failure: PhaseFailed) -> CaseResult:
    """A phase that ended without a result: the device's fault if what is under test raised or died."""
    outcome = failure.outcome
    steps = {
        "memory": "Free memory, or export a smaller model here.",
        "timeout": f"Raise timeout_s (now {case.scenario.timeout_s:g} s), or see what it was doing in {outcome.log}.",
    }
    return CaseResult(
        name=case.name,
        kind="export",
        verdict=Verdict.FAILED if outcome.blames_device else Verdict.BROKEN,
        reason=str(failure),
        next_step=steps.get(outcome.status, f"Read the end of {outcome.log}."),
        assertions=[Assertion(name=f"the process '{failure.phase}' gives a result", passed=False, detail=str(failure))],
        output_tail=outcome.output_tail,
        traceback=outcome.traceback,
    )
