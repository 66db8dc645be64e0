"""`AdamW8bit` under transformers' Trainer and TRL's trainers, by either of two ways.

    TrainingArguments(optim="adamw_8bit")     # for a model of FastLanguageModel; also "adamw_bnb_8bit"
    Trainer(..., optimizer_cls_and_kwargs=adamw8bit(args, model))       # for any model

The first is a hook in transformers' table of optimisers, set when FastLanguageModel loads its first model. It answers for
models that FastLanguageModel loaded; for any other the table does what it did, bitsandbytes. Checkpoints are the same
either way, so a run that bitsandbytes began goes on here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from sparktune.optim.adamw import AdamW8bit

LOG = logging.getLogger("sparktune")
NAMES = ("adamw_8bit", "adamw_bnb_8bit")


def adamw8bit(args: Any, model: nn.Module) -> tuple[type[AdamW8bit], dict[str, Any]]:
    """`optimizer_cls_and_kwargs` for a Trainer: learning rate, betas and epsilon of its `args` (a TrainingArguments).

    Weight decay comes with the parameter groups that Trainer makes. Embeddings keep fp32 moments, as Trainer has
    bitsandbytes do. Gradients are clipped by Trainer (`max_grad_norm`), before the step.
    """
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight.requires_grad]
    return AdamW8bit, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "fp32_moments": embeddings,
    }


def register(is_ours: Callable[[Any], bool]) -> None:
    """Answer transformers' names in NAMES with `adamw8bit` for the models that `is_ours` knows. Idempotent."""
    from transformers import trainer_optimizer

    handlers = trainer_optimizer._OPTIMIZER_HANDLERS
    for name in NAMES:
        if not getattr(handlers[name], "_of_sparktune", False):
            handlers[name] = _handler(handlers[name], is_ours)


def _handler(otherwise: Callable[[Any], Any], is_ours: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """A handler of transformers' table: a context with `args` and `model` -> optimiser class and its arguments."""

    def handle(context: Any) -> Any:
        if context.model is None or not is_ours(context.model):
            return otherwise(context)
        if context.args.deepspeed or context.args.fsdp:
            LOG.warning(
                "optim=%s is bitsandbytes' under DeepSpeed and FSDP, which shard its state.", context.args.optim
            )
            return otherwise(context)
        return adamw8bit(context.args, context.model)

    handle._of_sparktune = True  # type: ignore[attr-defined]
    return handle
