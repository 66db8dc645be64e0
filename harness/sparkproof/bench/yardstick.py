"""sparktune as a plug-in engine of a QLoRA step benchmark that builds every engine on one checkpoint.

`build(model_dir, a)` gives the model, its trained parameters and a step; `a` has layers, rank, alpha, lora_dtype ("fp32" or
"bf16"), gc ("on" or "off"), batch, seq and packed. Environment variables:

    SPARKTUNE_MEMORY_BUDGET_GIB     what activations may take with gc on: a number, or "inf"; 0 unless set
    SPARKTUNE_OFFLOAD=1             activations wait in pinned host memory, as many as are copied in time
    SPARKTUNE_OFFLOAD_EMBEDDING=1   the embedding's table lies there, and its bytes are activations' too
    SPARKTUNE_CUDA_GRAPHS=0         Python starts every kernel of every step, instead of replaying recorded steps
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OFFLOAD = "SPARKTUNE_OFFLOAD"
BUDGET = "SPARKTUNE_MEMORY_BUDGET_GIB"
EMBEDDING = "SPARKTUNE_OFFLOAD_EMBEDDING"
GRAPHS = "SPARKTUNE_CUDA_GRAPHS"


def build(model_dir: str, a: Any) -> dict[str, Any]:
    """{"model", "params", "step": (ids, labels, positions, lengths) -> loss before its backward pass, "notes"}."""
    from sparktune.interface import FastLanguageModel
    from sparktune.models import graphs
    from sparktune.models.checkpointing import set_memory_budget
    from sparktune.models.projection import fallbacks
    from sparktune.ops import dispatch
    from sparktune.optim.flat import FlatParameters

    on_host = os.environ.get(EMBEDDING) == "1"
    model, _ = FastLanguageModel.from_pretrained(
        model_dir, max_seq_length=a.batch * a.seq if a.packed else a.seq, dtype=torch.bfloat16, load_in_4bit=True,
        device_map={"": 0 if a.device == "cuda" else "cpu"}, local_files_only=True,
        offload_embedding=on_host,
    )  # fmt: skip
    checkpointed = a.gc == "on"
    model = FastLanguageModel.get_peft_model(
        model, r=a.rank, lora_alpha=a.alpha, target_modules=list(TARGETS), use_gradient_checkpointing=checkpointed
    )
    budget = float(os.environ.get(BUDGET, "0"))
    offload = os.environ.get(OFFLOAD) == "1"
    if on_host:
        budget += model.get_input_embeddings().weight.nbytes / 2**30
    if checkpointed:
        set_memory_budget(model, budget * 2**30, offload=offload)
    dtype = torch.float32 if a.lora_dtype == "fp32" else torch.bfloat16
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    model.train()
    flat = FlatParameters(model.parameters())
    if a.device == "cuda" and os.environ.get(GRAPHS) != "0":
        graphs.use_cuda_graphs(model)
    step: Callable[..., torch.Tensor] = _step(model, flat)
    notes = {
        "budget_gib": budget,
        "watermarks": dispatch.watermarks,
        "fallbacks": fallbacks,
        "graphs": lambda: graphs.report(model),
    }
    return {"model": model, "params": [flat.parameter], "step": step, "notes": _Late(notes)}


def _step(model: Any, flat: Any) -> Callable[..., torch.Tensor]:
    def step(ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None, lengths: list[int] | None) -> Any:
        packed = {} if positions is None else {"position_ids": positions, "packed_seq_lengths": lengths}
        return flat.watch(model(input_ids=ids, labels=labels, use_cache=False, **packed).loss)

    return step


class _Late(dict[str, Any]):
    """A dict whose callables are asked when it is written down, after the steps."""

    def items(self) -> Any:
        return [(k, v() if callable(v) else v) for k, v in super().items()]
