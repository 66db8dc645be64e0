"""Gradient checkpointing: which activations are recomputed in the backward pass, and whose word on it counts.

The model's own choice holds, the one given to `from_pretrained` or `get_peft_model`: TRL's SFTConfig asks for
checkpointing by default, and a choice made for the model must not be overruled by another's default. A trainer's
request that differs is answered by a warning, or by an error where it can't be honoured.
"""

from __future__ import annotations

import logging
import types
from typing import Any

from sparktune.interface.origin import transformers_model

LOG = logging.getLogger("sparktune")
MODES = (False, True, "unsloth", "sparktune")
NON_REENTRANT = {"use_reentrant": False}  # the re-entrant kind loses the gradients behind a frozen embedding
ATTRIBUTE = "_sparktune_checkpointing"


def check(mode: bool | str) -> bool | str:
    """`mode` if it is one. Errors: ValueError."""
    if not any(mode is known or (isinstance(mode, str) and mode == known) for known in MODES):
        raise ValueError(
            f"use_gradient_checkpointing={mode!r} is not known: use 'unsloth' or 'sparktune' (what sparktune thinks "
            "best), True (every layer) or False (none)."
        )
    return mode


def apply(model: Any, mode: bool | str) -> None:
    """Make `mode` what `model` does from now on, whatever a trainer asks for. Errors: ValueError."""
    base = transformers_model(model)
    object.__setattr__(base, ATTRIBUTE, check(mode))
    if mode is False:
        pause(base)
    else:
        type(base).gradient_checkpointing_enable(base, NON_REENTRANT)
    # Trainer calls this on the model (through PeftModel's attribute lookup) when its arguments ask for checkpointing.
    base.gradient_checkpointing_enable = types.MethodType(_requested, base)


def chosen(model: Any) -> bool | str:
    """The mode that `apply` was last given. Raises ValueError for a model that sparktune did not load."""
    mode = getattr(transformers_model(model), ATTRIBUTE, None)
    if mode is None:
        raise ValueError("This model was not loaded by sparktune: use FastLanguageModel.from_pretrained.")
    return check(mode)


def pause(model: Any) -> None:
    """No checkpointing until `apply` is called again."""
    base = transformers_model(model)
    if base.is_gradient_checkpointing:
        base.gradient_checkpointing_disable()


def _requested(
    self: Any,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """A trainer's `gradient_checkpointing_enable`."""
    mode = getattr(self, ATTRIBUTE)
    asked = (gradient_checkpointing_kwargs or {}).get("use_reentrant") or every_n_layers != 1 or offload
    if mode is False:
        LOG.warning(
            "The trainer asks for gradient checkpointing (SFTConfig's default) and the model was made with "
            "use_gradient_checkpointing=False, which holds."
        )
    elif mode is True:
        type(self).gradient_checkpointing_enable(
            self, gradient_checkpointing_kwargs or NON_REENTRANT, every_n_layers=every_n_layers, offload=offload
        )
    elif asked:
        raise ValueError(
            f"use_gradient_checkpointing={mode!r} chooses how to recompute: leave out gradient_checkpointing_kwargs, "
            "or give get_peft_model use_gradient_checkpointing=True."
        )
    else:
        apply(self, mode)
