"""What a model remembers of how it was loaded: saving has to find the 16-bit base again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

ATTRIBUTE = "_sparktune_origin"


@dataclass
class Origin:
    """The base checkpoint and the choices that hold for the model's life."""

    base: str  # a folder or a hub id
    revision: str | None
    hub: dict[str, Any]  # cache_dir and local_files_only, as transformers takes them; never a token
    full_finetuning: bool

    def folder(self) -> Path:
        """The base's folder: its own, or the snapshot in the hub's cache that it was loaded from."""
        if Path(self.base).is_dir():
            return Path(self.base)
        from transformers.utils import cached_file

        offline = {**self.hub, "local_files_only": True}
        config = cached_file(self.base, "config.json", revision=self.revision or "main", **offline)
        if config is None:
            raise FileNotFoundError(f"{self.base} is no longer in the hub's cache: load it again, then save.")
        return Path(config).parent


def remember(model: nn.Module, origin: Origin) -> None:
    """Keep `origin` on `model`, outside its parameters and modules."""
    object.__setattr__(model, ATTRIBUTE, origin)


def is_loaded(model: Any) -> bool:
    """Whether sparktune loaded `model`, or the model inside it."""
    return isinstance(getattr(model, ATTRIBUTE, None), Origin)


def origin_of(model: nn.Module) -> Origin:
    """What `remember` kept, also through a PeftModel. Raises ValueError for a model that sparktune did not load."""
    found = getattr(model, ATTRIBUTE, None)
    if not isinstance(found, Origin):
        raise ValueError("This model was not loaded by sparktune: use FastLanguageModel.from_pretrained.")
    return found


def transformers_model(model: Any) -> Any:
    """The transformers model inside `model`, which is that itself or a PeftModel around it."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model is not None else model
