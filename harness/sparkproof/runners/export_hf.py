"""The consumer transformers, with PEFT's adapter beside the base or without; also the reference itself.

Computation is in fp32, whatever the weights are stored in: what is compared is the exported numbers, not the noise of
16-bit arithmetic (which is a thousand times the effect of a correct merge).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from numpy import ndarray

from sparkproof.runners.export_probe import Said, chat_ids, recorded


class HfModel:
    """A causal language model of transformers in evaluation mode."""

    def __init__(
        self, model: Path, adapter: Path | None = None, four_bit: bool = False, as_stored: bool = False
    ) -> None:
        """Load `model`, and `adapter` over it with PEFT; `four_bit` quantises the base to NF4 as training did.

        `as_stored` computes in the type that the folder's configuration names, as a user of it would.
        """
        import torch
        from sparktune.export.hf import tokenizer_folder
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        start = time.perf_counter()
        extra: dict[str, Any] = {}
        if four_bit:
            from sparktune.quant.cpu_repack import keep_layout

            keep_layout()
            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(model, adapter))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto" if as_stored else torch.float32, device_map={"": self.device}, output_loading_info=True,
            **extra,
        )  # fmt: skip
        self.model, told = loaded
        self.made_up = sorted(map(str, {*told["missing_keys"], *told["mismatched_keys"]}))
        if adapter is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, adapter)
        self.model.eval()
        self.load_s = time.perf_counter() - start
        self.template: str = self.tokenizer.chat_template or ""

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return int(self.model.config.vocab_size)

    def log_probabilities(self, ids: list[int], positions: list[int], vocabulary: int) -> ndarray:
        """One forward; log-softmax in fp64."""
        import numpy as np
        import torch

        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids], device=self.device)).logits[0, positions]
        values = torch.log_softmax(logits.double(), dim=-1).float().cpu().numpy()
        out = np.full((len(positions), vocabulary), np.nan, dtype=np.float32)
        width = min(vocabulary, values.shape[1])
        out[:, :width] = values[:, :width]
        return out

    def tokenize(self, text: str) -> list[int]:
        """Ids as `tokenizer(text)` gives them."""
        return [int(i) for i in self.tokenizer(text)["input_ids"]]

    def render(self, messages: list[dict[str, str]]) -> str:
        """The chat template's text."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids as `apply_chat_template` gives them."""
        found = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return [int(i) for i in found]  # type: ignore[union-attr, arg-type]

    def generate(self, prompt: str, max_tokens: int) -> Said:
        """Greedy answer through the chat template; the stop tokens are the generation config's."""
        import torch

        ids = torch.tensor([chat_ids(self.tokenizer, prompt)], device=self.device)
        start = time.perf_counter()
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        made = out[0, ids.shape[1] :]
        stops = self.model.generation_config.eos_token_id
        stopped = int(made[-1]) in (stops if isinstance(stops, list) else [stops])
        speed = len(made) / (time.perf_counter() - start)
        return Said(str(self.tokenizer.decode(made, skip_special_tokens=True)), speed, stopped)

    def recorded(self) -> tuple[list[str], int]:
        """(names of what one forward ran, its kernels on the GPU), by torch's profiler."""
        import torch

        given = torch.tensor([[1, 2, 3]], device=self.device)
        with torch.no_grad():
            return recorded(lambda: self.model(input_ids=given), self.device == "cuda")

    def backend(self) -> dict[str, str]:
        """Where the parameters lie, and which attention and linear kernels a recorded forward ran."""
        names, _ = self.recorded()
        kernels = [
            n for n in names if any(word in n.lower() for word in ("addmm", "::mm", "gemm", "attention", "mkldnn"))
        ]
        placed = sorted({str(p.device) for p in self.model.parameters()})
        return {"device": self.device, "parameters": ", ".join(placed), "kernels": ", ".join(sorted(kernels)[:8])}

    def close(self) -> None:
        """Nothing was started."""
