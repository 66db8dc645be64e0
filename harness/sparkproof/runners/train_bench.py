"""A scenario on its engine, in the process that runs it: the base loaded, the data made, and what phases ask of both."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from sparkproof.data.conversations import exchange, load_conversations
from sparkproof.data.rows import TrainingData, make_row, training_data
from sparkproof.engines.pretrained import resolve
from sparkproof.runners.child import progress, under_test
from sparkproof.scenario import TrainScenario

PARITY_B = 0.02  # standard deviation of LoRA's B where gradients are compared: near what training reaches


class Bench:
    """A scenario on its engine: the base loaded, the data made."""

    def __init__(self, payload: dict[str, Any], engine_name: str = "", compute: str = "") -> None:
        from sparkproof.engines.base import LoadSpec
        from sparkproof.engines.loop import make_deterministic
        from sparkproof.engines.registry import engine, import_first

        self.scenario = s = TrainScenario.model_validate(payload["scenario"])
        self.engine = engine(engine_name or s.engine)
        with under_test(f"importing {self.engine.name}"):
            import_first(self.engine.name)
        progress("finding the model")
        self.dataset = str(Path(s.dataset).resolve()) if Path(s.dataset).is_file() else s.dataset
        self.pretrained = resolve(s.model, s.revision, Path(payload["cache_dir"]), s.model_dir)
        if self.pretrained.source in ("hub", "folder"):
            from sparkproof.engines.need import need_memory

            need_memory(self.pretrained.path, s)
        self.spec = LoadSpec(
            folder=self.pretrained.path.resolve(),
            load_in_4bit=s.load_in_4bit,
            seq_len=s.seq_len,
            rank=s.lora.rank,
            alpha=s.lora.alpha,
            target_modules=tuple(s.lora.target_modules),
            compute=compute or native(payload),  # type: ignore[arg-type]
        )
        make_deterministic(s.seed)
        if self.engine.name == "unsloth":
            work_in(Path(payload["adapter"]).parent)
        progress(f"loading with {self.engine.name}")
        start = time.perf_counter()
        with under_test("loading the model"):
            self.model, self.tokenizer = self.engine.load(self.spec)
        self.load_s = time.perf_counter() - start
        self.data = self._data()

    def _data(self) -> TrainingData:
        s = self.scenario
        return training_data(
            self.tokenizer,
            load_conversations(self.dataset),
            canary=exchange(s.gate.canary_prompt, s.gate.canary_answer),
            steps=s.steps,
            batch=s.batch,
            seq_len=s.seq_len,
            seed=s.seed,
        )

    @property
    def closest(self) -> bool:
        """Whether this computes as exactly as the engine can."""
        return self.spec.compute == "fp32" or not self.engine.has_fp32

    def answer(self) -> str:
        """What the model says to the canary's question, greedily, in as many tokens as the answer's turn has and 3 more."""
        gate = self.scenario.gate
        row = make_row(self.tokenizer, exchange(gate.canary_prompt, gate.canary_answer), self.scenario.seq_len)
        ids, room = row.prompt, row.learnt + 3
        with under_test("generating"), self.spec.autocast():
            out = self.engine.generate(self.model, self.tokenizer, ids, room)
        return str(self.tokenizer.decode(out, skip_special_tokens=True))

    def probe(self) -> Any:
        """Logits at the last positions of the canary conversation."""
        from sparkproof.engines.account import logits

        return logits(self.model, self.canary_row(), self.spec)

    def canary_row(self) -> tuple[int, ...]:
        """Tokens of the canary conversation."""
        gate = self.scenario.gate
        return make_row(self.tokenizer, exchange(gate.canary_prompt, gate.canary_answer), self.scenario.seq_len).ids

    def data_account(self) -> dict[str, Any]:
        """What was fed: counts, and a digest that two processes must share."""
        d = self.data
        return {
            "digest": d.digest(),
            "conversations": d.conversations,
            "dropped": d.dropped,
            "canary_rows": d.canary_rows,
            "rows": sum(len(b.input_ids) for b in d.batches),
            "held_out_rows": len(d.held_out.input_ids),
            "misplaced": sum(b.misplaced for b in [*d.batches, d.held_out]),
            "fewest_learnt": min(b.learnt for b in d.batches),
        }

    def gradients(self, out: Path, plain: bool = False) -> dict[str, Any]:
        """Loss and LoRA gradients of the first batch with seeded, non-zero A and B; the gradients go to `out`."""
        from safetensors.torch import save_file

        from sparkproof.engines.base import lora_parameters, seed_lora
        from sparkproof.engines.loop import forward_backward, token_losses
        from sparkproof.engines.plain import make_plain

        seed_lora(self.model, self.scenario.seed, PARITY_B)
        self.model.zero_grad(set_to_none=True)
        with under_test("the first step"):
            if plain:
                make_plain(self.model)
            self.model.train()
            loss = forward_backward(self.model, self.data.batches[0], self.spec)
            tokens = token_losses(self.model, self.data.batches[0], self.spec)
        grads = {
            n: p.grad.float().cpu().contiguous() for n, p in lora_parameters(self.model).items() if p.grad is not None
        }
        save_file(grads, out)
        return {"loss": loss, "token_losses": tokens, "file": str(out), "tensors": len(grads)}

    def fed(self) -> dict[str, Any]:
        """Two rows of the run fed in three ways, over the LoRA that `gradients` seeded."""
        from sparkproof.engines.feeding import three_ways, unlike_rows

        with under_test("packing and accumulating"):
            return three_ways(self.model, unlike_rows(self.data.batches), self.spec)

    def merged(self, adapter: Path) -> dict[str, float]:
        """The saved adapter merged, compared with the model that carries it."""
        from sparkproof.engines.merging import merged_account

        with under_test("merging the adapter"):
            return merged_account(self.model, adapter, self.canary_row(), self.spec)


def native(payload: dict[str, Any]) -> str:
    """What training computes in; a payload may ask for what this machine would not choose."""
    from sparkproof.engines.base import native_compute

    return str(payload.get("compute") or native_compute())


def work_in(folder: Path) -> None:
    """Stand in the case's own folder: Unsloth writes the code that it compiles into the working directory."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
