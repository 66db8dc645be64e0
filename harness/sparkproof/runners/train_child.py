"""The phases of a training case, each the entry of a fresh process.

`train` is the run itself. `again` reads the saved adapter back over a freshly loaded base, repeats the first steps and
computes the step-0 gradients. `reference_gradients` computes those of the `hf` engine for another engine's case. None
of them judges: they return what was seen, and `sparkproof.runners.gate` judges it.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from sparkproof.data.conversations import exchange, load_conversations
from sparkproof.data.rows import TrainingData, make_row, training_data
from sparkproof.engines.pretrained import resolve
from sparkproof.errors import UserError
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
            _work_in(Path(payload["adapter"]).parent)
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


def _work_in(folder: Path) -> None:
    """Stand in the case's own folder: Unsloth writes the code that it compiles into the working directory."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)


def train(payload: dict[str, Any]) -> dict[str, Any]:
    """The run: load, ask for the canary, train, ask again, save."""
    return _guarded(_train, payload)


def again(payload: dict[str, Any]) -> dict[str, Any]:
    """In a fresh process: read back, repeat, and step-0 gradients."""
    return _guarded(_again, payload)


def reference_gradients(payload: dict[str, Any]) -> dict[str, Any]:
    """Step-0 loss and gradients of the `hf` engine, in fp32 and, where training runs in bf16, in bf16 too."""

    def work(payload: dict[str, Any]) -> dict[str, Any]:
        bench = Bench(payload, "hf")
        bench.model = bench.engine.add_lora(bench.model, bench.spec)
        return _gradients(payload, bench, with_plain=False)

    return _guarded(work, payload)


def native(payload: dict[str, Any]) -> str:
    """What training computes in; a payload may ask for what this machine would not choose."""
    from sparkproof.engines.base import native_compute

    return str(payload.get("compute") or native_compute())


def _gradients(
    payload: dict[str, Any], bench: Bench, with_plain: bool, adapter: Path | None = None, merged: Any = None
) -> dict[str, Any]:
    """Step-0 gradients by name: what training computes in, and fp32 where that is another and the engine can.

    `with_plain` adds those of plain PyTorch over the same weights, which is what `hf` itself is held to. With `adapter`, the
    saved one, the closest of them also has what `fed` and `merged` give; `merged` is what a bench that is closest gave.
    """
    engine = bench.engine
    found: dict[str, Any] = {}

    def add(bench: Bench, merged: Any = None) -> None:
        for plain in (False, True) if with_plain else (False,):
            name = f"{'plain-' if plain else ''}{bench.spec.compute}"
            progress(f"gradients of the first step, {name}")
            found[name] = bench.gradients(Path(f"{payload['gradients']}-{name}.safetensors"), plain)
            if merged is not None and not plain:
                progress("the same rows packed and accumulated")
                found[name] |= {"merged": merged, "fed": bench.fed()}

    wants_close = not bench.closest
    add(bench, merged)
    if wants_close:
        del bench
        close = Bench(payload, engine.name, "fp32")
        close.model = (
            engine.read_adapter(close.model, adapter, close.spec)
            if adapter
            else engine.add_lora(close.model, close.spec)
        )
        add(close, close.merged(adapter) if adapter else None)
    return found


def _guarded(work: Any, payload: dict[str, Any]) -> dict[str, Any]:
    """What the user must cure comes back as data, with the class of its reason, instead of as a traceback."""
    try:
        result: dict[str, Any] = work(payload)
        return result
    except UserError as error:
        return {"user_error": {"message": error.message, "fix": error.fix, "skip_class": error.skip_class}}


def _train(payload: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import save_file

    from sparkproof.engines import account
    from sparkproof.engines.base import seed_lora
    from sparkproof.engines.loop import evaluate, train_steps

    bench = Bench(payload)
    s, device, adapter = bench.scenario, bench.spec.device, Path(payload["adapter"])
    with under_test("adding LoRA"):
        bench.model = bench.engine.add_lora(bench.model, bench.spec)
    seed_lora(bench.model, s.seed)
    if untrainable(bench.model):
        return {
            "lora": account.lora_account(bench.model, s.lora.target_modules),
            "ran": vars(bench.engine.ran(bench.model)),
            "untrainable": True,
        }
    base_before, tensors_before = account.base_digest(bench.model), account.tensor_digests(bench.model)
    progress("asking for the canary before training")
    before, held_before = bench.answer(), evaluate(bench.model, bench.data.held_out, bench.spec)
    with under_test("training"):
        curve = train_steps(
            bench.model,
            bench.data.batches,
            total_steps=s.steps,
            learning_rate=s.learning_rate,
            spec=bench.spec,
            tell=progress,
        )
    memory = account.peak_memory()
    progress("asking for the canary after training")
    after, held_after = bench.answer(), evaluate(bench.model, bench.data.held_out, bench.spec)
    with under_test("saving the adapter"):
        bench.engine.save_adapter(bench.model, adapter)
    save_file({"logits": bench.probe()}, payload["probe"])
    return {
        **curve.to_json(),
        "canary_before": before,
        "canary_after": after,
        "held_out_before": held_before,
        "held_out_after": held_after,
        "lora": account.lora_account(bench.model, s.lora.target_modules),
        "tensors_before": tensors_before,
        "tensors": account.tensor_digests(bench.model),
        "base_before": base_before,
        "base_after": account.base_digest(bench.model),
        "ran": vars(bench.engine.ran(bench.model)),
        "promises_repeat": bench.engine.promises_repeat,
        "pretrained": bench.pretrained.to_json(),
        "data": bench.data_account(),
        "load_s": bench.load_s,
        "memory": memory,
        "versions": account.versions(),
        "conditions": account.conditions(device),
    }


def untrainable(model: Any) -> bool:
    """Whether there is no LoRA, or nothing that an optimiser could be given: such a run ends here, and is judged by that."""
    from sparkproof.engines.base import lora_parameters

    return not any(p.requires_grad for p in lora_parameters(model).values())


def _again(payload: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file

    from sparkproof.engines.account import tensor_digests
    from sparkproof.engines.base import seed_lora
    from sparkproof.engines.loop import train_steps

    bench = Bench(payload)
    s, adapter = bench.scenario, Path(payload["adapter"])
    progress("reading the adapter back")
    with under_test("reading the adapter back"):
        bench.model = bench.engine.read_adapter(bench.model, adapter, bench.spec)
    tensors = tensor_digests(bench.model)
    seen, kept = bench.probe(), load_file(payload["probe"])["logits"]
    difference = float((seen - kept).norm() / kept.norm()) if seen.shape == kept.shape else math.inf
    equal = seen.shape == kept.shape and bool((seen == kept).all())
    merged = bench.merged(adapter) if bench.closest else None
    repeat = None
    if s.gate.repeat_steps and bench.engine.promises_repeat:
        seed_lora(bench.model, s.seed)
        with under_test("repeating the first steps"):
            repeat = train_steps(
                bench.model,
                bench.data.batches[: s.gate.repeat_steps],
                total_steps=s.steps,
                learning_rate=s.learning_rate,
                spec=bench.spec,
                tell=lambda text: progress(f"repeat: {text}"),
            ).to_json()
    return {
        "tensors": tensors,
        "logits_equal": equal,
        "logits_difference": difference,
        "repeat": repeat,
        "data": bench.data_account(),
        "gradients": _gradients(payload, bench, with_plain=bench.engine.name == "hf", adapter=adapter, merged=merged),
    }
