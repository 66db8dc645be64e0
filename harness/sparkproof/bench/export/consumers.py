"""The consumers as their users run them: loaded in the stored type on the expected device, asked for their proof, then timed.

Prompt tokens a second (prefill) and tokens a second after the first (decode) are told apart by the consumer's own clock in
llama.cpp's server, and in transformers by when `generate` calls its stopping criteria, which is once a token.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sparkproof.bench.export import proof
from sparkproof.bench.export.document import Proof

ROOM = 16  # tokens of context beyond what is asked for


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one prompt and its answer."""

    prefill: float
    decode: float


class Consumer(Protocol):
    """A loaded export."""

    load_s: float

    def proof(self) -> Proof:
        """Where it runs, as it says itself."""

    def ask(self, ids: list[int], tokens: int) -> Speed:
        """`tokens` greedy tokens after `ids`, at least two, nothing from a cache. Errors: RuntimeError if it made others."""

    def gpu_gib(self) -> float:
        """What it took of GPUs."""

    def close(self) -> None:
        """End what was started."""


def speed(prompt: int, prefill_s: float, tokens: int, decode_s: float) -> Speed:
    """Errors: RuntimeError where the clock saw nothing pass."""
    if not (prefill_s > 0 and decode_s > 0):
        raise RuntimeError(f"{prompt} and {tokens} tokens took {prefill_s} and {decode_s} s, which no clock should say")
    return Speed(prompt / prefill_s, (tokens - 1) / decode_s)


class Torch:
    """transformers, with PEFT's adapter over it or without."""

    def __init__(self, path: Path, base: Path, with_peft: bool) -> None:
        from sparkproof.runners.export_hf import HfModel

        self.with_peft = with_peft
        self.hf = HfModel(base, path, as_stored=True) if with_peft else HfModel(path, as_stored=True)
        self.load_s = self.hf.load_s
        if self.hf.made_up:
            raise RuntimeError(f"weights that the export lacks: {', '.join(self.hf.made_up[:3])}")

    def proof(self) -> Proof:
        """Parameters' devices, layers of PEFT and bitsandbytes, and what a forward launched.

        Errors: RuntimeError where PEFT put its adapter nowhere.
        """
        placed: Counter[str] = Counter()
        for p in self.hf.model.parameters():
            placed[str(p.device)] += p.numel() * p.element_size()
        classes = (f"{type(m).__module__}.{type(m).__name__}" for m in self.hf.model.modules())
        modules = Counter(name for name in classes if name.startswith(("bitsandbytes.", "peft.tuners.lora.")))
        if self.with_peft and not any(name.startswith("peft.tuners.lora.layer.") for name in modules):
            raise RuntimeError("PEFT loaded the adapter, and no layer of the model has it")
        names, launched = self.hf.recorded()
        return proof.of_torch(placed, launched, names, modules, _devices())

    def ask(self, ids: list[int], tokens: int) -> Speed:
        """Through `generate`."""
        import torch

        given = torch.tensor([ids], device=self.hf.device)
        times: list[float] = []

        def told(made: Any, scores: Any, **kwargs: Any) -> Any:
            if self.hf.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return torch.zeros(made.shape[0], dtype=torch.bool, device=made.device)

        start = time.perf_counter()
        with torch.no_grad():
            out = self.hf.model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=self.hf.tokenizer.pad_token_id, stopping_criteria=[told],
            )  # fmt: skip
        made = out.shape[1] - given.shape[1]
        if made != tokens or len(times) != tokens:
            raise RuntimeError(f"transformers made {made} of {tokens} tokens")
        return speed(len(ids), times[0] - start, tokens, times[-1] - times[0])

    def gpu_gib(self) -> float:
        """torch's peak."""
        return _torch_peak(self.hf.device)

    def close(self) -> None:
        """Nothing was started."""


class Vllm:
    """vLLM's engine in this process, which is its own environment's; `adapter` lies over the folder."""

    def __init__(self, folder: Path, adapter: Path | None, context: int) -> None:
        from sparkproof.runners.export_vllm import VllmModel

        self.adapter = adapter
        self.engine = VllmModel(folder, adapter, serve=context)
        self.load_s = self.engine.load_s

    def proof(self) -> Proof:
        """Parameters' devices, layers of LoRA and attention, and what an answer launched.

        Errors: RuntimeError where vLLM made no room for the adapter.
        """
        placed, modules = self.engine.placed()
        if self.adapter is not None and not any(name.startswith("vllm.lora.") for name in modules):
            raise RuntimeError("vLLM took the adapter, and no layer of the model has room for it")
        names, launched = self.engine.recorded()
        return proof.of_torch(placed, launched, names, modules, _devices())

    def ask(self, ids: list[int], tokens: int) -> Speed:
        """By the engine's clock, from when it took the prompt up."""
        t = self.engine.timed(ids, tokens)
        if (t["cache_n"], t["prompt_n"], t["made_n"]) != (0, len(ids), tokens):
            raise RuntimeError(
                f"vLLM read {t['prompt_n']} of {len(ids)} tokens ({t['cache_n']} from its cache) and made "
                f"{t['made_n']} of {tokens}"
            )
        return speed(len(ids), t["prefill_s"], tokens, t["decode_s"])

    def gpu_gib(self) -> float:
        """torch's peak, the engine's cache in it."""
        return _torch_peak(self.engine.device)

    def close(self) -> None:
        """Nothing outlives the process."""


def _devices() -> list[str]:
    import torch

    return [*(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())), "CPU"]


def _torch_peak(device: str) -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


class LlamaCpp:
    """llama.cpp's server; `lora` lies over the GGUF at `path`."""

    def __init__(self, path: Path, lora: Path | None, device: str, context: int, threads: int) -> None:
        from sparkproof.runners.export_llamacpp import LlamaCppModel

        self.lora = lora
        layers = -1 if device == "cuda" else 0
        self.server = LlamaCppModel(path, layers, context, threads, lora)
        self.load_s = self.server.load_s

    def proof(self) -> Proof:
        """From its log. Errors: RuntimeError for an adapter that it says nothing of."""
        found = self.server.placement()
        if self.lora is not None and not found.lora_tensors:
            raise RuntimeError(f"llama.cpp's log does not say that it loaded a tensor of {self.lora.name}")
        return proof.of_llama_cpp(found)

    def ask(self, ids: list[int], tokens: int) -> Speed:
        """By the server's own `timings`, whose clock for the answer starts at the first token."""
        t = self.server.timed(ids, tokens)
        if (t["cache_n"], t["prompt_n"], t["predicted_n"]) != (0, len(ids), tokens):
            raise RuntimeError(
                f"llama.cpp read {t['prompt_n']} of {len(ids)} tokens ({t['cache_n']} from its cache) and made "
                f"{t['predicted_n']} of {tokens}"
            )
        return speed(len(ids), t["prompt_ms"] / 1e3, tokens, t["predicted_ms"] / 1e3)

    def gpu_gib(self) -> float:
        """The buffers that its log names."""
        return self.server.placement().gpu_mib() / 1024

    def close(self) -> None:
        """Stop the server."""
        self.server.close()
