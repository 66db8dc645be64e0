"""What the self-tests of training and of export share: a process of their own, phases as calls, a verdict a fault.

Phases run in the process that tries, so that what is planted reaches them; the whole trial is a process apart (`ask`), so that
nothing planted reaches anyone else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from sparkproof.errors import UserError
from sparkproof.results import Assertion, CaseResult, Verdict
from sparkproof.runners.base import Context

ON_A_CPU = {
    "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONSAFEPATH": "1",
}  # fmt: skip
MARK = "trying: "  # before what is being tried, on standard error


def ask(module: str, arguments: list[str], judge: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """The document that `python -m module arguments` prints on the CPU; `judge` is what it tries, in words.

    Errors: UserError where that process says so, RuntimeError with its last words where it ends otherwise.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    with subprocess.Popen(
        command, env=os.environ | ON_A_CPU, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace",
    ) as child:  # fmt: skip
        errors: list[str] = []
        assert child.stdout is not None and child.stderr is not None
        for line in child.stderr:
            mark, _, text = line.rstrip().partition(MARK)
            if text and not mark:
                progress(text)
            else:
                errors.append(line)
        out = child.stdout.read()
    if child.returncode != 0:
        raise RuntimeError(f"{judge} could not be tried:\n" + "".join(errors)[-4000:])
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    if "error" in document:
        raise UserError(**document["error"])
    return document


def answer(run: Callable[[Callable[[str], None]], BaseModel]) -> int:
    """The other end of `ask`: print the document, or `error`, what the user must cure, as the last line."""
    try:
        print(run(lambda text: print(f"{MARK}{text}", file=sys.stderr)).model_dump_json(by_alias=True))
    except UserError as e:
        print(json.dumps({"error": {"message": e.message, "fix": e.fix, "skip_class": e.skip_class}}))
    return 0


def schema_text(document: type[BaseModel], file: str) -> str:
    """The text of `reports/schema/<file>`."""
    schema = document.model_json_schema(mode="serialization", by_alias=True)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": file}
    return json.dumps({**head, **schema}, indent=2, ensure_ascii=False) + "\n"


def in_this_process(phases: ModuleType, folder: Path, cache_dir: Path) -> Context:
    """A context whose phases are calls of `phases`; what one raises is an outcome, as it is across processes."""
    from sparkproof.facts.model import Facts
    from sparkproof.runners.process import Outcome

    class InProcess(Context):
        def spawn(self, entry: str, payload: dict[str, Any], **more: Any) -> Outcome:
            try:
                result = getattr(phases, entry.partition(":")[2])(json.loads(json.dumps(payload)))
            except Exception as error:
                return Outcome(status="error", error_type=type(error).__name__, error=str(error), stage=more["phase"])
            return Outcome(status="ok", result=json.loads(json.dumps(result)))

    return InProcess(folder, Facts.model_construct(), cache_dir, 0.0)


def fared(result: CaseResult, caught_by: str, words: str = "") -> dict[str, Any]:
    """How a fault fared: caught where an assertion whose name begins so, in evidence that holds `words`, missed."""
    missed = [a for a in result.assertions if not a.passed]
    named = [a for a in missed if a.name.startswith(caught_by) and words in a.detail]
    return {
        "caught": bool(named) and result.verdict is Verdict.FAILED, "expected": caught_by,
        "by": named[0].name if named else "", "message": _message(named[0]) if named else result.reason,
        "also": [a.name for a in missed if a not in named], "verdict": result.verdict,
    }  # fmt: skip


def _message(a: Assertion) -> str:
    seen = f"{a.value}{' ' + a.unit if a.unit else ''}"
    return f"{seen}, allowed {a.bound}. {a.detail}".strip()
