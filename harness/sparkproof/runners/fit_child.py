"""The process of a `fit` case: one engine's model, and at each context the largest batch whose step fits."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparkproof.errors import UserError
from sparkproof.measure.memory import GIB, available_gib
from sparkproof.measure.search import search
from sparkproof.runners.child import progress, under_test
from sparkproof.runners.one_model import Loaded
from sparkproof.scenario import FitScenario

POLL_S = 0.005


def fit(payload: dict[str, Any]) -> dict[str, Any]:
    """{"loaded_gib", "limit_gib", "rows": one a context, "ran_out": what ran out of memory, or ""}; or {"user_error"}."""
    try:
        return _Search(payload).run()
    except UserError as e:
        return {"user_error": {"message": e.message, "fix": e.fix, "skip_class": e.skip_class}}


class _Search:
    def __init__(self, payload: dict[str, Any]) -> None:
        self.s = FitScenario.model_validate(payload["scenario"])
        self.floor_gib = float(payload["floor_gib"])
        self.model = Loaded(payload, self.s, self.s.engine, max(self.s.contexts), Path(payload["work"]))
        self.loaded_gib = self._held()

    def run(self) -> dict[str, Any]:
        """Each context in rising order."""
        limit = self.s.limit_gib or self._room()
        rows, ran_out = [], ""
        for context in sorted(set(self.s.contexts)):
            try:
                found = search(
                    lambda batch, n=context: self._planned(batch, n),  # type: ignore[misc]
                    lambda batch, n=context: self._measured(batch, n),  # type: ignore[misc]
                    limit, self.s.most_batch, self.s.most_step_s,
                )  # fmt: skip
            except _OutOfMemory as e:
                ran_out = str(e)
                break
            last = next((t for t in found.tried if t.batch == found.batch), None)
            rows.append(
                {
                    "context": context, "batch": found.batch, "predicted": found.predicted, "why": found.why,
                    "planned_gib": last.planned if last else self._planned(1, context),
                    "peak_gib": last.measured if last else None,
                    "tokens_per_s": found.batch * context / last.seconds if last else None,
                    "tried": [asdict(t) for t in found.tried],
                }
            )  # fmt: skip
        return {
            "limit_gib": limit, "loaded_gib": self.loaded_gib, "rows": rows, "ran_out": ran_out,
            "ran": vars(self.model.engine.ran(self.model.model)),
        }  # fmt: skip

    def _planned(self, batch: int, context: int) -> float:
        """`sparktune.plan`'s peak in GiB; for a model with experts what is loaded and its layers' inputs, roughly."""
        from sparktune.planning import GB10, ModelShape, plan

        config = self.model.model.config
        try:
            shape = ModelShape.of(config)
        except ValueError:
            text = config.get_text_config()
            kept = text.num_hidden_layers * text.hidden_size * 2 * (1 if self.s.checkpointing else 17)
            return self.loaded_gib + batch * context * (kept + 4 * text.vocab_size) / GIB
        device = dataclasses.replace(GB10, sms=self._multiprocessors())
        found = plan(
            shape, device, batch=batch, sequence=context, rank=self.s.rank, checkpointing=self.s.checkpointing,
            load_in_4bit=self.s.load_in_4bit,
        )  # fmt: skip
        stored = (found.bytes["weights"] + found.bytes["embedding and head"]) / GIB
        # What is held before a step and is not in the plan: on a CPU the whole interpreter.
        return found.peak / GIB + max(0.0, self.loaded_gib - stored)

    def _multiprocessors(self) -> int:
        if not self.model.cuda:
            return 1
        import torch

        return int(torch.cuda.get_device_properties(0).multi_processor_count)

    def _measured(self, batch: int, context: int) -> tuple[float, float]:
        """(peak in GiB, seconds) of the second of two steps; the first makes the optimiser's moments and compiles."""
        progress(f"{self.s.engine}: {batch} rows of {context} tokens")
        import torch

        (inputs,) = self.model.random_inputs(batch, context)
        try:
            with under_test(f"{batch} rows of {context} tokens"), self._peak() as peak:
                self.model.step(inputs)
                self.model.wait()
                start = time.perf_counter()
                self.model.step(inputs)
                self.model.wait()
                seconds = time.perf_counter() - start
        except torch.OutOfMemoryError as e:
            raise _OutOfMemory(f"{batch} rows of {context} tokens: {str(e).splitlines()[0]}") from e
        return peak[0], seconds

    @contextlib.contextmanager
    def _peak(self) -> Iterator[list[float]]:
        """The most that this process holds meanwhile, GiB: what the allocator took of the device, else resident memory."""
        found = [0.0]
        if self.model.cuda:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            yield found
            found[0] = torch.cuda.max_memory_reserved() / GIB
            return
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(POLL_S):
                found[0] = max(found[0], self._held())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            stop.set()
            thread.join()
            found[0] = max(found[0], self._held())

    def _held(self) -> float:
        """GiB that this process holds now, by the same count as a peak."""
        if self.model.cuda:
            import torch

            return torch.cuda.memory_reserved() / GIB
        import psutil

        return float(psutil.Process().memory_info().rss) / GIB

    def _room(self) -> float:
        """GiB that a step may take: what this process holds, and what is available to it above the floor."""
        if self.model.cuda:
            import torch

            if not torch.cuda.get_device_properties(0).is_integrated:
                return self._held() + 0.95 * torch.cuda.mem_get_info()[0] / GIB
        return self._held() + max(0.0, available_gib() - self.floor_gib)


class _OutOfMemory(Exception):
    """A step ran out of memory, which the search is there to avoid."""
