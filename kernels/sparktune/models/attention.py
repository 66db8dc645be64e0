"""transformers' attention interface over `sparktune.ops.attention`: registered as "sparktune", for masks and for scores.

Every model of transformers asks for its attention by name, so one function here serves families whose attention modules
stay their own. In training (no cache) the documents of a batch come in as a keyword and no mask is made; with a cache the
mask is the one that transformers makes for PyTorch's own attention.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sparktune.models.documents import Documents
from sparktune.ops.attention import attention

NAME = "sparktune"
_state = threading.local()


@contextlib.contextmanager
def without_masks() -> Iterator[None]:
    """Within, transformers makes no attention mask, since `Documents` say what it would."""
    before = getattr(_state, "off", False)
    _state.off = True
    try:
        yield
    finally:
        _state.off = before


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if getattr(_state, "off", False) else sdpa_mask(*args, **kwargs)


def attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, mask: Tensor | None = None, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of q [B, S, H, D], k [B, Skv, Hkv, D], v [B, Skv, Hkv, Dv] -> [B, S, H, Dv].

    `mask` (boolean or added) says all by itself; without one, attention is causal within the documents.
    """
    width = v.shape[-1]
    if width < q.shape[-1]:  # latent attention; the kernels want one width
        v = nn.functional.pad(v, (0, q.shape[-1] - width))
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
    if mask is not None:
        out = attention(q, k, v, causal=False, mask=mask, **options)
    elif documents is None:
        out = attention(q, k, v, window=window, **options)
    else:
        flat = (t.reshape(1, -1, *t.shape[2:]) for t in (q, k, v))
        out = attention(
            *flat, window=window, cu_seqlens=documents.cu_seqlens, max_seqlen=documents.longest, **options
        ).view(*q.shape[:3], -1)
    return out[..., :width]


def refuse_call(module: nn.Module, dropout: float, is_causal: bool | None = None) -> None:
    """Errors: NotImplementedError for dropout of the scores, and for a module that isn't causal."""
    if dropout:
        raise NotImplementedError("sparktune's attention has no dropout: load with attention_dropout=0.0.")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(
            "sparktune's attention is causal; load bidirectional models with attn_implementation='sdpa'."
        )


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, documents: Documents | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls it: query [B, H, S, D], key and value [B, Hkv, Skv, D] -> ([B, S, H, Dv], None)."""
    refuse_call(module, dropout, is_causal)
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = attention_mask[..., : key.shape[2]]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return attend(q, k, v, documents, attention_mask, scaling, sliding_window, softcap, s_aux), None


def register() -> None:
    """Tell transformers of "sparktune"; twice is as once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, _mask)
