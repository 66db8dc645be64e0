"""One model on one engine, ready to step: what comparisons and searches for the largest batch do in their processes.

The model is a train case's, or random weights in a real model's shapes (a checkpoint that `prepare` wrote). LoRA has seeded
values, B among them, the optimiser is what `optim="adamw_8bit"` gives the engine's users, and inputs have no padding.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sparkproof.errors import UserError
from sparkproof.runners.child import progress, under_test
from sparkproof.scenario import Case, OnOneModel, TrainScenario

LORA_B = 0.01  # standard deviation: the first loss then sees B
LEARNING_RATE = 1e-4
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def source_of(s: OnOneModel, cases: dict[str, Case]) -> TrainScenario | None:
    """The train scenario that `s` names; None with a shape. Errors: UserError where there is none of that name."""
    if not s.source:
        return None
    found = cases.get(s.source)
    if found is None or not isinstance(found.scenario, TrainScenario):
        raise UserError(
            f"There is no train case '{s.source}', which the scenario names as its source.",
            "`sparkproof list --kind train` shows all.",
        )
    return found.scenario


def described(s: OnOneModel, source: TrainScenario | None) -> tuple[str, str]:
    """(family, model), as the report says them."""
    if source is not None:
        return s.source.split("/")[1] if s.source.count("/") > 1 else "", source.model
    from sparkproof.bench.train.setting import SHAPES

    shape = SHAPES[s.shape]
    layers = s.layers or shape.layers
    of = f"{layers} layers" if layers == shape.layers else f"{layers} of {shape.layers} layers"
    return str(shape.kind), f"{s.shape}'s shapes with random weights, {of}"


def prepare(payload: dict[str, Any]) -> dict[str, Any]:
    """Write the random checkpoint of a shape, in NF4, to `payload["folder"]`; the entry of a process."""
    from sparkproof.bench.train import checkpoint
    from sparkproof.bench.train.setting import SHAPES, Setting
    from sparkproof.engines.base import native_device

    shape, layers, seed = (payload["scenario"][k] for k in ("shape", "layers", "seed"))
    setting = Setting(
        model=shape, layers=layers or SHAPES[shape].layers, batch=1, seq=16, rank=1, gc="on", steps=1, warmup=1,
        seed=seed, device="cuda" if native_device() == "cuda" else "cpu",
    )  # fmt: skip
    return checkpoint.write(setting, Path(payload["folder"]))


class Loaded:
    """A model of one engine with LoRA, its parameters and optimiser. `payload` has source, cache_dir, folder."""

    def __init__(self, payload: dict[str, Any], s: OnOneModel, name: str, seq_len: int, work: Path) -> None:
        from sparkproof.engines.registry import engine, import_first
        from sparkproof.runners.train_bench import work_in

        self.s, self.name, self.start = s, name, time.perf_counter()
        self.source = TrainScenario.model_validate(payload["source"]) if payload["source"] else None
        self.engine = engine(name)
        with under_test(f"importing {name}"):
            import_first(name)
        folder = Path(payload["folder"])
        if self.source is not None:
            from sparkproof.engines.pretrained import resolve

            found = resolve(self.source.model, self.source.revision, Path(payload["cache_dir"]), self.source.model_dir)
            folder = found.path.resolve()
        work_in(work)
        self._load(folder, seq_len)
        self.load_s = time.perf_counter() - self.start

    def _load(self, folder: Path, seq_len: int) -> None:
        import torch

        from sparkproof.engines.base import LoadSpec, native_compute, native_device, seed_lora

        s = self.s
        self.cuda = native_device() == "cuda"
        torch.manual_seed(s.seed)
        self.spec = LoadSpec(
            folder, s.load_in_4bit, seq_len, s.rank, float(2 * s.rank),
            tuple(self.source.lora.target_modules) if self.source else SEVEN, native_compute(),
            checkpointing=s.checkpointing,
        )  # fmt: skip
        progress(f"{self.name}: loading")
        with under_test("loading the model"):
            model, self.tokenizer = self.engine.load(self.spec)
            self.model: Any = self.engine.add_lora(model, self.spec)
        self.model.train()
        seed_lora(self.model, s.seed, LORA_B)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.engine.optimizer(self.parameters, LEARNING_RATE)

    def random_inputs(self, batch: int, seq_len: int, count: int = 1) -> list[dict[str, Any]]:
        """`count` batches of random tokens."""
        from sparkproof.data.filled import random_tokens

        vocabulary = self.model.config.get_text_config().vocab_size
        made = random_tokens(vocabulary, count=count, batch=batch, seq_len=seq_len, seed=self.s.seed)
        return [self.inputs(b) for b in made]

    def inputs(self, batch: Any) -> dict[str, Any]:
        """A batch on the device; without a mask, since nothing of it is padded."""
        import torch

        return {
            "input_ids": torch.tensor(batch.input_ids, device=self.spec.device),
            "labels": torch.tensor(batch.labels, device=self.spec.device),
        }

    def step(self, inputs: dict[str, Any], want_norm: bool = False) -> tuple[Any, float | None]:
        """One optimiser step: the loss as a tensor, and the gradient norm where it is asked for."""
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

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
