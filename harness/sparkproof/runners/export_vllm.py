"""The consumer vLLM, in this process: its offline engine, over a merged folder or over the base with the adapter beside it.

Runs in vLLM's own environment. `logprobs=-1` gives the whole vocabulary at each step, computed from the raw logits; a position
is one request for one token, and the prefix cache makes each further position of a text cheap. On a CPU weights and arithmetic
are fp32; on a GPU vLLM's kernels have no fp32 attention, so they are the model's own 16-bit type.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from numpy import ndarray

from sparkproof.runners.export_probe import Said, Unloadable, recorded

UNKNOWN = (  # how vLLM says that a model, or what it needs, is not for it or not for this backend
    "are not supported for now",
    "is not supported",
    "does not support",
    "No valid attention backend",
    "not implemented",
    "module 'triton.language' has no attribute",  # its LoRA on experts is Triton's alone, and a CPU has a stand-in without it
)
MLA = (512, 64)  # kv_lora_rank and qk_rope_head_dim: the one size that its CPU kernel for latent attention has
CONTEXT = 512
CACHE_BYTES = 1 << 30  # of keys and values, for one prompt at a time
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for max_lora_rank, as in sparktune.export.vllm


class VllmModel:
    """One folder in vLLM."""

    def __init__(self, folder: Path, adapter: Path | None = None, serve: int = 0) -> None:
        """Load `folder`, with LoRA's `adapter` on top if given. Errors: Unloadable, what vLLM raises.

        `serve` is for timing, a context of so many tokens: the stored type, compiled on a GPU, nothing kept between prompts,
        and a cache of CACHE_BYTES there rather than of most of the memory, which on a shared pool is the host's.
        """
        import torch
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        start = time.perf_counter()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        more: dict[str, Any] = {"enable_lora": True, "max_lora_rank": room(adapter), "max_loras": 1} if adapter else {}
        if adapter and stacked(adapter):  # PEFT's form of LoRA on experts, as vLLM's own error asks for it
            more["enable_mixed_moe_lora_format"] = True
        if self.device == "cpu" and not latent_kernel(folder):
            os.environ["VLLM_MLA_DISABLE"] = "1"  # plain attention over keys and values of every head, the same sums
        exact = self.device == "cpu" and not serve
        if serve:
            more |= {"enable_prefix_caching": False, "disable_log_stats": False}
            more |= {"kv_cache_memory_bytes": CACHE_BYTES} if self.device == "cuda" else {}
        try:
            self.llm = LLM(
                model=str(folder), tokenizer=str(adapter or folder), dtype="float32" if exact else "auto",
                max_model_len=serve or context(folder), enforce_eager=not serve or self.device == "cpu",
                max_logprobs=-1, logprobs_mode="raw_logprobs", max_num_seqs=2,
                seed=0, **more,
            )  # fmt: skip
            self.lora = LoRARequest("adapter", 1, str(adapter), is_3d_lora_weight=stacked(adapter)) if adapter else None
            self._continued([1, 2, 3], 1)  # what a backend lacks it often says only here
        except (ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
            said = " ".join(str(error).split())
            if any(word in said for word in UNKNOWN):
                raise Unloadable(said[:300]) from error
            raise
        self.tokenizer = self.llm.get_tokenizer()
        self.template: str = self.tokenizer.chat_template or ""
        self.load_s = time.perf_counter() - start
        self.made_up: list[str] = self.llm.apply_model(empty_heads)[0]  # of other weights vLLM says so itself

    @property
    def vocabulary(self) -> int:
        """Width of the logits, by the configuration that vLLM read."""
        return int(self.llm.llm_engine.model_config.get_vocab_size())

    def log_probabilities(self, ids: list[int], positions: list[int], vocabulary: int) -> ndarray:
        """Every token's log-probability after each prefix."""
        import numpy as np
        from vllm import SamplingParams

        wanted = SamplingParams(max_tokens=1, logprobs=-1, temperature=0.0, detokenize=False)
        prompts = [{"prompt_token_ids": ids[: p + 1]} for p in positions]
        rows = np.full((len(positions), vocabulary), np.nan, dtype=np.float32)
        answers = self.llm.generate(prompts, wanted, lora_request=self.lora, use_tqdm=False)  # type: ignore[arg-type]
        for row, answer in zip(rows, answers, strict=True):
            for token, entry in answer.outputs[0].logprobs[0].items():  # type: ignore[index]
                if token < vocabulary:
                    row[token] = entry.logprob
        return rows

    def tokenize(self, text: str) -> list[int]:
        """Ids as vLLM's tokenizer gives them for a text prompt."""
        return [int(i) for i in self.tokenizer(text)["input_ids"]]

    def render(self, messages: list[dict[str, str]]) -> str:
        """The chat template's text, by the tokenizer that vLLM loaded."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """The prompt's ids that `LLM.chat` itself made of the conversation."""
        return list(self._chat(messages, 1).prompt_token_ids or [])

    def generate(self, prompt: str, max_tokens: int) -> Said:
        """Greedy answer through `LLM.chat`, which takes its stops from the model's generation config."""
        start = time.perf_counter()
        made = self._chat([{"role": "user", "content": prompt}], max_tokens).outputs[0]
        speed = len(made.token_ids) / (time.perf_counter() - start)
        return Said(made.text, speed, made.finish_reason == "stop")

    def _chat(self, messages: list[dict[str, str]], max_tokens: int) -> Any:
        from vllm import SamplingParams

        wanted = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return self.llm.chat(messages, wanted, lora_request=self.lora, use_tqdm=False)[0]  # type: ignore[arg-type]

    def backend(self) -> dict[str, str]:
        """What ran it: vLLM's platform, the attention backend that its layers hold, and the type that it computes in."""
        from vllm.platforms import current_platform

        kinds = self.llm.apply_model(attention_backends)
        return {
            "device": self.device, "platform": type(current_platform).__name__, "attention": ", ".join(sorted(kinds[0])),
            "arithmetic": str(self.llm.llm_engine.model_config.dtype).removeprefix("torch."),
        }  # fmt: skip

    def timed(self, ids: list[int], tokens: int) -> dict[str, float]:
        """Tokens and seconds of `tokens` greedy ones after `ids`, none of them an end, by the engine's own clock."""
        answer = self._continued(ids, tokens)
        t = answer.metrics
        return {
            "prompt_n": len(answer.prompt_token_ids), "cache_n": answer.num_cached_tokens or 0,
            "made_n": len(answer.outputs[0].token_ids), "prefill_s": t.first_token_ts - t.scheduled_ts,
            "decode_s": t.last_token_ts - t.first_token_ts,
        }  # fmt: skip

    def _continued(self, ids: list[int], tokens: int) -> Any:
        from vllm import SamplingParams

        wanted = SamplingParams(
            max_tokens=tokens, min_tokens=tokens, ignore_eos=True, temperature=0.0, detokenize=False
        )
        return self.llm.generate({"prompt_token_ids": ids}, wanted, lora_request=self.lora, use_tqdm=False)[0]  # type: ignore[arg-type]

    def recorded(self) -> tuple[list[str], int]:
        """(names of what a short answer ran, its kernels on the GPU): the engine is in this process, in the profiler's sight."""
        return recorded(lambda: self._continued([1, 2, 3], 2), self.device == "cuda")

    def placed(self) -> tuple[dict[str, int], dict[str, int]]:
        """(device -> bytes of parameters, class -> how many layers of LoRA and implementations of attention there are)."""
        found: tuple[dict[str, int], dict[str, int]] = self.llm.apply_model(placement)[0]
        return found

    def close(self) -> None:
        """Nothing outlives the process."""


def context(folder: Path) -> int:
    """Tokens of a conversation: CONTEXT, or what the model was made for, where vLLM refuses more."""
    from transformers import AutoConfig

    most = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    return min(CONTEXT, most or CONTEXT)


def room(adapter: Path) -> int:
    """vLLM's smallest `max_lora_rank` that holds the adapter: on a CPU each token copies matrices of that rank, a layer."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return next((r for r in RANKS if r >= rank), rank)  # vLLM itself refuses one beyond them


def stacked(adapter: Path) -> bool:
    """Whether it trains experts as PEFT does where transformers holds them on one stack."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="np") as f:
        return any(".experts." in name and ".lora_A." in name for name in f.keys())  # noqa: SIM118


def latent_kernel(folder: Path) -> bool:
    """Whether a CPU has vLLM's kernel for this model's attention: of latent attention, for DeepSeek's own widths alone."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    rank = getattr(config, "kv_lora_rank", None)
    return rank is None or (rank, config.qk_rope_head_dim) == MLA


def placement(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    """What `placed` says of the model inside the engine."""
    devices: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    for p in model.parameters():
        devices[str(p.device)] += p.numel() * p.element_size()
    for m in model.modules():
        if type(m).__module__.startswith("vllm.lora."):
            classes[f"{type(m).__module__}.{type(m).__name__}"] += 1
        if hasattr(m, "impl"):
            classes[type(m.impl).__name__] += 1
    return dict(devices), dict(classes)


def empty_heads(model: Any) -> list[str]:
    """Heads that hold nothing but zeros: a family that never ties its head to its embedding gets one where the file has none."""
    named = [(name, m) for name, m in model.named_modules() if name.rpartition(".")[2] == "lm_head"]
    return [f"{name}.weight" for name, m in named if hasattr(m, "weight") and not bool(m.weight.any())]


def attention_backends(model: Any) -> set[str]:
    """Classes of the attention implementations in a model."""
    return {type(m.impl).__name__ for m in model.modules() if hasattr(m, "impl")}
