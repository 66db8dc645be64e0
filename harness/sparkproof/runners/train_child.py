"""The phases of a training case, each the entry of a fresh process.

`train` is the run itself. `again` reads the saved adapter back over a freshly loaded base, repeats the first steps and
computes the step-0 gradients. `reference_gradients` computes those of the `hf` engine for another engine's case. None
of them judges: they return what was seen, and `sparkproof.runners.gate` judges it.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from sparkproof.errors import UserError
from sparkproof.runners.child import progress, under_test
from sparkproof.runners.train_bench import Bench


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
    from sparkproof.engines.base import native_device, seed_lora
    from sparkproof.engines.loop import evaluate, train_steps
    from sparkproof.measure.canaries import Watch
    from sparkproof.measure.canaries import take as take_canaries

    on_gpu = native_device() == "cuda"
    if on_gpu:
        progress("timing canaries")
    canaries = {"before": take_canaries() if on_gpu else {}}
    bench = Bench(payload)
    s, device, adapter = bench.scenario, bench.spec.device, Path(payload["adapter"])
    with under_test("adding LoRA"):
        bench.model = bench.engine.add_lora(bench.model, bench.spec)
    seed_lora(bench.model, s.seed)
    if untrainable(bench.model):
        return {
            "lora": account.lora_account(bench.model, s.lora.target_modules),
            "ran": vars(bench.engine.ran(bench.model)),
            "architecture": architecture(bench.model),
            "untrainable": True,
        }
    base_before, tensors_before = account.base_digest(bench.model), account.tensor_digests(bench.model)
    progress("asking for the canary before training")
    before, held_before = bench.answer(), evaluate(bench.model, bench.data.held_out, bench.spec)
    loaded = account.peak_memory()
    watch = Watch.of_device() if on_gpu else None
    with under_test("training"), watch or contextlib.nullcontext():
        curve = train_steps(
            bench.model,
            bench.data.batches,
            total_steps=s.steps,
            learning_rate=s.learning_rate,
            spec=bench.spec,
            tell=progress,
        )
    memory = {k: max(v, loaded.get(k, 0.0)) for k, v in account.peak_memory().items()}
    progress("asking for the canary after training")
    after, held_after = bench.answer(), evaluate(bench.model, bench.data.held_out, bench.spec)
    with under_test("saving the adapter"):
        bench.engine.save_adapter(bench.model, adapter)
    save_file({"logits": bench.probe()}, payload["probe"])
    ran = vars(bench.engine.ran(bench.model))
    if on_gpu:
        progress("timing canaries again")
        canaries["after"] = take_canaries()
    return {
        **curve.to_json(),
        "architecture": architecture(bench.model),
        "work": useful_work(bench),
        "canaries": canaries,
        "during": watch.summary() if watch else {},
        "canary_before": before,
        "canary_after": after,
        "held_out_before": held_before,
        "held_out_after": held_after,
        "lora": account.lora_account(bench.model, s.lora.target_modules),
        "tensors_before": tensors_before,
        "tensors": account.tensor_digests(bench.model),
        "base_before": base_before,
        "base_after": account.base_digest(bench.model),
        "ran": ran,
        "promises_repeat": bench.engine.promises_repeat,
        "pretrained": bench.pretrained.to_json(),
        "data": bench.data_account(),
        "load_s": bench.load_s,
        "memory": memory,
        "versions": account.versions(),
        "conditions": account.conditions(device),
    }


def architecture(model: Any) -> str:
    """Which of transformers' kinds of model it is: "llama" for a SmolLM2 too."""
    return str(getattr(model.config, "model_type", ""))


def useful_work(bench: Bench) -> dict[str, Any]:
    """{"flops": of each step, "bytes"}: what the steps had to do at least; {"why_not"} for a model that is not reckoned."""
    from sparkproof.engines.base import lora_parameters
    from sparkproof.measure.useful import Work

    elements = sum(p.numel() for p in lora_parameters(bench.model).values())
    try:
        work = Work.of(bench.model.config, elements, bench.scenario.load_in_4bit)
    except ValueError as error:
        return {"why_not": str(error)}
    return {"flops": [work.flops([sum(m) for m in b.attention_mask]) for b in bench.data.batches], "bytes": work.bytes}


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
