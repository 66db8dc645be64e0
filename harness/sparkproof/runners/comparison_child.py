"""The processes of a comparison: one times canaries, and each engine's runs blocks of steps when it is its turn.

An engine's process loads, warms up and then waits on a FIFO for its turn. A turn is a number and a line end: it runs its steps,
writes what it saw to `<turns>/<engine>-<number>.json`, and waits again; "end" ends it. Nothing of it runs while it waits.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from pathlib import Path
from typing import Any

from sparkproof.errors import UserError
from sparkproof.runners.child import progress, under_test, write_json
from sparkproof.runners.one_model import Loaded
from sparkproof.scenario import ComparisonScenario


def canaries(payload: dict[str, Any]) -> dict[str, Any]:
    """`measure.canaries.take` in a process of its own."""
    from sparkproof.measure.canaries import take

    return take()


def engine(payload: dict[str, Any]) -> dict[str, Any]:
    """One engine from loading to its last turn; {"user_error"} for what the user must cure, such as a missing package."""
    try:
        return _Side(payload).run()
    except UserError as e:
        return {"user_error": {"message": e.message, "fix": e.fix, "skip_class": e.skip_class}}


class _Side:
    """One engine's model and its turns."""

    def __init__(self, payload: dict[str, Any]) -> None:
        self.s = ComparisonScenario.model_validate(payload["scenario"])
        self.turns, self.name = Path(payload["turns"]), str(payload["engine"])
        self.model = Loaded(payload, self.s, self.name, self.s.seq_len, self.turns / f"{self.name}-files")
        self.batches = self._data()

    def run(self) -> dict[str, Any]:
        """Warm up, take turns; what the last turn left to say."""
        import torch

        from sparkproof.engines import account
        from sparkproof.measure.canaries import Watch

        first = self._warm_up()
        loading = account.peak_memory()
        if self.model.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._answer(0, first)
        blocks: list[dict[str, Any]] = []
        with open(self.turns / f"{self.name}.fifo", encoding="ascii") as turns:
            for line in turns:
                if line.strip() == "end":
                    break
                if self.model.cuda:
                    with Watch.of_device() as watch:
                        ms = self._block(len(blocks))
                    blocks.append({"ms": ms, "during": watch.summary()})
                else:
                    blocks.append({"ms": self._block(len(blocks)), "during": {}})
                self._answer(int(line), {})
        return {
            **first, "architecture": str(self.model.model.config.model_type), "blocks": blocks,
            "memory": account.peak_memory(), "memory_loading": loading, "work": self._work(),
            "ran": vars(self.model.engine.ran(self.model.model)), "versions": account.versions(),
        }  # fmt: skip

    def _data(self) -> list[dict[str, Any]]:
        from sparkproof.data.conversations import load_conversations
        from sparkproof.data.filled import filled

        s, count = self.s, self.s.warm_up + self.s.steps
        if self.model.source is None:
            return self.model.random_inputs(s.batch, s.seq_len, count)
        made = filled(
            self.model.tokenizer,
            load_conversations(s.dataset),
            count=count,
            batch=s.batch,
            seq_len=s.seq_len,
            seed=s.seed,
        )
        return [self.model.inputs(b) for b in made]

    def _warm_up(self) -> dict[str, Any]:
        """Loss and gradient norm of the first step, and how long it took."""
        progress(f"{self.name}: warming up")
        with under_test("the first steps"):
            begin = time.perf_counter()
            loss, norm = self.model.step(self.batches[0], want_norm=True)
            value = float(loss)
            first_s = time.perf_counter() - begin
            for inputs in self.batches[1 : self.s.warm_up]:
                self.model.step(inputs)
            self.model.wait()
        gc.collect()
        return {"loss": _plain(value), "norm": _plain(norm), "first_step_s": first_s, "load_s": self.model.load_s}

    def _block(self, number: int) -> list[float]:
        """Milliseconds of each step; nothing waits for the device between them."""
        progress(f"{self.name}: block {number + 1}")
        marks: list[Any] = []
        with under_test("a block of steps"):
            for inputs in self.batches[self.s.warm_up :]:
                marks.append(self._mark())
                self.model.step(inputs)
            marks.append(self._mark())
            self.model.wait()
        if self.model.cuda:
            return [float(a.elapsed_time(b)) for a, b in itertools.pairwise(marks)]
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]

    def _mark(self) -> Any:
        if not self.model.cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _work(self) -> dict[str, Any]:
        """{"flops": of one step, "bytes"}, or {"why_not"}."""
        from sparkproof.measure.useful import Work

        try:
            work = Work.of(self.model.model.config, sum(p.numel() for p in self.model.parameters), self.s.load_in_4bit)
        except ValueError as error:
            return {"why_not": str(error)}
        return {"flops": work.flops([self.s.seq_len] * self.s.batch), "bytes": work.bytes}

    def _answer(self, number: int, found: dict[str, Any]) -> None:
        write_json(self.turns / f"{self.name}-{number}.json", found)


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
