"""Runner of `export` cases: write, load with the real consumer, compare with the reference, each in a fresh process.

    teach, (train)  the adapter: of the case named in `source`, trained now if this run has not done so, or a tiny model's
    write           adapter, merged folder, GGUF ..., out of the 16-bit base and the adapter; and a look into the file
    reference       base16+adapter or base4+adapter in transformers and PEFT; once a run for all cases of one adapter
    consume         transformers, PEFT, llama.cpp, vLLM or Ollama loads what was written and answers the same questions
    rounded         of a quantised GGUF: transformers over the file's own weights answers them too

`sparkproof.runners.export_judge` judges what they return. Merged folders and GGUF files are large and made again in
seconds, so a case that passed removes them; after a failure they stay for whoever looks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from sparkproof.errors import UserError
from sparkproof.results import Assertion, CaseResult, Verdict
from sparkproof.runners import (
    export_account,
    export_consumers,
    export_expected,
    export_formats,
    export_judge,
    export_ollama_case,
    export_rounded_judge,
    export_source,
)
from sparkproof.runners.base import Context
from sparkproof.runners.export_source import Source
from sparkproof.runners.process import Outcome
from sparkproof.scenario import Case, ExportScenario

CHILD = "sparkproof.runners.export_child"
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
    """One case: its folder and the time left."""

    case: Case
    context: Context
    scenario: ExportScenario
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

    def phase(
        self, name: str, payload: dict[str, Any], env: dict[str, str] = OFFLINE, module: str = CHILD, **other: Any
    ) -> dict[str, Any]:
        """Run one phase, a function of `module`; raise PhaseFailed, or the UserError that it met. `other` goes to
        `Context.spawn`."""
        outcome = self.context.spawn(
            f"{module}:{name}",
            payload,
            case=self.case,
            phase=name,
            timeout_s=max(1.0, self.deadline - time.monotonic()),
            env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(half_the_cores()), **env},
            **other,
        )
        if outcome.status != "ok":
            raise PhaseFailed(name, outcome)
        if "user_error" in outcome.result:
            e = outcome.result["user_error"]
            raise UserError(e["message"], e["fix"], skip_class=e["skip_class"])
        return outcome.result

    def reference(self, source: Source, base: str) -> tuple[np.ndarray, dict[str, Any], Path]:
        """The reference's distributions, its questions and answers, and where they lie; made once a run."""
        payload = {
            "base": base,
            "adapter": str(source.adapter),
            "reference": self.scenario.reference,
            "prompts": self.scenario.prompts,
            "canary_prompt": source.canary_prompt,
            "canary_answer": source.canary_answer,
        }
        with (source.adapter / "adapter_model.safetensors").open("rb") as f:
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
    lacking = export_consumers.lacking(case.scenario, context.cache_dir, context.facts.has_nvidia_hardware)
    if lacking is not None:
        return CaseResult(
            name=case.name, kind=case.kind, verdict=Verdict.SKIPPED, reason_class=lacking.reason_class,
            reason=lacking.sentence, next_step=lacking.fix, evidence=dict(case.scenario.place),
        )  # fmt: skip
    export_source.check(case, context)
    export = Export(case, context, case.scenario, time.monotonic() + case.scenario.timeout_s)
    try:
        source = export_source.get(case, context, export.phase)
        export.deadline = time.monotonic() + case.scenario.timeout_s  # training has a time of its own
        return _export_and_judge(export, source)
    except PhaseFailed as failure:
        return _failed(case, failure)


def half_the_cores() -> int:
    """Threads for torch: as fast as all of them for texts this short, and no crawl when another case runs beside it."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def _export_and_judge(e: Export, source: Source) -> CaseResult:
    scenario = e.scenario
    if e.out.is_dir():  # of an earlier try in this run
        shutil.rmtree(e.out)
    e.out.unlink(missing_ok=True)
    written = e.phase(
        "write",
        {
            "model": source.model,
            "revision": source.revision,
            "model_dir": source.model_dir,
            "cache_dir": str(e.context.cache_dir),
            "adapter": str(source.adapter),
            "format": scenario.format,
            "out": str(e.out),
        },
        ENVIRONMENT,
    )
    base = written["base"]["path"]
    reference, questions, questions_file = e.reference(source, base)
    seen = {
        "file": written["file"], "weights": written["weights"], "answers": None, "canary_answer": source.canary_answer,
        "expected_parameters": written["expected"]["parameters"], "expected_type": written["expected"]["type"],
        "bos": questions["bos"], "rope": written["rope"],
    }  # fmt: skip
    if scenario.consumer == "ollama":
        return _ollama(e, source, written, reference, questions, questions_file, seen)
    exported = np.empty((0, reference.shape[-1]), dtype=np.float32)
    if not written["file"]["broken"]:
        rows = e.folder / "consumed.npy"
        asked = {
            "consumer": scenario.consumer, "path": str(e.out), "base": base, "questions": str(questions_file),
            "probabilities": str(rows), "format": scenario.format,
        }  # fmt: skip
        with export_consumers.surroundings(scenario.consumer, e.context.cache_dir) as (env, other):
            seen |= e.phase("consume", asked, {**OFFLINE, **env}, **other)
        exported = np.load(rows)
        rows.unlink()
    judged = export_judge.judge(scenario, reference, exported, questions, seen)
    own: export_rounded_judge.Rounded | None = None
    untold: list[str] = []
    if seen["answers"] is not None and export_formats.quantised(scenario.format):
        own, untold = _rounded(e, source, base, questions_file)
    if own is not None:
        tight = export_rounded_judge.judge(scenario, own, exported, seen)
        asked_of = {**questions, "canary_answer": source.canary_answer}
        judged = [
            *tight, *export_rounded_judge.explained(judged, tight, scenario, reference, own, exported, asked_of)
        ]  # fmt: skip
    assertions, declared = export_expected.apply(judged, scenario)
    verdict, reason = CaseResult.decide(assertions)
    if verdict is Verdict.PASSED and scenario.format != "adapter":
        shutil.rmtree(e.out) if e.out.is_dir() else e.out.unlink()
    told = _told(e, reference, exported, questions, written, seen)
    told["notices"] += declared + untold
    if own is not None:
        told["measurements"] += export_rounded_judge.measurements(scenario, reference, own, exported)
        told["evidence"]["the file's own weights"] = export_rounded_judge.evidence(own)
    return CaseResult(
        verdict=verdict, reason=reason, next_step=export_account.next_step(assertions), assertions=assertions, **told
    )


def _rounded(
    e: Export, source: Source, base: str, questions_file: Path
) -> tuple[export_rounded_judge.Rounded | None, list[str]]:
    """What transformers says over the file's own weights, or a sentence why it was not asked."""
    rows = e.folder / "rounded.npy"
    found = e.phase(
        "rounded",
        {
            "file": str(e.out), "base": base, "adapter": str(source.adapter), "questions": str(questions_file),
            "probabilities": str(rows),
        },
    )  # fmt: skip
    if "unplaceable" in found:
        return None, [f"Not held to the file's own weights in transformers: {found['unplaceable']}"]
    own = export_rounded_judge.Rounded(
        np.load(rows), found["answers"], found["strays"], found["missing"], found["inputs"]
    )
    rows.unlink()
    return own, []


def _ollama(
    e: Export, source: Source, written: dict[str, Any], reference: np.ndarray, questions: dict[str, Any],
    questions_file: Path, seen: dict[str, Any],
) -> CaseResult:  # fmt: skip
    """The rest of an Ollama case: no distributions come back."""
    found = export_ollama_case.finish(
        export_ollama_case.Written(
            out=e.out, base=written["base"]["path"], adapter=str(source.adapter), cache_dir=e.context.cache_dir,
            questions=questions, questions_file=questions_file, canary_answer=source.canary_answer,
            margin=e.scenario.margin, seen=seen, format=e.scenario.format,
        ),
        e.phase,
    )  # fmt: skip
    seen |= export_ollama_case.account(found)
    if found.verdict is not Verdict.FAILED:
        shutil.rmtree(e.out)
    none = np.empty((0, reference.shape[-1]), dtype=np.float32)
    told = _told(e, reference, none, questions, written, seen)
    told["notices"] += found.notices
    told["evidence"][export_ollama_case.PARITY] = found.parity
    return CaseResult(
        verdict=found.verdict, reason=found.reason, reason_class=found.reason_class, next_step=found.next_step,
        assertions=found.assertions, **told,
    )  # fmt: skip


def _told(
    e: Export, reference: np.ndarray, exported: np.ndarray, questions: dict[str, Any], written: dict[str, Any],
    seen: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """A result's fields that hold whatever the verdict is."""
    device = seen.get("device", "cpu")
    return {
        "name": e.case.name,
        "kind": "export",
        "measurements": export_account.measurements(e.scenario, reference, exported, written, seen, questions),
        "notices": [export_account.reference_sentence(e.scenario.reference)],
        "evidence": export_account.evidence(e.scenario, reference, exported, questions, written, seen),
        "mode": "gpu" if device == "cuda" else "host",
        "artifacts": {"export": str(e.out.relative_to(e.context.run_dir))} if e.out.exists() else {},
    }


def _failed(case: Case, failure: PhaseFailed) -> CaseResult:
    """A phase that ended without a result: the device's fault if what is under test raised or died."""
    assert isinstance(case.scenario, ExportScenario)
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
        notices=list(getattr(failure, "__notes__", [])),
        assertions=[Assertion(name=f"the process '{failure.phase}' gives a result", passed=False, detail=str(failure))],
        evidence=dict(case.scenario.place),
        output_tail=outcome.output_tail,
        traceback=outcome.traceback,
    )
