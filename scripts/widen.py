"""Make a Llama of SmolLM2's own weights that is wider and computes the same: a real model whose rows fit K-quants.

    python scripts/widen.py SMOLLM2_FOLDER OUT

SmolLM2-135M has rows of 576, no multiple of 256, so most K-quants fall back on it. Here every third channel of the residual
stream is split into two, x -> (x cos a, x sin a), and one head in three into two that share the output: hidden size 768, 12
heads over 3. Spectra, outlier channels and what the layers do to each other are the trained model's; logits are its own to
rounding. The weights of SmolLM2's package lie on Q4_1's grid, which would flatter types that share it: where splitting leaves
the grid standing (o_proj, down_proj) each weight is moved at random within its cell, as far as the grid itself had moved it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OLD, NEW, HEAD = 576, 768, 64


def channels() -> tuple[Tensor, Tensor]:
    """For each new channel the old one that it comes from, and its factor; copies lie side by side."""
    draw = torch.Generator().manual_seed(0)
    source, factor = [], []
    for channel in range(OLD):
        if channel % 3:
            source.append(channel)
            factor.append(1.0)
        else:
            angle = math.pi / 2 * (0.2 + 0.6 * torch.rand((), generator=draw).item())
            source += [channel, channel]
            factor += [math.cos(angle), math.sin(angle)]
    return torch.tensor(source), torch.tensor(factor)


def heads(count: int = 9, shared: int = 3) -> tuple[list[int], list[float]]:
    """For each new head the old one, and its part of the output: the first head of each group of `shared` is two."""
    source, part = [], []
    for head in range(count):
        copies = [0.6, 0.4] if head % shared == 0 else [1.0]
        source += [head] * len(copies)
        part += copies
    return source, part


def dithered(weight: Tensor, draw: torch.Generator) -> Tensor:
    """weight [out, in], each moved uniformly within half a step of its block of 32 on a grid of 16 levels."""
    blocks = weight.unflatten(1, (-1, 32))
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 15
    return (blocks + (torch.rand(blocks.shape, generator=draw) - 0.5) * step).flatten(1)


def widened(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The new model's tensors, fp32."""
    source, factor = channels()
    which, part = heads()
    rows = torch.cat([torch.arange(h * HEAD, (h + 1) * HEAD) for h in which])
    share = torch.tensor(part).repeat_interleave(HEAD)
    draw = torch.Generator().manual_seed(1)
    shrink = math.sqrt(OLD / NEW)  # the norm divides by a mean over more channels

    def reads(weight: Tensor) -> Tensor:
        return weight[:, source] * factor

    def writes(weight: Tensor) -> Tensor:
        return weight[source] * factor[:, None]

    out = {"model.embed_tokens.weight": reads(state["model.embed_tokens.weight"])}
    out["model.norm.weight"] = state["model.norm.weight"][source] * shrink
    for i in range(layers):
        at = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}{norm}.weight"] = state[f"{at}{norm}.weight"][source] * shrink
        out[f"{at}self_attn.q_proj.weight"] = reads(state[f"{at}self_attn.q_proj.weight"][rows])
        for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            out[f"{at}{name}.weight"] = reads(state[f"{at}{name}.weight"])
        o_proj = dithered(state[f"{at}self_attn.o_proj.weight"], draw)
        out[f"{at}self_attn.o_proj.weight"] = writes(o_proj[:, rows] * share)
        out[f"{at}mlp.down_proj.weight"] = writes(dithered(state[f"{at}mlp.down_proj.weight"], draw))
    return out


def main(folder: Path, out: Path) -> None:
    """Write the widened model and the tokenizer to `out`, and say how far the logits moved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    old: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = old.config
    if (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) != (OLD, 9, 3):
        raise SystemExit(f"{folder} is not SmolLM2-135M: its hidden size is {config.hidden_size}.")
    state = {k: v.float() for k, v in old.state_dict().items()}
    wide_config = type(config).from_dict(
        {
            **config.to_dict(),
            "hidden_size": NEW,
            "num_attention_heads": 12,
            "rms_norm_eps": config.rms_norm_eps * OLD / NEW,
        }
    )
    wide = LlamaForCausalLM(wide_config)
    wide.load_state_dict(widened(state, config.num_hidden_layers), strict=False)
    wide.tie_weights()
    wide = wide.to(torch.bfloat16)
    wide.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(out)
    ids = tokenizer("The capital of France is Paris, and it lies on the Seine.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        right, got = old(ids).logits.log_softmax(-1), wide.float()(ids).logits.log_softmax(-1)
    kl = float((right.exp() * (right - got)).sum(-1).mean())
    print(f"{sum(p.numel() for p in wide.parameters()) / 1e6:.0f}M parameters, KL to SmolLM2 {kl:.3g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
