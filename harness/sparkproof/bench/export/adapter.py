"""The adapter that is exported where none is given: LoRA on every linear layer with seeded values, B among them.

Speed and size do not depend on what an adapter has learnt, only on its shapes; values are small, so that merging changes little.
"""

from __future__ import annotations

from pathlib import Path

RANK, ALPHA, SEED = 16, 32, 11
B_SCALE = 1e-3  # standard deviation
WORDS = f"LoRA of rank {RANK} on every linear layer, random values"


def write(base: Path, out: Path) -> None:
    """A PEFT folder at `out` for the model in `base`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from sparkproof.engines.base import seed_lora

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    with torch.no_grad():
        seed_lora(peft, SEED, B_SCALE)
    peft.save_pretrained(str(out))
