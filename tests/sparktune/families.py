"""One tiny model a family, as `tests/sparktune/test_families.py` judges it: real architectures, random weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

COMMON: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.15, "tie_word_embeddings": False, "use_cache": False,
}  # fmt: skip
GEMMA3: dict[str, Any] = {
    "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5, "query_pre_attn_scalar": 40, "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    },
}  # fmt: skip
LATENT: dict[str, Any] = {  # what configurations of latent attention have instead
    "head_dim": 8, "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# family -> (configuration class, what differs from COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3-rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            },
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 9}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "gemma2": (  # caps that bend scores and logits of this size, and a window that hides
        "Gemma2Config",
        {
            "sliding_window": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0,
            "query_pre_attn_scalar": 40, "tie_word_embeddings": True,
        },
    ),
    "gemma3": ("Gemma3TextConfig", GEMMA3),
    "gemma3-images": (
        "Gemma3Config",
        {
            "text_config": {**COMMON, **GEMMA3},
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 4, "vision_use_head": False,
            },
            "mm_tokens_per_image": 4, "image_token_index": 150, "boi_token_index": 151, "eoi_token_index": 152,
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 6}),
    # A batch's longest document chooses the factors: the packed and padded ones are short, the others long. transformers'
    # own generation past the switch is wrong (it forgets its cache and goes on with one token), so 9 + 6 tokens stay short.
    "phi4-mini": (
        "Phi3Config",
        {
            "tie_word_embeddings": True, "original_max_position_embeddings": 15,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
                "original_max_position_embeddings": 15,
            },
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0, "attention_multiplier": 0.15, "residual_multiplier": 0.4,
            "logits_scaling": 2.5, "tie_word_embeddings": True,
        },
    ),
    "smollm3": (
        "SmolLM3Config",
        {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7},
    ),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 40, "sliding_window": 9},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"], "attention_bias": True,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "deepseek_v2-lite": ("DeepseekV2Config", {**LATENT, "q_lora_rank": None, "v_head_dim": 12, "n_shared_experts": 2}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **LATENT, "q_lora_rank": 20, "v_head_dim": 20, "n_shared_experts": 1, "topk_method": "group_limited_greedy",
            "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **LATENT, "q_lora_rank": 20, "v_head_dim": 16, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True,
            "num_hidden_layers": 3, "mlp_only_layers": [1], "sliding_window": 9, "use_sliding_window": True,
        },
    ),
}  # fmt: skip
TARGETS = "all-linear"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the family with random weights, biases and norms included, in evaluation mode."""
    name, changes = FAMILIES[family]
    config = getattr(transformers, name)(**{**COMMON, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():  # norms at 1 and biases at 0 would hide a wrong one
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.copy_(torch.randn(module.num_experts) * 0.2)
        if hasattr(module, "limit"):
            module.limit = 2.5  # such that some gates and ups are beyond it
    return model.to(dtype).eval()


def routers(model: Any) -> list[Any]:
    """The modules that choose experts, in order."""
    return [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]


@contextlib.contextmanager
def choices(model: Any) -> Iterator[list[torch.Tensor]]:
    """The experts that each router chooses within, sorted, in the order of calls."""
    found: list[torch.Tensor] = []
    hooks = [r.register_forward_hook(lambda m, i, out: found.append(out[-1].sort().values)) for r in routers(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def routed_alike(*models: Any, batch: int = 6, length: int = 16) -> torch.Tensor:
    """Ids [batch, length] for which all models, of whatever dtypes, choose the same experts for every token.

    Where a rounding error makes another choice, models are no nearer to each other than two that differ; how near a
    dtype's arithmetic comes to the truth can be told only where the choice is the same. Rows don't see each other, so
    rows that are routed alike make a batch that is. Dense models get the first rows.
    """
    rows: list[torch.Tensor] = []
    for seed in range(3, 200):
        row = tokens(1, length, seed=seed)
        if _alike(models, row) and _alike(models, torch.cat((*rows, row))):
            rows.append(row)
        if len(rows) == batch:
            return torch.cat(rows)
    raise AssertionError("no batch is routed alike")


def _alike(models: tuple[Any, ...], ids: torch.Tensor) -> bool:
    found = []
    for model in models:
        with choices(model) as chosen, torch.no_grad():
            model(ids, use_cache=False)
        found.append(chosen)
    return all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def with_lora(model: Any, **options: Any) -> Any:
    """LoRA around every linear layer but the head, and on experts where there are any, with B that is not zero."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False}
    if routers(model):
        settings["target_parameters"] = EXPERTS
    settings |= options
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


def twins(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """(transformers' model, the same patched), both with the same LoRA, in training mode."""
    from sparktune.models import patch_model

    plain = with_lora(build(family, dtype), **options)
    ours = copy.deepcopy(plain)
    patch_model(ours)
    return plain.train(), ours.train()


def tokens(batch: int = 2, length: int = 24, vocab: int = 160, seed: int = 3) -> torch.Tensor:
    """Random ids [batch, length], none of them padding."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def step(model: Any, **batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, gradients by name) of one batch."""
    model.zero_grad(set_to_none=True)
    loss = model(use_cache=False, **batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative L2 distance over all gradients, and its name. Errors: AssertionError where names differ."""
    assert ours.keys() == theirs.keys() and ours
    found = [(float((ours[n] - g).double().norm() / g.double().norm().clamp_min(1e-30)), n) for n, g in theirs.items()]
    return max(found)
