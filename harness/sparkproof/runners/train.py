"""Runner of `train` cases: three fresh processes, one judgement by learning.

    train      load, ask for the canary, train, ask again, save the adapter
    again      read the adapter back over a fresh base, repeat the first steps, step-0 gradients
    reference  step-0 gradients of the `hf` engine, once a run for all engines, and by no process of their own where its case
               has passed already; `hf` itself is held to plain PyTorch

What they return is judged by `sparkproof.runners.gate`; an exit code proves nothing. A case is trained once a run: the
result is kept beside the adapter, under a lock, for whoever asks next (`ensure_trained`, used by export cases).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparkproof.errors import UserError
from sparkproof.judge.steady import steady
from sparkproof.results import Assertion, CaseResult, ReasonClass, Verdict
from sparkproof.runners import gate
from sparkproof.runners.base import Context
from sparkproof.runners.child import write_json
from sparkproof.runners.gate_evidence import Evidence
from sparkproof.runners.parity import Gradients, parity
from sparkproof.runners.process import Outcome
from sparkproof.runners.train_measure import measurements
from sparkproof.scenario import Case, TrainScenario

CHILD = "sparkproof.runners.train_child"
# The interpreter would make a CPU run take hours; cuBLAS repeats its bits only with a fixed workspace.
ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",  # the folder `kernels` in the working directory must not pass for the package of that name
    "TRITON_INTERPRET": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # two cases on two cores must not spin against each other
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_DISABLE_AUTO_UPDATES": "1",
}


class PhaseFailed(Exception):
    """A phase did not give a result."""

    def __init__(self, phase: str, outcome: Outcome) -> None:
        super().__init__(outcome.sentence(phase))
        self.phase = phase
        self.outcome = outcome


@dataclass
class Training:
    """One case in its folder: where its files are, what time is left, what its phases need."""

    case: Case
    context: Context
    scenario: TrainScenario
    deadline: float
    folder: Path = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase that ended

    def __post_init__(self) -> None:
        self.folder = self.context.case_dir(self.case)

    @property
    def adapter(self) -> Path:
        """Where the PEFT adapter and its train.json go."""
        return self.folder / "adapter"

    def phase(self, name: str, entry: str, **more: Path) -> tuple[dict[str, Any], Outcome]:
        """Run one phase in a fresh process; raise PhaseFailed or the UserError that it met."""
        payload = {
            "scenario": self.scenario.model_dump(mode="json"),
            "cache_dir": str(self.context.cache_dir),
            "adapter": str(self.adapter),
            "probe": str(self.folder / "probe.safetensors"),
            **{key: str(path) for key, path in more.items()},
        }
        outcome = self.context.spawn(
            f"{CHILD}:{entry}",
            payload,
            case=self.case,
            phase=name,
            timeout_s=max(1.0, self.deadline - time.monotonic()),
            env=ENVIRONMENT,
        )
        self.seconds[name] = round(outcome.duration_s, 1)
        if outcome.status != "ok":
            raise PhaseFailed(name, outcome)
        if "user_error" in outcome.result:
            e = outcome.result["user_error"]
            raise UserError(e["message"], e["fix"], skip_class=e["skip_class"])
        return outcome.result, outcome

    def reference(self) -> Gradients:
        """Gradients of the `hf` engine for this scenario's first batch, made once a run."""
        stem, note = self._shared()
        with FileLock(f"{stem}.lock"):
            if not note.is_file():
                result, _ = self.phase("reference", "reference_gradients", gradients=stem)
                write_json(note, result)
        found: Gradients = json.loads(note.read_text(encoding="utf-8"))
        return found

    def offer(self, own: Gradients) -> None:
        """Let other engines' cases have these gradients of `hf`, unless some are there or are being made."""
        stem, note = self._shared()
        with contextlib.suppress(Timeout), FileLock(f"{stem}.lock", timeout=0):
            if note.is_file():
                return
            given = {}
            for name, gradients in own.items():
                file = Path(f"{stem}-{name}.safetensors")
                shutil.copyfile(gradients["file"], file)
                given[name] = {k: gradients[k] for k in ("loss", "token_losses")} | {"file": str(file)}
            write_json(note, given)

    def _shared(self) -> tuple[Path, Path]:
        """Where the gradients of `hf` lie that all cases of this model, data and LoRA share; and the note of them."""
        key = self.scenario.model_dump_json(include=_REFERENCE_FIELDS) + self.scenario.lora.model_dump_json()
        stem = self.context.run_dir / "cases" / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return stem, stem.with_suffix(".json")


_REFERENCE_FIELDS = {"model", "model_dir", "revision", "dataset", "steps", "batch", "seq_len", "seed", "load_in_4bit"}


def run(case: Case, context: Context) -> CaseResult:
    """Train and judge, or give the result of this run's earlier training of the same scenario."""
    assert isinstance(case.scenario, TrainScenario)
    folder = context.case_dir(case)
    kept, digest = folder / "train-result.json", _digest(case)
    with FileLock(folder / "train.lock"):
        if kept.is_file():
            document = json.loads(kept.read_text(encoding="utf-8"))
            if document["digest"] == digest:
                return CaseResult.model_validate(document["result"])
        kept.unlink(missing_ok=True)
        training = Training(case, context, case.scenario, time.monotonic() + case.scenario.timeout_s)
        shutil.rmtree(training.adapter, ignore_errors=True)
        try:
            result = _train_and_judge(training)
        except PhaseFailed as failure:
            return _failed(case, failure)
        write_json(kept, {"digest": digest, "result": result.model_dump(mode="json")})
        return result


def ensure_trained(case: Case, context: Context) -> Path:
    """The adapter folder of a train case that passed, trained now if this run has not done so.

    The folder has PEFT's files and `train.json`. Raises UserError (skip class 'upstream-case') when the case did not
    pass: what did not learn is not worth exporting.
    """
    result = run(case, context)
    if result.verdict not in (Verdict.PASSED, Verdict.RETEST):  # a retest learnt: only its speed is in doubt
        raise UserError(
            f"The training case {case.name} ended as {result.verdict.value}: {result.reason}",
            result.next_step,
            skip_class=ReasonClass.UPSTREAM.value,
        )
    return context.case_dir(case) / "adapter"


def _digest(case: Case) -> str:
    return hashlib.sha256(case.scenario.model_dump_json().encode()).hexdigest()


def plain_of(own: Gradients, plain: bool = True) -> Gradients:
    """Of what `hf` left, the gradients of plain PyTorch over its weights; or its own."""
    return {n.removeprefix("plain-"): g for n, g in own.items() if n.startswith("plain-") is plain}


def _train_and_judge(t: Training) -> CaseResult:
    s, folder = t.scenario, t.folder
    ran, outcome = t.phase("train", "train")
    if ran.get("untrainable"):
        return _untrainable(t, ran)
    measured = measurements(s, ran, outcome.peak_rss_gib, outcome.machine_gib)
    try:
        again, _ = t.phase("again", "again", gradients=folder / "gradients")
        own: Gradients = again["gradients"]
        if s.engine == "hf":
            agreed = parity(own, plain_of(own), "plain PyTorch over the same weights")
        else:
            agreed = parity(own, t.reference(), "hf")
    except PhaseFailed as failure:  # what was measured until then is not lost with it
        return _failed(t.case, failure).model_copy(
            update={"measurements": measured, "evidence": _run_evidence(t, ran), "mode": ran["ran"]["mode"]}
        )
    assertions = gate.judge(s, Evidence(ran, again, agreed))
    mode = ran["ran"]["mode"]
    canaries = ran["canaries"]
    if mode == "gpu":
        assertions += steady(canaries["before"], canaries["after"], ran["during"], t.context.facts)
    trusted = all(a.passed for a in assertions if a.about == "speed")
    verdict, reason = CaseResult.decide(assertions, speed_trusted=trusted)
    if s.engine == "hf" and verdict in (Verdict.PASSED, Verdict.RETEST):
        t.offer(plain_of(own, False))
    _write_account(t, ran)
    for scratch in (*(Path(g["file"]) for g in own.values()), folder / "probe.safetensors"):
        scratch.unlink(missing_ok=True)
    return CaseResult(
        name=t.case.name,
        kind="train",
        verdict=verdict,
        reason=reason,
        next_step=_next_step(assertions, t),
        assertions=assertions,
        measurements=measured,
        notices=_notices(s, mode, again, ran["work"].get("why_not", "")),
        evidence=_run_evidence(t, ran) | _evidence(ran, again, agreed),
        mode=mode,
        output_tail=outcome.output_tail if verdict is not Verdict.PASSED else "",
        artifacts={"adapter": str(t.adapter.relative_to(t.context.run_dir))},
    )


def _subject(t: Training, ran: dict[str, Any]) -> dict[str, Any]:
    """Who trained what, for the report's table of engines."""
    s, parts = t.scenario, t.case.name.partition("[")[0].split("/")
    family = parts[1] if len(parts) > 2 else ""
    return {
        "family": family, "architecture": ran["architecture"], "model": s.model, "engine": s.engine, "batch": s.batch,
        "seq_len": s.seq_len,
    }  # fmt: skip


def _untrainable(t: Training, ran: dict[str, Any]) -> CaseResult:
    """The engine gave a model without LoRA, or froze it: no step was made."""
    assertions = gate.lora(t.scenario, Evidence(ran, {}, {}))
    verdict, reason = CaseResult.decide(assertions)
    evidence = {"subject": _subject(t, ran), "lora": ran["lora"], "patches": ran["ran"]["patches"]}
    return CaseResult(
        name=t.case.name, kind="train", verdict=verdict, reason=reason, next_step=_next_step(assertions, t),
        assertions=assertions, evidence=evidence, mode=ran["ran"]["mode"],
    )  # fmt: skip


def _write_account(t: Training, ran: dict[str, Any]) -> None:
    """`train.json` in the adapter's folder: what an export must know of what was trained."""
    s = t.scenario
    account = {
        "schema": "sparkproof-train-1",
        "case": t.case.name,
        "engine": s.engine,
        "model": s.model,
        "revision": ran["pretrained"]["revision"],
        "base": ran["pretrained"],
        "load_in_4bit": s.load_in_4bit,
        "lora": s.lora.model_dump(),
        "canary": {"prompt": s.gate.canary_prompt, "answer": s.gate.canary_answer},
        "canary_after": ran["canary_after"],
        "versions": ran["versions"],
    }
    write_json(t.adapter / "train.json", account)


def _run_evidence(t: Training, ran: dict[str, Any]) -> dict[str, Any]:
    """What the training itself shows."""
    keys = ("loss", "grad_norm", "canary_before", "canary_after", "held_out_before", "held_out_after", "lora", "data")
    return {
        "subject": _subject(t, ran),
        **{key: ran[key] for key in keys},
        "patches": ran["ran"]["patches"],
        "watermarks": ran["ran"]["watermarks"],
        "base": {k: v for k, v in ran["pretrained"].items() if k != "path"},
        "versions": ran["versions"],
        "seconds of phases": dict(t.seconds),
        **({"canaries": ran["canaries"], "while it ran": ran["during"]} if ran["canaries"].get("before") else {}),
    }


def _evidence(ran: dict[str, Any], again: dict[str, Any], agreed: dict[str, Any]) -> dict[str, Any]:
    """What the processes after it show."""
    closest = Evidence(ran, again, agreed).closest[1]
    return {"repeat": again["repeat"], "fed": closest["fed"], "merged": closest["merged"], "parity": agreed}


def _notices(s: TrainScenario, mode: str, again: dict[str, Any], why_no_work: str) -> list[str]:
    found = [f"No MFU and no speed of light: {why_no_work}."] if why_no_work and mode == "gpu" else []
    if s.engine == "sparktune" and mode == "reference":
        found += [
            "No GPU: sparktune's plain PyTorch references ran, none of its kernels; this says nothing about speed."
        ]
    elif mode == "host":
        found += ["No GPU: this ran on the CPU in fp32; it shows that the engine learns, nothing about speed."]
    if s.engine in s.gate.no_packing:
        apart = Evidence({}, again, {}).closest[1]["fed"]["packed"]["relative"]
        found.append(
            f"Not held to packing: {s.gate.no_packing[s.engine]} Its gradients lay {apart:.2g} apart, relative L2."
        )
    return found


def _next_step(assertions: list[Assertion], t: Training) -> str:
    missed = [a for a in assertions if not a.passed]
    if not missed:
        return ""
    if all(a.about == "speed" for a in missed):
        return "It learnt; for its speed let the machine idle and cool, end other GPU work, then run it again."
    if not t.scenario.load_in_4bit or t.scenario.engine != "hf":
        return f"Run the same scenario with engine hf: if it passes, the fault lies in {t.scenario.engine}."
    return (
        "See the loss curve and the assertion's evidence; `sparkproof doctor` looks for known causes on this machine."
    )


def _failed(case: Case, failure: PhaseFailed) -> CaseResult:
    """A phase that ended without a result: failed when what is under test did it, broken when the harness did."""
    o = failure.outcome
    blamed = o.blames_device
    steps = {
        "memory": "Free memory, or lower batch and seq_len in the scenario.",
        "timeout": f"Raise timeout_s (now {case.scenario.timeout_s:g} s), or look at what it was doing in {o.log}.",
        "died": f"Read the end of {o.log}.",
    }
    return CaseResult(
        name=case.name,
        kind=case.kind,
        verdict=Verdict.FAILED if blamed else Verdict.BROKEN,
        reason=str(failure),
        next_step=steps.get(o.status, f"Read the end of {o.log}."),
        assertions=[Assertion(name=f"the process '{failure.phase}' gives a result", passed=False, detail=str(failure))],
        output_tail=o.output_tail,
        traceback=o.traceback,
    )
