"""The processes of a comparison: one writes a checkpoint, one times canaries, and each engine's runs blocks when it is its turn.

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

from sparkproof.runners.child import progress, under_test, write_json
from sparkproof.scenario import ComparisonScenario, TrainScenario

LORA_B = 0.01  # standard deviation: the first loss then sees B, and is compared with hf's
LEARNING_RATE = 1e-4
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def canaries(payload: dict[str, Any]) -> dict[str, Any]:
    """`measure.canaries.take` in a process of its own."""
    from sparkproof.measure.canaries import take

    return take()


def prepare(payload: dict[str, Any]) -> dict[str, Any]:
    """Write the random checkpoint of a shape, in NF4, to `payload["folder"]`."""
    from sparkproof.bench.train import checkpoint
    from sparkproof.bench.train.setting import SHAPES, Setting
    from sparkproof.engines.base import native_device

    s = ComparisonScenario.model_validate(payload["scenario"])
    setting = Setting(
        model=s.shape, layers=s.layers or SHAPES[s.shape].layers, batch=s.batch, seq=s.seq_len, rank=s.rank, gc="on",
        steps=s.steps, warmup=s.warm_up, seed=s.seed, device="cuda" if native_device() == "cuda" else "cpu",
    )  # fmt: skip
    return checkpoint.write(setting, Path(payload["folder"]))


def engine(payload: dict[str, Any]) -> dict[str, Any]:
    """One engine from loading to its last turn; {"user_error"} for what the user must cure, such as a missing package."""
    from sparkproof.errors import UserError

    try:
        return _Side(payload).run()
    except UserError as e:
        return {"user_error": {"message": e.message, "fix": e.fix, "skip_class": e.skip_class}}


class _Side:
    """One engine's model, data and optimiser."""

    def __init__(self, payload: dict[str, Any]) -> None:
        from sparkproof.engines.registry import engine, import_first
        from sparkproof.runners.train_bench import work_in

        self.s = ComparisonScenario.model_validate(payload["scenario"])
        self.turns, self.name = Path(payload["turns"]), str(payload["engine"])
        self.engine = engine(self.name)
        with under_test(f"importing {self.name}"):
            import_first(self.name)
        self.source = TrainScenario.model_validate(payload["source"]) if payload["source"] else None
        self.folder, self.cache = payload["folder"], Path(payload["cache_dir"])
        self.start = time.perf_counter()
        work_in(self.turns / f"{self.name}-files")

    def run(self) -> dict[str, Any]:
        """Load, warm up, take turns; what the last turn left to say."""
        import torch

        from sparkproof.engines.base import native_device
        from sparkproof.measure.canaries import Watch

        self.cuda = native_device() == "cuda"
        self._load()
        first = self._warm_up()
        loaded = self._peaks()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._answer(0, first)
        blocks: list[dict[str, Any]] = []
        with open(self.turns / f"{self.name}.fifo", encoding="ascii") as turns:
            for line in turns:
                if line.strip() == "end":
                    break
                if self.cuda:
                    with Watch.of_device() as watch:
                        block = self._block(len(blocks))
                    block["during"] = watch.summary()
                else:
                    block = {**self._block(len(blocks)), "during": {}}
                blocks.append(block)
                self._answer(int(line), {"ms": block["ms"]})
        peaks = self._peaks()
        ran = self._proof()
        from sparkproof.engines import account

        return {
            **first, "blocks": blocks, "memory": peaks, "memory_loading": loaded, "ran": ran, "work": self._work(),
            "versions": account.versions(),
        }  # fmt: skip

    def _load(self) -> None:
        from sparkproof.engines.base import LoadSpec, native_compute, seed_lora
        from sparkproof.engines.loop import make_deterministic
        from sparkproof.engines.pretrained import resolve

        s, folder = self.s, self.folder
        if self.source is not None:
            found = resolve(self.source.model, self.source.revision, self.cache, self.source.model_dir)
            folder = str(found.path.resolve())
        targets = tuple(self.source.lora.target_modules) if self.source else SEVEN
        self.spec = LoadSpec(
            Path(folder), s.load_in_4bit, s.seq_len, s.rank, float(2 * s.rank), targets, native_compute(),
            checkpointing=s.checkpointing,
        )  # fmt: skip
        make_deterministic(s.seed)
        import torch

        torch.use_deterministic_algorithms(False)  # speed as users have it
        progress(f"{self.name}: loading")
        with under_test("loading the model"):
            self.model, self.tokenizer = self.engine.load(self.spec)
            self.model = self.engine.add_lora(self.model, self.spec)
        self.model.train()
        seed_lora(self.model, s.seed, LORA_B)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.engine.optimizer(self.parameters, LEARNING_RATE)
        self.batches = [self._inputs(b) for b in self._data()]
        self.load_s = time.perf_counter() - self.start

    def _data(self) -> list[Any]:
        from sparkproof.data.conversations import load_conversations
        from sparkproof.data.filled import filled, random_tokens

        s = self.s
        size: dict[str, int] = {"count": s.warm_up + s.steps, "batch": s.batch, "seq_len": s.seq_len, "seed": s.seed}
        if self.source is None:
            return random_tokens(self.model.config.vocab_size, **size)  # type: ignore[arg-type, union-attr]
        return filled(self.tokenizer, load_conversations(s.dataset), **size)

    def _inputs(self, batch: Any) -> dict[str, Any]:
        import torch

        device = self.spec.device
        return {  # no mask: nothing is padded
            "input_ids": torch.tensor(batch.input_ids, device=device),
            "labels": torch.tensor(batch.labels, device=device),
        }

    def _step(self, inputs: dict[str, Any], want_norm: bool = False) -> tuple[Any, float | None]:
        import torch

        with self.spec.autocast():
            out = self.model(**inputs, use_cache=False)
        loss = out.loss if hasattr(out, "loss") else out[0]
        loss.backward()
        norm = None
        if want_norm:
            norm = float(torch.stack([p.grad.float().norm() for p in self.parameters if p.grad is not None]).norm())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def _warm_up(self) -> dict[str, Any]:
        """Loss and gradient norm of the first step, and how long it took."""
        progress(f"{self.name}: warming up")
        with under_test("the first steps"):
            begin = time.perf_counter()
            loss, norm = self._step(self.batches[0], want_norm=True)
            value = float(loss)
            first_s = time.perf_counter() - begin
            for inputs in self.batches[1 : self.s.warm_up]:
                self._step(inputs)
            self._wait()
        gc.collect()
        return {"loss": _plain(value), "norm": _plain(norm), "first_step_s": first_s, "load_s": self.load_s}

    def _block(self, number: int) -> dict[str, Any]:
        """{"ms": each step's}; nothing waits for the device between steps."""
        progress(f"{self.name}: block {number + 1} of {self.s.rounds}")
        marks: list[Any] = []
        with under_test("a block of steps"):
            for inputs in self.batches[self.s.warm_up :]:
                marks.append(self._mark())
                self._step(inputs)
            marks.append(self._mark())
            self._wait()
        apart = (lambda a, b: float(a.elapsed_time(b))) if self.cuda else (lambda a, b: 1e3 * (b - a))
        return {"ms": [apart(a, b) for a, b in itertools.pairwise(marks)]}

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def _peaks(self) -> dict[str, float]:
        from sparkproof.engines import account

        return account.peak_memory()

    def _proof(self) -> dict[str, Any]:
        """What the engine's own account says of which kernels ran."""
        return vars(self.engine.ran(self.model))

    def _work(self) -> dict[str, Any]:
        """{"flops": of one step, "bytes"}, or {"why_not"}."""
        from sparkproof.engines.base import lora_parameters
        from sparkproof.measure.useful import Work

        elements = sum(p.numel() for p in lora_parameters(self.model).values())
        try:
            work = Work.of(self.model.config, elements, self.s.load_in_4bit)
        except ValueError as error:
            return {"why_not": str(error)}
        return {"flops": work.flops([self.s.seq_len] * self.s.batch), "bytes": work.bytes}

    def _answer(self, number: int, found: dict[str, Any]) -> None:
        write_json(self.turns / f"{self.name}-{number}.json", found)


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
