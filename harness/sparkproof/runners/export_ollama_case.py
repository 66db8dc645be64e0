"""The end of an Ollama case, after its folder was written: with the server where one answers, by template parity where none does.

Template parity is a fact about a text, not about Ollama: a case that has no more than that is skipped, and says so.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkproof.results import Assertion, CaseResult, ReasonClass, Verdict
from sparkproof.runners import export_account, export_file_judge, export_go, export_ollama, export_ollama_judge

CHILD = "sparkproof.runners.export_ollama_child"
PARITY = "template_parity"  # in a case's evidence: held, differs, or why it was not looked at
START = "Start Ollama (`ollama serve`; https://ollama.com/download has it), or set OLLAMA_HOST to where it runs"
INSTALL_GO = "or have its template rendered by Go alone: sudo apt install golang-go"


@dataclass(frozen=True)
class Written:
    """What is known before anyone reads the folder: `seen` is what the file's judge takes."""

    out: Path
    base: str
    adapter: str
    cache_dir: Path
    questions: dict[str, Any]
    questions_file: Path
    canary_answer: str
    format: str
    margin: float
    seen: dict[str, Any]


Phase = Callable[..., dict[str, Any]]


@dataclass
class Found:
    """What the case ends with."""

    verdict: Verdict
    reason: str
    next_step: str
    assertions: list[Assertion]
    said: dict[str, Any] | None  # the server's answers
    notices: list[str]
    parity: str
    reason_class: ReasonClass | None = None


def finish(w: Written, phase: Phase) -> Found:
    """Judge the file, the template by Go where it is here, and the server's answers where one answers."""
    assertions = export_file_judge.judge(w.format, w.seen)
    if w.seen["file"]["broken"]:
        return _decided(assertions, None, [], "not looked at")
    place = {"out": str(w.out), "base": w.base, "adapter": w.adapter}
    parity, notices = "Go is not installed", []
    if export_go.available():
        found = phase("parity", {**place, "cache_dir": str(w.cache_dir)}, module=CHILD)
        assertions.append(export_ollama_judge.parity(found))
        parity = "held" if assertions[-1].passed else "differs"
        notices = found["notes"]
    try:
        export_ollama.OllamaServer(export_ollama.LOOK_S)
    except export_ollama.NotAnswering as error:
        return _without(assertions, notices, parity, str(error))
    name = f"sparkproof-{secrets.token_hex(6)}"
    asked = {
        **place, "name": name, "questions": str(w.questions_file), "margin": w.margin,
        "probabilities": str(w.questions_file.with_suffix(".npy")),
    }  # fmt: skip
    try:
        said = phase("converse", asked, module=CHILD)
    except BaseException as failure:  # deleted here, since a process that was killed deletes nothing
        if left := export_ollama.forget(name):
            failure.add_note(left)
        raise
    left = export_ollama.forget(name)
    assertions += export_ollama_judge.answers(said, w.questions, w.canary_answer)
    return _decided(assertions, said, [*said["notes"], *([left] if left else [])], parity)


def _decided(assertions: list[Assertion], said: dict[str, Any] | None, notices: list[str], parity: str) -> Found:
    verdict, reason = CaseResult.decide(assertions)
    return Found(verdict, reason, export_account.next_step(assertions), assertions, said, notices, parity)


def _without(assertions: list[Assertion], notices: list[str], parity: str, why: str) -> Found:
    """No server: what the file and Go show can fail the case, and never passes it."""
    judged = _decided(assertions, None, notices, parity)
    if judged.verdict is not Verdict.PASSED:
        return judged
    judged.verdict, judged.reason_class = Verdict.SKIPPED, ReasonClass.SOFTWARE
    if parity == "held":
        judged.reason = f"Template parity held; Ollama itself was not run: {why}."
        judged.next_step = f"{START}; then run this case again."
    else:
        judged.reason = f"Ollama was not run ({why}), and without Go its template was not rendered either."
        judged.next_step = f"{START}; {INSTALL_GO}."
    return judged


def account(found: Found) -> dict[str, Any]:
    """What `export_account` takes of the answers; nothing where there are none."""
    if found.said is None:
        return {}
    chat, raw = found.said["chat"], found.said["raw"]
    return {
        "answers": {"canary": chat["text"], "load_s": chat["load_s"], "tokens_per_s": raw["tokens_per_s"]},
        "backend": found.said["backend"], "versions": found.said["versions"], "device": found.said["device"],
    }  # fmt: skip
