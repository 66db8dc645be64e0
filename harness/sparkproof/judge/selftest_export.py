"""Does the export judge judge? Plants faults into a tiny export, and says which of its assertions caught each.

Everything is real but the size: `sparktune.export`, the phases of an export case, transformers and llama.cpp as consumers, and
the judge, over a Llama of two layers with Llama 3's RoPE scaling that was taught one answer. Phases run in this process; the
whole trial is a process of its own (`in_process`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from pydantic import Field

from sparkproof.errors import UserError
from sparkproof.judge.selftest_train import ON_A_CPU
from sparkproof.results import Assertion, CaseResult, Strict, Verdict

SCHEMA: Literal["sparkproof/selftest-export/1"] = "sparkproof/selftest-export/1"
MODEL = "tiny:llama@256"
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
HEALTHY = {"merged_16bit": "transformers", "gguf_f16": "llama.cpp"}
MAX_KL = 5e-3


class ExportTrial(Strict):
    """How one planted fault fared."""

    id: str
    description: str
    format: str
    caught: bool = Field(description="The assertion that names this fault missed, in words that are this fault's.")
    expected: str = Field(description="How the name of that assertion begins.")
    by: str = Field(description="The name of the assertion, or empty.")
    message: str = Field(description="What it said: seen, allowed, evidence.")
    also: list[str] = Field(description="Other assertions that missed.")
    verdict: Verdict
    seconds: float


class Unplanted(Strict):
    """An export without a fault."""

    format: str
    consumer: str
    verdict: Verdict
    reason: str
    assertions: list[str] = Field(description="Names of all that it was held to.")


class ExportSelftest(Strict):
    """The document of `sparkproof selftest export --json`."""

    schema_: Literal["sparkproof/selftest-export/1"] = Field(alias="schema")
    passed: bool = Field(description="The exports without a fault passed, and every fault was caught by what names it.")
    caught: int
    total: int
    unplanted: list[Unplanted]
    seconds: float
    faults: list[ExportTrial]


def selftest_schema() -> str:
    """The text of `reports/schema/selftest-export-1.json`."""
    schema = ExportSelftest.model_json_schema(mode="serialization", by_alias=True)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "selftest-export-1.json"}
    return json.dumps({**head, **schema}, indent=2, ensure_ascii=False) + "\n"


def in_process(cache_dir: Path, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """`run` in a process of its own, on the CPU. Errors: UserError for a package that lacks."""
    command = [sys.executable, "-W", "ignore", "-m", "sparkproof.judge.selftest_export", str(cache_dir)]
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
        raise RuntimeError("the export judge could not be tried:\n" + "".join(errors)[-4000:])
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    if "error" in document:
        raise UserError(**document["error"])
    return document


def run(cache_dir: Path, only: Sequence[str] = (), tell: Callable[[str], None] = lambda text: None) -> ExportSelftest:
    """Try healthy exports, then each fault (or `only` these)."""
    from sparkproof.judge.export_faults import FAULTS

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sparkproof-selftest-") as name:
        folder = Path(name)
        tell("teaching a tiny model an answer")
        base, adapter = _taught(cache_dir, folder)
        healthy = []
        for format_, consumer in HEALTHY.items():
            tell(f"the {format_} without a fault")
            r = _trial(folder, base, adapter, f"healthy-{format_}", format_, None)
            healthy.append(
                Unplanted(
                    format=format_, consumer=consumer, verdict=r.verdict, reason=r.reason,
                    assertions=[a.name for a in r.assertions],
                )
            )  # fmt: skip
        trials = []
        for fault in FAULTS:
            if only and fault.id not in only:
                continue
            tell(fault.description)
            began = time.perf_counter()
            result = _trial(folder, base, adapter, fault.id, fault.format, fault)
            missed = [a for a in result.assertions if not a.passed]
            named = [a for a in missed if a.name.startswith(fault.caught_by) and fault.words in a.detail]
            trials.append(
                ExportTrial(
                    id=fault.id, description=fault.description, format=fault.format, expected=fault.caught_by,
                    caught=bool(named) and result.verdict is Verdict.FAILED, by=named[0].name if named else "",
                    message=_message(named[0]) if named else result.reason, verdict=result.verdict,
                    also=[a.name for a in missed if a not in named], seconds=round(time.perf_counter() - began, 2),
                )
            )  # fmt: skip
    return ExportSelftest(
        schema=SCHEMA, caught=sum(t.caught for t in trials), total=len(trials), unplanted=healthy, faults=trials,
        passed=all(u.verdict is Verdict.PASSED for u in healthy) and all(t.caught for t in trials),
        seconds=round(time.perf_counter() - start, 2),
    )  # fmt: skip


def _message(a: Assertion) -> str:
    seen = f"{a.value}{' ' + a.unit if a.unit else ''}"
    return f"{seen}, allowed {a.bound}. {a.detail}".strip()


def _taught(cache_dir: Path, folder: Path) -> tuple[Path, Path]:
    """A sharded base with Llama 3's RoPE scaling, and its adapter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from sparkproof.engines.tiny import tiny
    from sparkproof.runners.export_teach import teach

    source = tiny(MODEL, cache_dir).path
    config = AutoConfig.from_pretrained(source)
    config.rope_parameters = dict(ROPE)
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.bfloat16)
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base, max_shard_size="1MB")
    AutoTokenizer.from_pretrained(source).save_pretrained(base)
    teach(base, adapter)
    return base, adapter


@contextlib.contextmanager
def _planted(folder: Path, fault: Any) -> Iterator[None]:
    """`export_write.write` with the fault in it."""
    from sparkproof.runners import export_write

    if fault is None:
        yield
        return
    right = export_write.write

    def wrong(format_: str, base: Path, name: str, adapter: Path, out: Path) -> dict[str, Any]:
        spoilt = (base, adapter)
        if fault.sources is not None:
            spoilt = (folder / f"{fault.id}-base", folder / f"{fault.id}-adapter")
            for source, copy in zip((base, adapter), spoilt, strict=True):
                shutil.copytree(source, copy)
            fault.sources(*spoilt)
        done = right(format_, spoilt[0], name, spoilt[1], out)
        if fault.file is not None:
            fault.file(out, base, adapter)
        return done

    with mock.patch.object(export_write, "write", wrong):
        yield


def _trial(folder: Path, base: Path, adapter: Path, name: str, format_: str, fault: Any) -> CaseResult:
    from sparkproof.facts.model import Facts
    from sparkproof.runners import export, export_child, export_source
    from sparkproof.runners.base import Context
    from sparkproof.runners.process import Outcome
    from sparkproof.scenario import Case

    class InProcess(Context):
        """Phases as calls; what one raises is an outcome, as it is across processes."""

        def spawn(self, entry: str, payload: dict[str, Any], **more: Any) -> Outcome:
            try:
                result = getattr(export_child, entry.partition(":")[2])(json.loads(json.dumps(payload)))
            except Exception as error:
                return Outcome(status="error", error_type=type(error).__name__, error=str(error), stage=more["phase"])
            return Outcome(status="ok", result=json.loads(json.dumps(result)))

    known = export_source.Source(str(base), "", "", adapter, export_source.PROMPT, export_source.ANSWER)
    scenario = {"kind": "export", "summary": "an export to plant faults into", "source": MODEL, "format": format_,
                "consumer": HEALTHY[format_], "max_kl": MAX_KL}  # fmt: skip
    case = Case.model_validate({"name": name, "file": "selftest", "scenario": scenario})
    context = InProcess(folder / "run", Facts.model_construct(), folder / "cache", 0.0)
    with _planted(folder, fault), mock.patch.object(export_source, "get", lambda *args: known):
        return export.run(case, context)


def main(arguments: Sequence[str]) -> int:
    """Print the document, or `error`, what the user must cure, as the last line."""
    try:
        document = run(Path(arguments[0]), arguments[1:], lambda text: print(f"trying: {text}", file=sys.stderr))
        print(document.model_dump_json(by_alias=True))
    except UserError as e:
        print(json.dumps({"error": {"message": e.message, "fix": e.fix, "skip_class": e.skip_class}}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
