"""The parent: formats take turns in rounds, each written by one fresh process and read by another, then removed.

One export lies on the disk at a time. Whatever ends a run (Ctrl-C, a full disk, the end of the budget), what was measured is in
the document, and `save` gets that document after every turn, so that a machine that goes down loses one turn at most.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparkproof.bench.export import formats, summary
from sparkproof.bench.export.document import Device, Document, Model, Proof, Read, Row, Write
from sparkproof.bench.export.worker import DISK
from sparkproof.bench.train.run import said
from sparkproof.errors import UserError
from sparkproof.measure.memory import default_floor_gib
from sparkproof.results import ReasonClass
from sparkproof.runners import export_consumers
from sparkproof.runners.export import ENVIRONMENT, OFFLINE
from sparkproof.runners.process import Outcome, run_process

TIMEOUT_S = 3600.0  # of one process: tens of billions of parameters are written and read well within it
COMMAND = [sys.executable, "-W", "ignore", "-m", "sparkproof.runners.child"]
WORKER = "sparkproof.bench.export.worker"
LEAST = 16  # prompt tokens
Progress = Callable[[str], None]


class TimeUp(Exception):
    """No process may start any more."""


@dataclass
class Bench:
    """A run: what is exported, how it is read, and how long processes may start."""

    model: str
    formats: Sequence[str]
    device: Device
    device_name: str
    gpu_present: bool
    cache_dir: Path
    threads: int
    revision: str = ""
    adapter: Path | None = None
    prompt_tokens: int | None = None  # None: 512, or less where the model's window asks for it
    new_tokens: int | None = None  # None: 128, likewise
    repeats: int = 3
    rounds: int = 3
    budget: float = float("inf")
    progress: Progress = lambda line: None
    save: Callable[[Document], None] = lambda document: None
    clock: Callable[[], float] = time.monotonic
    started: float = 0.0
    rows: list[Row] = field(default_factory=list)
    prepared: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lacking: dict[str, export_consumers.Lacking | None] = field(default_factory=dict)

    def run(self) -> Document:
        """Measure. Errors: UserError for a model that can't be had, or a prompt that it has no room for."""
        self.started = self.clock()
        self.rows = [Row(format=f, consumer=formats.FORMATS[f].consumer, status="not reached") for f in self.formats]
        partial, interrupted = "", False
        with tempfile.TemporaryDirectory(prefix="sparkproof-bench-export-", ignore_cleanup_errors=True) as work:
            try:
                self._prepare(Path(work))
                for number in range(1, self.rounds + 1):
                    turn = (number - 1) % len(self.rows)
                    for row in self.rows[turn:] + self.rows[:turn]:  # each goes first in its turn
                        if row.status in ("not reached", "measured", "written"):
                            self._turn(row, number, Path(work))
                            self.save(self._document("it is still running", False))
            except TimeUp:
                partial = f"the budget of {self.budget:.0f} s was used up"
            except KeyboardInterrupt:
                partial, interrupted = "it was interrupted", True
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                partial = f"the disk of {work} became full. {DISK}".rstrip(".")
        return self._document(partial, interrupted)

    def _document(self, partial: str, interrupted: bool) -> Document:
        rows = [row.model_copy(deep=True) for row in self.rows]
        for row in rows:
            if row.status == "not reached":
                row.reason = row.reason or partial or "nothing could be measured"
            summary.finish(row)
        canary = summary.canary(rows)
        p = self.prepared
        model = None
        if p:
            model = Model(
                name=self.model, revision=p["base"]["revision"], parameters=p["parameters"], bytes=p["bytes"],
                window=p["window"], adapter=str(self.adapter) if self.adapter else _seeded(),
                adapter_parameters=p["adapter_parameters"],
            )  # fmt: skip
        return Document(
            device=self.device_name or p.get("device", ""), device_type=self.device, gpu_present=self.gpu_present,
            threads=self.threads, model=model, prompt_tokens=self.prompt_tokens or 0, new_tokens=self.new_tokens or 0,
            repeats=self.repeats, rounds=self.rounds, software=p.get("software", {}), rows=rows, canary=canary,
            trusted=self.device == "cpu" or (canary is not None and abs(canary.drift) <= canary.band), partial=partial,
            interrupted=interrupted, notes=list(dict.fromkeys(self.notes)), seconds=round(self.clock() - self.started, 1),
        )  # fmt: skip

    def _prepare(self, work: Path) -> None:
        over = formats.OVER_BASE in self.formats
        self.progress(f"preparing {self.model}")
        outcome = self._process(
            "prepare",
            {
                "model": self.model, "revision": self.revision, "cache_dir": str(self.cache_dir),
                "adapter": str(self.adapter or ""), "adapter_out": str(work / "the-adapter"),
                "base_gguf": str(work / "base.gguf") if over else "",
            },
            work, ENVIRONMENT,
        )  # fmt: skip
        if outcome.status != "ok":
            raise UserError(
                f"{self.model} could not be prepared: {said(outcome)}.", f"Run with --debug. {_end(outcome)}".strip(), 1
            )
        if "user_error" in outcome.result:
            e = outcome.result["user_error"]
            raise UserError(e["message"], e["fix"])
        self.prepared = outcome.result
        self._fit_window()
        if why := self.prepared["without_base_gguf"]:
            row = next(r for r in self.rows if r.format == formats.OVER_BASE)
            row.status, row.fix = ("failed", DISK) if self.prepared["disk_full"] else ("missing", "")
            row.reason = f"the base can't be written as GGUF: {why}"

    def _fit_window(self) -> None:
        """Errors: UserError when the model was made for fewer tokens than were asked for."""
        window = self.prepared["window"]
        asked = (self.prompt_tokens or LEAST) + (self.new_tokens or 2)
        if window is not None and asked > window:
            raise UserError(
                f"{self.model} was made for {window} tokens, and --prompt and --tokens ask for {asked}.",
                f"For instance --prompt {window // 2} --tokens {window // 4}.",
            )
        room = window if window is not None else 1 << 30
        if self.prompt_tokens is None:
            self.prompt_tokens = min(512, room // 2, room - (self.new_tokens or 2))
        if self.new_tokens is None:
            self.new_tokens = min(128, max(2, room // 4), room - self.prompt_tokens)

    def _turn(self, row: Row, number: int, work: Path) -> None:
        way = formats.FORMATS[row.format]
        lacking = None if way.elsewhere else self._lacking(row)
        out = work / formats.filename(row.format)
        self.progress(f"round {number} of {self.rounds}: {row.format}")
        try:
            if not self._written(row, number, out, work):
                return
            if way.elsewhere or lacking is not None:
                row.status, row.reason = "written", way.elsewhere or (lacking.sentence if lacking else "")
                row.fix = lacking.fix if lacking else ""
                return
            self._read(row, number, out, work)
        finally:
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)

    def _written(self, row: Row, number: int, out: Path, work: Path) -> bool:
        p = self.prepared
        payload = {
            "format": row.format, "base": p["base"]["path"], "name": p["base"]["name"], "adapter": p["adapter"],
            "out": str(out), "made": self.model.startswith("tiny:"),
        }  # fmt: skip
        outcome = self._process("write", payload, work)
        if not self._went_well(row, number, outcome):
            return False
        r = outcome.result
        row.bytes, row.types, row.fallbacks = r["bytes"], r["types"], r["fallbacks"]
        row.writes.append(
            Write(
                number=number, seconds=r["seconds"], process_s=outcome.duration_s, peak_gib=r["peak_gib"],
                gpu_gib=r["gpu_gib"] if self.device == "cuda" else None,
            )
        )  # fmt: skip
        self.progress(f"  written in {r['seconds']:.2f} s, {r['bytes'] / 2**20:.1f} MiB")
        return True

    def _read(self, row: Row, number: int, out: Path, work: Path) -> None:
        p = self.prepared
        payload = {
            "format": row.format, "consumer": row.consumer, "path": str(out), "base": p["base"]["path"],
            "base_gguf": str(work / "base.gguf"), "device": self.device, "gpu_present": self.gpu_present,
            "threads": self.threads, "vocabulary": p["vocabulary"], "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens, "repeats": self.repeats,
        }  # fmt: skip
        with export_consumers.surroundings(row.consumer, self.cache_dir) as (env, other):
            outcome = self._process("read", payload, work, {**OFFLINE, **env}, **other)
        if not self._went_well(row, number, outcome):
            return
        r = outcome.result
        row.proof = Proof.model_validate(r["proof"])
        if "refusal" in r:
            row.status, row.reason, row.fix = "wrong backend", r["refusal"]["reason"], r["refusal"]["fix"]
            row.failure_row, row.failed_round = r["refusal"]["row"], number
            self.progress(f"  {row.reason}")
            return
        row.status = "measured"
        row.reads.append(Read(number=number, **{k: v for k, v in r.items() if k != "why_no_peak"}))
        prefill, decode = summary.middle(r["prefill_tokens_s"]), summary.middle(r["decode_tokens_s"])
        self.progress(f"  read by {row.consumer}: {prefill:,.0f} prompt tokens/s, {decode:,.1f} tokens/s")

    def _went_well(self, row: Row, number: int, outcome: Outcome) -> bool:
        """Whether there is a result; otherwise the row says why not."""
        if outcome.status == "ok" and "user_error" not in outcome.result:
            if why := outcome.result.get("why_no_peak"):
                self.notes.append(f"No peak of memory: {why}.")
            return True
        row.failed_round = number
        if outcome.status == "ok":
            e = outcome.result["user_error"]
            row.status = "missing" if e["skip_class"] == ReasonClass.PLATFORM.value else "failed"
            row.reason, row.fix = e["message"], e["fix"]
        else:
            row.status, row.reason, row.log = "failed", said(outcome), outcome.output_tail
        self.progress(f"  {row.status}: {row.reason}")
        return False

    def _lacking(self, row: Row) -> export_consumers.Lacking | None:
        """What reading a format needs and is not here; looked for once."""
        if row.format not in self.lacking:
            self.lacking[row.format] = export_consumers.lacking_for(
                row.consumer, row.format, self.cache_dir, self.gpu_present
            )
        return self.lacking[row.format]

    def _process(
        self, phase: str, payload: dict[str, Any], work: Path, env: dict[str, str] = OFFLINE, python: str = ""
    ) -> Outcome:
        """One fresh process, of another environment's `python` if given. Errors: TimeUp once the budget is used up."""
        if self.clock() - self.started >= self.budget:
            raise TimeUp
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}  # else llama.cpp offloads products to it
        return run_process(
            [python or COMMAND[0], *COMMAND[1:], f"{WORKER}:{phase}"], payload, work_dir=work, phase=phase, timeout_s=TIMEOUT_S,
            floor_gib=default_floor_gib(), env={**os.environ, **env, "OMP_NUM_THREADS": str(self.threads), **hidden},
        )  # fmt: skip


def _end(o: Outcome) -> str:
    lines = o.output_tail.strip().splitlines()
    return f"Its last words: {lines[-1][:300]}" if lines else ""


def _seeded() -> str:
    from sparkproof.bench.export.adapter import WORDS

    return WORDS
