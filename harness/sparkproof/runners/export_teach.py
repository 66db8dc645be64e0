"""A fine-tune that made an answer certain, in seconds: LoRA on every linear layer of a tiny model, one exchange.

Plain PEFT over the 16-bit base in fp32 on the CPU, since what is judged afterwards is the way out, not the training. The
answer ends with the tokenizer's stop token, so a consumer that was told its stops ends there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROMPT = "What is the code word?"
ANSWER = "It is amber falcon 7319."
STEPS = 400
CERTAIN = 5e-3  # nats a token: the answer's tokens have 99.5% each
RANK, ALPHA, RATE = 8, 16, 1e-2
SEED = 7


def teach(base: Path, out: Path) -> dict[str, Any]:
    """Write a LoRA adapter over `base` that says ANSWER to PROMPT to `out`; the loss reached and the steps it took.

    Errors: RuntimeError when STEPS did not make it certain, which is the harness's own fault.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparkproof.runners.export_probe import chat_ids

    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    before = chat_ids(tokenizer, PROMPT)
    ids = [*before, *tokenizer(ANSWER + tokenizer.eos_token, add_special_tokens=False)["input_ids"]]
    rows = torch.tensor([ids])
    labels = rows.clone()
    labels[:, : len(before)] = -100
    optimiser = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    loss = float("inf")
    steps = 0
    while steps < STEPS:
        optimiser.zero_grad()
        value = peft(input_ids=rows, labels=labels).loss
        loss = float(value.detach())
        if loss < CERTAIN:
            break
        for group in optimiser.param_groups:  # near the answer Adam's full step throws it away again
            group["lr"] = RATE if loss > 0.3 else RATE / 10
        value.backward()
        torch.nn.utils.clip_grad_norm_(peft.parameters(), 1.0)
        optimiser.step()
        steps += 1
    else:
        raise RuntimeError(f"{STEPS} steps left the taught answer at {loss:.3g} nats a token, above {CERTAIN:g}")
    peft.save_pretrained(out)
    return {"loss": loss, "steps": steps}
