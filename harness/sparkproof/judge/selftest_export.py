"""Does the export judge judge? Plants faults into a tiny export, and says which of its assertions caught each.

Everything is real but the size: `sparktune.export`, the phases of an export case, transformers and llama.cpp as consumers, and
the judge, over a Llama of two layers with Llama 3's RoPE scaling that was taught one answer. Phases run in this process; the
whole trial is a process of its own (`in_process`).
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from pydantic import Field

from sparkproof.judge import planting
from sparkproof.results import CaseResult, Strict, Verdict

SCHEMA: Literal["sparkproof/selftest-export/1"] = "sparkproof/selftest-export/1"
MODEL = "tiny:llama@256"
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
HEALTHY = {"merged_16bit": "transformers", "gguf_f16": "llama.cpp", "gguf_q4_0": "llama.cpp"}
MAX_KL = {"merged_16bit": 5e-3, "gguf_f16": 5e-3, "gguf_q4_0": 1.5}
CLEAR = {"gguf_q4_0": 3.0}


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
    return planting.schema_text(ExportSelftest, "selftest-export-1.json")


def in_process(cache_dir: Path, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """`run` in a process of its own, on the CPU. Errors: UserError for a package that lacks."""
    return planting.ask("sparkproof.judge.selftest_export", [str(cache_dir)], "the export judge", progress)


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
            trials.append(
                ExportTrial(
                    id=fault.id, description=fault.description, format=fault.format,
                    seconds=round(time.perf_counter() - began, 2), **planting.fared(result, fault.caught_by, fault.words),
                )
            )  # fmt: skip
    return ExportSelftest(
        schema=SCHEMA, caught=sum(t.caught for t in trials), total=len(trials), unplanted=healthy, faults=trials,
        passed=all(u.verdict is Verdict.PASSED for u in healthy) and all(t.caught for t in trials),
        seconds=round(time.perf_counter() - start, 2),
    )  # fmt: skip


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
    from sparkproof.runners import export, export_child, export_source
    from sparkproof.scenario import Case

    known = export_source.Source(str(base), "", "", adapter, export_source.PROMPT, export_source.ANSWER)
    scenario = {"kind": "export", "summary": "an export to plant faults into", "source": MODEL, "format": format_,
                "consumer": HEALTHY[format_], "max_kl": MAX_KL, "clear_margin": CLEAR}  # fmt: skip
    case = Case.model_validate({"name": name, "file": "selftest", "scenario": scenario})
    context = planting.in_this_process(export_child, folder / "run", folder / "cache")
    with _planted(folder, fault), mock.patch.object(export_source, "get", lambda *args: known):
        return export.run(case, context)


def main(arguments: Sequence[str]) -> int:
    """Print the document, or `error`, what the user must cure, as the last line."""
    return planting.answer(lambda tell: run(Path(arguments[0]), arguments[1:], tell))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
