"""What one training step is: the model's sizes, the batch, the adapters. The same for every engine, and written down whole.

Importing this file imports no torch: an engine may want to come first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from sparkproof.results import Strict

SEED = 1234
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = ("hf", "liger", "unsloth", "sparktune")
REFERENCE, OURS = "hf", "sparktune"
WORDS = {
    "hf": "transformers, PEFT and bitsandbytes",
    "liger": "Liger-Kernel over transformers and PEFT",
    "unsloth": "Unsloth",
    "sparktune": "sparktune",
}


@dataclass(frozen=True)
class Shape:
    """A model's sizes; its weights are random, so that nothing is downloaded."""

    kind: Literal["llama", "mistral", "qwen3"]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module of a layer -> [out, in]."""
        h, i, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q),
            "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
        }  # fmt: skip


SHAPES = {
    "llama31-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 36, 32, 8, 128, 151936),
    "mistral-7b": Shape("mistral", 4096, 14336, 32, 32, 8, 128, 32768),
    "llama32-1b": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128256),
    "tiny": Shape("llama", 256, 512, 2, 4, 2, 64, 1024),
}


class Setting(Strict):
    """One step's setting."""

    model: str = Field(description="Whose shapes.")
    layers: int = Field(description="Of the model's decoder layers, so many are there.")
    batch: int = Field(description="Rows a step.")
    seq: int = Field(description="Tokens a row.")
    packed: int = Field(
        default=0, description="Documents in the one row of batch x seq tokens; 0: rows are not packed."
    )
    rank: int = Field(description="Of the LoRA adapters, on all seven projections.")
    alpha: int = Field(default=16, description="LoRA's alpha.")
    lora_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Of the adapters; fp32 trains under autocast."
    )
    gc: Literal["on", "off"] = Field(description="Gradient checkpointing.")
    lr: float = Field(default=1e-4, description="Learning rate.")
    steps: int = Field(description="Timed steps a round.")
    warmup: int = Field(description="Steps before them; the first one's loss and gradient norm are compared.")
    memory_budget_gib: float | Literal["inf"] = Field(
        default=0.0, description="Of activations that sparktune's layers may keep with checkpointing on."
    )
    offload: bool = Field(default=False, description="Whether sparktune's activations wait in pinned host memory.")
    offload_embedding: bool = Field(
        default=False, description="Whether sparktune's embedding table lies there, its bytes given to activations."
    )
    seed: int = Field(default=SEED, description="Of weights, adapters and tokens.")
    device: Literal["cuda", "cpu"] = Field(description="Where it ran.")

    @property
    def shape(self) -> Shape:
        """The model's sizes."""
        return SHAPES[self.model]

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.seq

    @property
    def optimizer(self) -> str:
        """bitsandbytes' 8-bit AdamW on a GPU, PyTorch's on a CPU, where the former has no step."""
        return "bitsandbytes AdamW8bit" if self.device == "cuda" else "torch AdamW"

    def rows(self) -> tuple[int, int]:
        """Shape of the batch as the model sees it."""
        return (1, self.tokens) if self.packed else (self.batch, self.seq)

    def documents(self) -> list[int]:
        """Tokens of each sequence that attends to itself alone, over the whole batch."""
        if not self.packed:
            return [self.seq] * self.batch
        each = self.tokens // self.packed
        return [each] * (self.packed - 1) + [self.tokens - each * (self.packed - 1)]

    def useful_tflop(self) -> float:
        """TFLOP that no implementation can skip, recomputation not counted.

        Base products forward and for the input's gradient (a frozen weight needs none); LoRA's three ways; causal attention
        forward and 2.5 times that backward; the head forward and backward.
        """
        s, m = self.shape, self.tokens
        base = 2 * m * sum(n * k for n, k in s.linears.values()) * self.layers
        lora = 2 * m * self.rank * sum(n + k for n, k in s.linears.values()) * self.layers
        attention = 2 * s.heads * s.head_dim * sum(d * d for d in self.documents()) * self.layers
        return (2 * base + 3 * lora + 3.5 * attention + 4 * m * s.hidden * s.vocab) / 1e12


class Task(Strict):
    """What one process does, as its parent writes it down."""

    stage: Literal["prepare", "calibrate", "engine"] = Field(description="Which part.")
    engine: str = Field(default="", description="Whose step, in that part.")
    setting: Setting = Field(description="Of the step.")
    checkpoint: str = Field(description="Folder of the pre-quantised checkpoint.")


def child_environment(sites: list[str], paths: str | None = None) -> dict[str, str]:
    """What a process gets: no hub, no statistics, the engine's own import roots first."""
    old = os.environ.get("PYTHONPATH", "") if paths is None else paths
    env = {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "WANDB_DISABLED": "true", "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_DISABLE_AUTO_UPDATES": "1",
    }  # fmt: skip
    # Peaks of reserved memory are then those of what was allocated, not of how it was cut into pieces.
    env["PYTORCH_CUDA_ALLOC_CONF"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    roots = [*sites, *(os.path.abspath(p) for p in old.split(os.pathsep) if p)]  # noqa: PTH100 - links stay links
    if roots:
        env["PYTHONPATH"] = os.pathsep.join(roots)
    return env
